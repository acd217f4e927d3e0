"""A line of the doctor's report."""

from dataclasses import dataclass

OK, NOTE, WRONG = "ok", "note", "wrong"


@dataclass(frozen=True)
class Row:
    """One thing that was looked at."""

    what: str
    found: str
    verdict: str = OK
    """ok | note (works, and may explain something) | wrong (training will fail or be wrong)."""
    advice: str = ""
    """What to do about it."""


def failure(what: str, error: BaseException, advice: str = "") -> Row:
    """Row of a check that raised."""
    return Row(what, " ".join(f"{type(error).__name__}: {error}".split())[:300], WRONG, advice)
