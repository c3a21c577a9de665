"""What `launch.benchmark` runs, measures and prints."""
