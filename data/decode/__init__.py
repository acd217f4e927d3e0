"""Decoders behind one interface."""

from data.decode.base import Decoder
from data.decode.pillow import PillowDecoder
from data.errors import DataError

__all__ = ["Decoder", "PillowDecoder", "make_decoder"]

_DECODERS = {"auto": PillowDecoder, "pillow": PillowDecoder}


def make_decoder(name: str) -> Decoder:
    """The decoder of `data.decoder`. Raises DataError for a name that this version does not know."""
    if name not in _DECODERS:
        raise DataError(f"data.decoder={name!r} is unknown: choose one of {sorted(_DECODERS)}")
    return _DECODERS[name]()
