"""The fault matrix: real training processes, one thing after the other that breaks, and what it cost."""
