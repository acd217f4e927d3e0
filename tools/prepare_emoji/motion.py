"""Clips of a few frames: a picture at rest in the first frame, moved or turned ever further in the next ones.

Every motion starts from rest, so that even the mean over the frames, which knows no order, tells it from its opposite.
"""

from collections.abc import Callable
from math import cos, radians, sin

from PIL import Image

_SHIFT = 0.45
"""Share of the side that a moving picture has covered at the end."""
_TURN_DEGREES = 135.0
_GROWTH = 2.0
_OVERSAMPLING = 2
"""Frames are drawn so many times larger and averaged down: a turned outline stays smooth."""

Affine = tuple[float, float, float, float, float, float]


def _shift(right: float, down: float) -> Callable[[float], Affine]:
    return lambda progress: (1, 0, -right * _SHIFT * progress, 0, 1, -down * _SHIFT * progress)


def _turn(degrees: float) -> Callable[[float], Affine]:
    """Clockwise, around the centre."""

    def at(progress: float) -> Affine:
        c, s = cos(radians(degrees * progress)), sin(radians(degrees * progress))
        return (c, s, (1 - c - s) / 2, -s, c, (1 + s - c) / 2)

    return at


def _scale(factor: float) -> Callable[[float], Affine]:
    """Around the centre, to `factor` times its size."""

    def at(progress: float) -> Affine:
        step = factor**-progress
        return (step, 0, (1 - step) / 2, 0, step, (1 - step) / 2)

    return at


MOTIONS: dict[str, Callable[[float], Affine]] = {
    "moving left": _shift(-1, 0),
    "moving right": _shift(1, 0),
    "moving up": _shift(0, -1),
    "moving down": _shift(0, 1),
    "turning clockwise": _turn(_TURN_DEGREES),
    "turning counterclockwise": _turn(-_TURN_DEGREES),
    "growing": _scale(_GROWTH),
    "shrinking": _scale(1 / _GROWTH),
}
"""Words of the caption -> map at progress 0..1: from a point of the frame to that of the picture at rest."""


def animate(picture: Image.Image, motion: str, frames: int) -> list[Image.Image]:
    """`frames` RGB images of half the picture's side, from rest (progress 0) to the end of the motion (1)."""
    side = picture.width
    drawn = []
    for number in range(frames):
        a, b, c, d, e, f = MOTIONS[motion](number / (frames - 1))
        moved = picture.transform(
            (side, side),
            Image.Transform.AFFINE,
            (a, b, c * side, d, e, f * side),
            resample=Image.Resampling.BICUBIC,
            fillcolor=(255, 255, 255),
        )
        drawn.append(moved.reduce(_OVERSAMPLING))
    return drawn


def drawing_size(size: int) -> int:
    """Side of the picture at rest for frames of `size` pixels a side."""
    return size * _OVERSAMPLING
