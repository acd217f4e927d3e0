"""Scores of a checkpoint: held-out shards, or a suite of sets."""
