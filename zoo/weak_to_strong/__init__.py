"""Strong students of weak supervisors."""
