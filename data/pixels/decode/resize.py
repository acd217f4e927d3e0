"""Cutting a window out of decoded pixels: bicubic with antialiasing.

torch's uint8 kernel is the fast path, five times as fast as Pillow's on one core and equal to it within one
level of 255 (docs/results/decoders.md); it has no box argument, so it takes the windows that are cut before the resize.
"""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from data.pixels.transforms import Window

_FACTORS = (8, 4, 2)  # a JPEG is decoded by blocks of 8 x 8; for the sizes in between libjpeg-turbo has no vector code


def reduced(window: Window, *, least: float) -> tuple[int, Window]:
    """(factor, window within the picture reduced by it): the largest factor that leaves the window `least` times its
    result, 1 where none does. The window loses at its edges what is no whole pixel of the reduced picture: less than
    `factor` source pixels each. Evaluation's windows, which are cut after the resize, are never reduced.
    """
    if window.crop_first:
        left, top, right, bottom = (int(edge) for edge in window.box)
        for factor in _FACTORS:
            box = (-(-left // factor), -(-top // factor), right // factor, bottom // factor)
            if min(box[2] - box[0], box[3] - box[1]) >= least * window.size:
                return factor, replace(window, box=box)
    return 1, window


def reduced_size(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """(width, height) of a JPEG that is decoded at 1 / factor."""
    return -(-size[0] // factor), -(-size[1] // factor)


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
