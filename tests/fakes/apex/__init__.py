"""Stand-in for NVIDIA apex (tests/fakes/README.md)."""
