"""Probes on frozen features: how much of a set a simple classifier finds in them."""
