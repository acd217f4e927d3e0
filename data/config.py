"""Settings of the data room (`data.*` in a training config)."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class DataConfig:
    """Where samples come from and how they are read."""

    shards: list[str] = field(default_factory=list)
    """img2dataset tar shards: paths, folders, globs or brace patterns ({00000..00031}.tar); a string is a
    list of one.
    """
    shuffle: bool = True
    """Shuffle every epoch (data/order.py); false reads the shards in the listed order."""
    shuffle_group_shards: int = 64
    """Samples are permuted within groups of this many (already permuted) shards."""
    decoder: str = "auto"
    """auto | pillow; auto is pillow as long as there is no other."""
    workers: int = 1
    """Reader processes a reading rank; 0 decodes in the training process."""
    prefetch_batches: int = 2
    """Global batches that each reader prepares ahead."""
    crop_scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    """Area range of the random resized crop (paper, section 3; eva code transform.py)."""
    flip: bool = False
    """Random horizontal flip (the CLIP stages do not flip, the MIM stage does)."""
    max_bad_fraction: float = 0.05
    """Above this share of bad samples (after the first 1,000 reads) the run stops."""
