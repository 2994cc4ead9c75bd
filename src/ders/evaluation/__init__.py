"""Scores of finished models (floor 5)."""
