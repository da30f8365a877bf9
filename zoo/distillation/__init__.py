"""Small students of large teachers."""
