"""What megatron-core imports for quantised parameters, which we do not have."""

from typing import Any


def replace_raw_data(tensor: Any, new_raw_data: Any) -> None:
    """Not used."""
    raise NotImplementedError


def cast_master_weights_to_fp8(*args: Any, **kwargs: Any) -> None:
    """Not used."""
    raise NotImplementedError
