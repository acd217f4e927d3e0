"""Optimizer: which tensor gets which rate (groups), rates over time (schedule), sharded state (shards) and LAMB."""
