"""Names that megatron-core mentions in annotations."""


class Sequential:
    """Not used."""


class FusibleOperation:
    """Not used."""
