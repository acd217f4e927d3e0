"""Cutting a window out of decoded pixels: bicubic with antialiasing.

torch's uint8 kernel is the fast path, five times as fast as Pillow's on one core and equal to it within one
level of 255 (docs/results/decoders.md); it has no box argument, so it takes the windows that are cut before the resize.
"""

import numpy as np
import torch
from PIL import Image

from data.pixels.transforms import Window


def cut(pixels: np.ndarray, window: Window) -> np.ndarray:
    """uint8 [height, width, 3] -> uint8 [3, window.size, window.size], channels last in memory where torch resizes."""
    resized = _crop_then_resize(pixels, window) if window.crop_first else _resize_box(pixels, window)
    return resized[:, :, ::-1].copy() if window.flip else resized


def _crop_then_resize(pixels: np.ndarray, window: Window) -> np.ndarray:
    left, top, right, bottom = (int(edge) for edge in window.box)
    height, width, _ = pixels.shape
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"the box {window.box} does not lie in an image of {width} x {height} pixels")
    box = pixels[top:bottom, left:right]
    crop = torch.from_numpy(box if box.flags.writeable else box.copy()).permute(2, 0, 1).unsqueeze(0)
    side = (window.size, window.size)
    return torch.nn.functional.interpolate(crop, side, mode="bicubic", antialias=True)[0].numpy()


def _resize_box(pixels: np.ndarray, window: Window) -> np.ndarray:
    side = (window.size, window.size)
    resized = Image.fromarray(pixels).resize(side, Image.Resampling.BICUBIC, box=window.box)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))
