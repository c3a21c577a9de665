"""What a configuration may hold, and why a run can't start from it."""
