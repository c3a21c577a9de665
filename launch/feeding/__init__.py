"""What a training step reads: samples, lanes along recordings, lengths over steps."""
