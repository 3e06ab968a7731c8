"""From what was recorded to a result that leaves the process."""
