"""Evaluation sets as they lie on disk: what a suite asks for, and what a folder holds."""
