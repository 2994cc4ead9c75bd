"""Commands (floor 6: the only one that knows Hydra)."""
