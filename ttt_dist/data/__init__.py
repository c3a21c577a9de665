"""Data: manifests, audio to Mimi codes, the text stream, the cache of codes, and batches."""
