"""Decoders behind one interface."""

import logging

import torch

from data.config import DECODERS
from data.errors import DataError
from data.pixels.decode.base import Decoder, Job
from data.pixels.decode.jpeg import JpegDecoder, is_installed
from data.pixels.decode.pillow import PillowDecoder

__all__ = ["Decoder", "Job", "JpegDecoder", "PillowDecoder", "make_decoder"]

_CPU = torch.device("cpu")
_log = logging.getLogger(__name__)


def make_decoder(name: str, *, max_pixels: int, device: torch.device = _CPU, scaled_decode: float = 0.0) -> Decoder:
    """The decoder of `data.decoder`; `device` is where the samples are wanted, which only DALI can use;
    `scaled_decode` is data.scaled_decode, which DALI does not do (the config refuses both together).

    `auto` is simplejpeg where it is installed, else Pillow: the same pixels, and a core decodes more images than a GPU
    trains of any model here (docs/results/decoders.md). Raises DataError for an unknown name or a missing package.
    """
    if name == "dali":
        from data.pixels.decode.dali import DaliDecoder

        _log.info("data.decoder: DALI on %s", device)
        return DaliDecoder(max_pixels=max_pixels, device=device)
    if name not in DECODERS:
        raise DataError(f"data.decoder={name!r} is unknown: choose one of {', '.join(DECODERS)}")
    if name == "simplejpeg" or (name == "auto" and is_installed()):
        _log.info("data.decoder: simplejpeg for JPEGs, Pillow for the rest")
        return JpegDecoder(max_pixels=max_pixels, scaled_decode=scaled_decode)
    _log.info("data.decoder: Pillow%s", " (auto: simplejpeg is not installed)" if name == "auto" else "")
    return PillowDecoder(max_pixels=max_pixels, scaled_decode=scaled_decode)
