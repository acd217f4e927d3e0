"""Quantised tensors."""


class QuantizedTensor:
    """Base class; no parameter of ours is one."""
