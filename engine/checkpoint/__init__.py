"""Checkpoints: sharded, hashed, atomic, readable at any layout (docs/checkpoints.md)."""
