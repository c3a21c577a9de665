"""What `launch/verify.py` compares."""
