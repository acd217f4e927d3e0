"""Which window of an image is seen, and how its pixels enter the network.

A transform turns (position, width, height) into a `Window`; a decoder cuts and resizes that window. Train
windows are drawn from the stateless generator, so every decoder, rank and reader count cuts the same one.
Pixels stay uint8 until `normalise` on the device: a quarter of the traffic.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from data.errors import DataError
from data.order.stateless import uniform

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PIXEL_NORMS = {
    "clip": (CLIP_MEAN, CLIP_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and deviation of red, green and blue by `model.vision.pixel_norm`."""

_ATTEMPTS = 10
_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True, kw_only=True)
class Window:
    """The part of an image that becomes one square sample."""

    box: tuple[float, float, float, float]
    """left, top, right, bottom in source pixels (continuous, 0 is the left or top edge)."""
    size: int
    """Side of the result in pixels."""
    flip: bool = False
    """Mirror left and right after the resize."""
    crop_first: bool = True
    """The whole-pixel box is cut before the resize, so that the filter sees nothing beyond it (torchvision's
    resized crop, which the paper's training uses); False: same samples as resizing the whole image and
    cutting afterwards.
    """


class Transform(ABC):
    """How windows are chosen."""

    @abstractmethod
    def window(self, position: int, width: int, height: int) -> Window:
        """Window for the sample at a global position in an image of width x height pixels."""

    def expect(self, positions: np.ndarray) -> None:  # noqa: B027  most transforms draw nothing
        """Say that windows of these positions are asked for next, so that they can be drawn together."""


class RandomResizedCrop(Transform):
    """Training (EVA-CLIP code transform.py:60-103): area share uniform in `scale`, aspect log-uniform in
    3/4..4/3.

    Draws up to ten windows and takes the first that fits; else the largest centred one with an admissible
    aspect ("Going deeper with convolutions", section 6; the form of torchvision).
    """

    def __init__(self, *, seed: int, size: int, scale: tuple[float, float], flip: bool) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise DataError(f"data.crop_scale is {list(scale)}: it needs 0 < low <= high <= 1")
        self._seed = seed
        self._size = size
        self._scale = scale
        self._flip = flip
        self._drawn: dict[int, tuple[list[list[float]], bool]] = {}

    def expect(self, positions: np.ndarray) -> None:
        self._drawn = dict(zip(positions.tolist(), self._draw(positions), strict=True))

    def window(self, position: int, width: int, height: int) -> Window:
        drawn = self._drawn.get(position)
        attempts, flip = drawn or self._draw(np.array([position], dtype=np.int64))[0]
        left, top, crop_width, crop_height = _first_that_fits(attempts, width, height)
        return Window(box=(left, top, left + crop_width, top + crop_height), size=self._size, flip=flip)

    def _draw(self, positions: np.ndarray) -> list[tuple[list[list[float]], bool]]:
        """For each position its attempts (share of the area, aspect, left and top, from 0 to 1) and its flip."""
        draws = uniform(self._seed, "crop", positions, 4 * _ATTEMPTS).reshape(-1, 4, _ATTEMPTS)
        low, high = np.log(_RATIO)
        draws[:, 0] = self._scale[0] + draws[:, 0] * (self._scale[1] - self._scale[0])
        draws[:, 1] = np.exp(low + draws[:, 1] * (high - low))
        flips = [False] * len(positions)
        if self._flip:
            flips = (uniform(self._seed, "flip", positions, 1)[:, 0] < 0.5).tolist()
        return list(zip(draws.transpose(0, 2, 1).tolist(), flips, strict=True))


def _first_that_fits(attempts: list[list[float]], width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, width and height in pixels. Plain numbers: arrays of ten would cost ten times as much."""
    for share, aspect, left, top in attempts:
        area = width * height * share
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= crop_width <= width and 1 <= crop_height <= height:
            return int(left * (width - crop_width + 1)), int(top * (height - crop_height + 1)), crop_width, crop_height
    return _largest_centred(width, height)


def _largest_centred(width: int, height: int) -> tuple[int, int, int, int]:
    crop_width, crop_height = width, height
    if width < height * _RATIO[0]:
        crop_height = round(width / _RATIO[0])
    elif width > height * _RATIO[1]:
        crop_width = round(height * _RATIO[1])
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


class Squash(Transform):
    """Evaluation: the whole image resized to a square, aspect ignored (paper, section 7)."""

    def __init__(self, *, size: int) -> None:
        self._size = size

    def window(self, position: int, width: int, height: int) -> Window:
        return Window(box=(0, 0, width, height), size=self._size, crop_first=False)


class CentreCrop(Transform):
    """Evaluation: shortest side resized to `size`, then the centre (paper, section 7).

    The box is the preimage of that crop, on the whole pixels of the resized image: same samples of the same
    filter as resizing everything and cutting afterwards.
    """

    def __init__(self, *, size: int) -> None:
        self._size = size

    def window(self, position: int, width: int, height: int) -> Window:
        size, shortest = self._size, min(width, height)
        resized_width, resized_height = size * width // shortest, size * height // shortest
        left, top = round((resized_width - size) / 2), round((resized_height - size) / 2)
        step_x, step_y = width / resized_width, height / resized_height
        box = (left * step_x, top * step_y, (left + size) * step_x, (top + size) * step_y)
        inside = (box[0], box[1], min(box[2], width), min(box[3], height))
        return Window(box=inside, size=size, crop_first=False)


_EVAL_TRANSFORMS = {"squash": Squash, "crop": CentreCrop}


def eval_transform(name: str, *, size: int) -> Transform:
    """The evaluation transform "squash" or "crop". Raises DataError for another name."""
    if name not in _EVAL_TRANSFORMS:
        raise DataError(f"evaluation transform {name!r} is unknown: choose one of {sorted(_EVAL_TRANSFORMS)}")
    return _EVAL_TRANSFORMS[name](size=size)


def normalise(images: torch.Tensor, dtype: torch.dtype, pixel_norm: str = "clip") -> torch.Tensor:
    """uint8 [..., 3, H, W] RGB -> (images / 255 - mean) / std, computed in float32, returned as `dtype`.

    pixel_norm: key of PIXEL_NORMS, as the model has it.
    """
    mean, std = (_of_channels(values, images.device) for values in PIXEL_NORMS[pixel_norm])
    return (images.float().div_(255).sub_(mean).div_(std)).to(dtype)


def _of_channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 [3, 1, 1], written by the device itself: numbers that travel from the host drain a GPU's stream."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])
