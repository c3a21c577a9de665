"""What watches over a run: bad steps and samples, signals, silence."""
