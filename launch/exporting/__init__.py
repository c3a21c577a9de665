"""What `launch/export.py` writes."""
