"""What people have in a notebook as pictures -> the pixels that evaluation would show the model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.config import DataConfig
from data.errors import DataError, Rejected
from data.pixels.decode.pillow import PillowDecoder, to_rgb
from data.pixels.decode.resize import cut
from data.pixels.transforms import eval_transform, normalise

_CHANNELS = (1, 3, 4)
_KINDS = "a path, bytes of an image file, a PIL image, uint8 pixels [h, w, 3] or [3, h, w], or normalised floats"


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Reads, cuts and normalises pictures of any kind for one model."""

    size: int
    """Pixels a side that the model sees."""
    pixel_norm: str = "clip"
    """As the model's vision.pixel_norm."""
    transform: str = "squash"
    """squash (the whole picture, its aspect ignored) | crop (the centre)."""
    max_pixels: int = DataConfig.max_pixels
    """Larger pictures are refused, as data.max_pixels has it."""

    def __post_init__(self) -> None:
        eval_transform(self.transform, size=self.size)  # refuses another name

    def prepared(self, images: Sequence[Any]) -> Tensor:
        """Normalised float32 [n, 3, size, size]. Raises DataError that names the picture by its place."""
        rows = []
        for place, image in enumerate(images):
            try:
                rows.append(self._one(image))
            except Rejected as rejected:
                name = f" ({image})" if isinstance(image, str | Path) else ""
                raise DataError(f"image {place}{name} cannot be used: {rejected.reason}") from None
            except DataError as error:
                raise DataError(f"image {place}: {error}") from None
            except OSError as error:
                raise DataError(f"image {place} ({image}) cannot be read: {error.strerror}") from None
        return torch.stack(rows) if rows else torch.empty(0, 3, self.size, self.size)

    def _one(self, image: Any) -> Tensor:
        if isinstance(image, np.ndarray | Tensor) and torch.as_tensor(image).is_floating_point():
            return self._normalised(torch.as_tensor(image))
        return normalise(torch.from_numpy(self._pixels(image)), torch.float32, self.pixel_norm)

    def _normalised(self, image: Tensor) -> Tensor:
        side = self.size
        if image.shape != (3, side, side):
            raise DataError(
                f"floats {list(image.shape)} must be [3, {side}, {side}] and normalised (model.prepare does both); "
                "pixels are uint8"
            )
        if bool(((image >= 0) & (image <= 1)).all()):
            raise DataError("floats between 0 and 1 are not normalised: give the pixels as uint8, 0 to 255")
        return image.float().cpu()

    def _pixels(self, image: Any) -> np.ndarray:
        """uint8 [3, size, size]."""
        transform, decoder = eval_transform(self.transform, size=self.size), PillowDecoder(max_pixels=self.max_pixels)
        if isinstance(image, str | Path):
            image = Path(image).read_bytes()
        if isinstance(image, bytes):
            return decoder.decode(image, transform.window(0, *decoder.size(image)))
        if isinstance(image, Image.Image):
            image = np.asarray(to_rgb(image))
        if not isinstance(image, np.ndarray | Tensor):
            raise DataError(f"a {type(image).__name__} is not {_KINDS}")
        pixels = _rgb(np.asarray(torch.as_tensor(image).cpu()))
        height, width, _ = pixels.shape
        return cut(pixels, transform.window(0, width, height))


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] of colour, grey or transparent pixels. Raises DataError for other types and shapes."""
    if pixels.dtype != np.uint8:
        raise DataError(f"pixels are {pixels.dtype}: they must be uint8, 0 to 255")
    if pixels.ndim == 3 and pixels.shape[0] in _CHANNELS and pixels.shape[2] not in _CHANNELS:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if 0 in pixels.shape or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in _CHANNELS)):
        raise DataError(f"pixels {list(pixels.shape)} are not one picture [h, w, 3] or [3, h, w]")
    return np.asarray(to_rgb(Image.fromarray(np.ascontiguousarray(pixels))))


def as_list(images: Any) -> Sequence[Any]:
    """Several pictures as given; a single one as a list of one; an array [n, …] as its rows."""
    if isinstance(images, str | bytes | Path | Image.Image):
        return [images]
    if isinstance(images, np.ndarray | Tensor):
        return [images] if images.ndim in (2, 3) else list(images)
    if not isinstance(images, Iterable):
        raise DataError(f"a {type(images).__name__} is not {_KINDS}")
    return list(images)
