"""OpenMoji pictures and clips for `python -m tools.prepare_emoji`."""
