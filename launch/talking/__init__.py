"""A trained model in conversation: `launch/generate.py`, `launch/serve.py`."""
