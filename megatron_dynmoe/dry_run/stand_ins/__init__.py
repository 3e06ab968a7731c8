"""Functions and counts in place of those that need a real device or real values."""
