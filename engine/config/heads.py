"""Heads of an image tower whose width alone was changed on the command line.

Heads are width / head_width, so a width that the file's or preset's head_width does not divide has no whole number of
them. Where as many heads as before divide it, head_width follows, and the start says so; every other case is refused
as it is (models/config.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.config import VisionConfig


@dataclass(frozen=True, kw_only=True)
class Followed:
    """A head width that follows the width."""

    model: str
    """Where the config names it: model, or mim.teacher_model."""
    width: int
    """The width that the command line gives."""
    before: int
    """Channels of a head that do not divide it."""
    head_width: int
    """Channels of a head that as many heads as before have."""

    def __str__(self) -> str:
        """For the start of a run."""
        heads, at = self.width // self.head_width, f"{self.model}.vision"
        return (
            f"{at}.head_width is {self.head_width}: {self.before} does not divide {at}.width={self.width} of the "
            f"command line, and the {heads} heads stay as many"
        )


def follow(model: str, before: Mapping[str, Any], asked: Mapping[str, Any]) -> Followed | None:
    """before: vision settings without the command line; asked: those of the command line."""
    width, plain = asked.get("width"), VisionConfig()
    if width is None or "head_width" in asked:
        return None
    old, head_width = before.get("width", plain.width), before.get("head_width", plain.head_width)
    if head_width < 1 or width % head_width == 0 or old % head_width:
        return None
    heads = old // head_width
    if width < heads or width % heads:
        return None
    return Followed(model=model, width=width, before=head_width, head_width=width // heads)
