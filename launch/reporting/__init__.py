"""What a run tells: tables, curves, W&B, profiles."""
