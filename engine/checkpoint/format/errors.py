"""The one failure of this room."""


class CheckpointError(Exception):
    """A checkpoint that cannot be written or used; the message says which, why, and what to do."""


def listed(names: list[str], limit: int = 20) -> str:
    """Names one a line, cut after `limit` with the number left out."""
    shown = "".join(f"\n    {name}" for name in names[:limit])
    return shown + (f"\n    … and {len(names) - limit} more" if len(names) > limit else "")
