"""Decoders behind one interface."""

import logging

import torch

from data.errors import DataError
from data.pixels.decode.base import Decoder, Job
from data.pixels.decode.pillow import PillowDecoder

__all__ = ["Decoder", "Job", "PillowDecoder", "make_decoder"]

_CPU = torch.device("cpu")
_log = logging.getLogger(__name__)


def make_decoder(name: str, *, max_pixels: int, device: torch.device = _CPU) -> Decoder:
    """The decoder of `data.decoder`; `device` is where the samples are wanted, which only DALI can use.

    `auto` is Pillow: a core decodes more images than a GPU trains of any model here (docs/results/decoders.md). Raises
    DataError for an unknown name or a missing package.
    """
    if name == "dali":
        from data.pixels.decode.dali import DaliDecoder

        _log.info("data.decoder: DALI on %s", device)
        return DaliDecoder(max_pixels=max_pixels, device=device)
    if name in ("auto", "pillow"):
        _log.info("data.decoder: Pillow%s", " (auto: no GPU needs more than the cores give)" if name == "auto" else "")
        return PillowDecoder(max_pixels=max_pixels)
    raise DataError(f"data.decoder={name!r} is unknown: choose one of auto, pillow, dali")
