"""What `launch/evaluate.py` reads, counts and prints."""
