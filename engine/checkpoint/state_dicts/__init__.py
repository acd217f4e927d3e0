"""State dicts of other projects on disk: which file, which entry of it, which names; nothing in them is trusted."""
