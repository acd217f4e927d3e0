"""Settings of the data room (`data.*` in a training config), and every check that needs no file."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from data.captions import check_captions
from data.errors import DataError

DECODERS = ("auto", "simplejpeg", "pillow", "dali")
MIXES = ("within_batch", "one_per_batch")
CLEANINGS = ("auto", "clip", "canonical", "none")
_LARGEST_SCALED_DECODE = 100.0
_A_YEAR_S = 366 * 24 * 3600
_LIMITS: dict[str, tuple[float, float]] = {
    "shuffle_group_shards": (1, 10**9),
    "max_pixels": (1, 10**11),
    "frames": (1, 1 << 16),
    "workers": (0, 1 << 10),
    "prefetch_batches": (1, 10**9),
    "stall_timeout_s": (0, _A_YEAR_S),
    "cache_gb": (1e-6, 10**9),
    "remote_timeout_s": (1e-3, _A_YEAR_S),
    "remote_retries": (0, 10**6),
    "remote_patience_s": (0, _A_YEAR_S),
}
"""Field -> the least and the most that it may be: what is beyond is a slip of the pen, and clocks end at a year."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of a mixture."""

    name: str = ""
    """Name of the source in the schedule, the metrics and the log."""
    shards: list[str] = field(default_factory=list)
    """As data.shards."""
    weight: float = 1.0
    """Share relative to the other sources (1.6 and 0.4 give 4 : 1); 0 leaves the source out until a switch."""
    subset: str = ""
    """As data.subset, of this source."""
    subset_weights: str = ""
    """As data.subset_weights, of this source."""


@dataclass(frozen=True, kw_only=True)
class MixtureSwitch:
    """Other weights of the sources from one position on."""

    at_samples: int = 0
    """Position of the run (samples seen) from which these weights hold."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight by source name; a source that is not named has weight 0."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from and how they are read."""

    shards: list[str] = field(default_factory=list)
    """img2dataset tar shards: paths, folders, globs, brace patterns ({00000..00031}.tar) or URLs; a string is
    a list of one.
    """
    sources: list[SourceConfig] = field(default_factory=list)
    """Several weighted sources in place of `shards`."""
    subset: str = ""
    """Samples of data.shards that the run is restricted to: a .npy of uids as DataComp ships it ('u8,u8'), of strings
    (uids or keys), or a .parquet with a column uid or key; shards are not rewritten (docs/data_subsets.md).
    """
    subset_weights: str = ""
    """Column of the .parquet with each sample's expected number of appearances in an epoch; empty is one each."""
    mix: str = "within_batch"
    """within_batch (every batch holds the sources in their proportion) | one_per_batch (a global batch comes
    from one source, as in the paper's code).
    """
    mixture_schedule: list[MixtureSwitch] = field(default_factory=list)
    """Switches of the weights, by rising position."""
    shuffle: bool = True
    """Shuffle every epoch (data/order/order.py); false reads the shards in the listed order."""
    shuffle_group_shards: int = 64
    """Samples are permuted within groups of this many (already permuted) shards."""
    decoder: str = "auto"
    """auto | simplejpeg | pillow | dali; auto is simplejpeg where it is installed, else pillow: the same pixels
    (docs/results/decoders.md).
    """
    scaled_decode: float = 0.0
    """0 decodes every JPEG at its full size. A number from 1 on decodes training JPEGs at 1/2, 1/4 or 1/8 of it where
    their window is then still so many times the model's image size (1.5: within 1.5 levels of 255 on average, 8 in 99 %
    of the values; docs/results/decoders.md). Evaluation decodes in full.
    """
    max_pixels: int = 89_478_485
    """Larger images are bad samples (decompression bombs); the default is Pillow's bound, 268 MB as RGB."""
    features: str = ""
    """FILE.npz of a locked image tower's embeddings of these shards, written once by tools.embed and read in the place
    of pixels (docs/features.md).
    """
    frames: int = 1
    """Frames of a sample, uniformly spread over its clip (paper: 8 or 16 for video); 1 reads still images."""
    workers: int = 1
    """Reader processes a reading rank; 0 decodes in the training process."""
    prefetch_batches: int = 2
    """Global batches that the readers of a rank prepare ahead, all together: the bound of their memory. One more waits
    in the training process."""
    stall_timeout_s: float = 900.0
    """No batch from the readers for so long after a step asked for it is an error; 0 waits for ever."""
    crop_scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    """Area range of the random resized crop (paper, section 3; eva code transform.py); the MIM stage uses
    [0.2, 1].
    """
    flip: bool = False
    """Random horizontal flip (the CLIP stages do not flip, the MIM stage does)."""
    captions: dict[str, float] = field(default_factory=dict)
    """Weights of a sample's texts: {txt: 0.5, json.recaption: 0.4, syn.txt.lines: 0.1} (data/captions.py); empty is the
    caption member alone.
    """
    tokenizer: str = "clip"
    """clip (49,408 ids, part of this project) | a file of your own: the tokenizer.json of a model, or a SentencePiece
    .model (docs/tokenizers.md).
    """
    cleaning: str = "auto"
    """What is done to a caption before it is cut into tokens: auto (clip with CLIP's, canonical with a file) | clip
    (repaired, unescaped, lower case) | canonical (the same without punctuation: SigLIP) | none.
    """
    sentences: str = "all"
    """all | random (one sentence of the caption) | first N."""
    changed: str = "refuse"
    """refuse | accept: a resumed run whose data is not that of its checkpoint (docs/checkpoints.md)."""
    max_bad_fraction: float = 0.05
    """Above this share of bad samples (after the first 1,000 reads) the run stops."""
    cache_dir: str = ""
    """Local folder for copies of remote shards, and for indices that cannot lie beside their shard."""
    cache_gb: float = 200.0
    """Bound of the shard copies in cache_dir (1e9 bytes); the least recently used goes first."""
    remote_timeout_s: float = 300.0
    """One attempt to fetch one remote shard may take so long."""
    remote_retries: int = 5
    """Further attempts, with growing waits in between, that are made in any case before the run stops."""
    remote_patience_s: float = 600.0
    """A store that fails is asked again for so long before the run stops; below stall_timeout_s."""

    def check(self) -> None:
        """Raises DataError for values that cannot be used, or not together."""
        _require(
            bool(self.shards) != bool(self.sources),
            "data.shards is empty: give tar files, a folder, a glob or a {00000..00031}.tar pattern (or data.sources)"
            if not self.shards
            else "data.shards and data.sources are both set: move the shards into a source, or drop the sources",
        )
        self._check_mixture()
        self._check_subsets()
        check_captions(self.captions, self.sentences)
        _require(
            self.cleaning in CLEANINGS, f"data.cleaning is {self.cleaning!r}: choose one of {', '.join(CLEANINGS)}"
        )
        _require(
            self.tokenizer == "clip" or self.tokenizer.endswith((".json", ".model")),
            f"data.tokenizer is {self.tokenizer!r}: clip, a tokenizer.json or a SentencePiece .model of your own",
        )
        _require(
            self.tokenizer != "clip" or self.cleaning in ("auto", "clip"),
            f"data.cleaning={self.cleaning} is for a data.tokenizer of your own: CLIP's always cleans as CLIP",
        )
        _require(
            len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1,
            f"data.crop_scale {self.crop_scale} must be two areas with 0 < low <= high <= 1",
        )
        _require(self.decoder in DECODERS, f"data.decoder is {self.decoder!r}: choose one of {', '.join(DECODERS)}")
        _require(
            self.scaled_decode == 0 or 1 <= self.scaled_decode <= _LARGEST_SCALED_DECODE,
            f"data.scaled_decode is {self.scaled_decode}: 0 (every JPEG in full), or how many times the model's image "
            f"size a window must have after scaling, from 1 to {_LARGEST_SCALED_DECODE:g}",
        )
        _require(
            not self.scaled_decode or self.decoder != "dali",
            f"data.scaled_decode={self.scaled_decode} is not what data.decoder=dali does, which decodes every JPEG in "
            "full: use data.decoder=auto, or data.scaled_decode=0",
        )
        _require(self.changed in ("refuse", "accept"), f"data.changed is {self.changed!r}: choose refuse or accept")
        _require(
            0 <= self.max_bad_fraction < 1, f"data.max_bad_fraction is {self.max_bad_fraction}: 0 or more, below 1"
        )
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            _require(value >= least, f"data.{name} is {value}: it must be at least {least:,}")
            _require(value <= most, f"data.{name} is {value}: it must be at most {most:,}")

    def _check_subsets(self) -> None:
        _require(
            not self.sources or not (self.subset or self.subset_weights),
            "data.subset belongs to data.shards: with data.sources give each source a subset of its own",
        )
        for subset, column in [
            (self.subset, self.subset_weights),
            *((source.subset, source.subset_weights) for source in self.sources),
        ]:
            _require(
                bool(subset) or not column,
                f"data.subset_weights={column} names a column of data.subset, which is empty",
            )

    def _check_mixture(self) -> None:
        _require(self.mix in MIXES, f"data.mix is {self.mix!r}: choose one of {', '.join(MIXES)}")
        _require(
            bool(self.sources) or not self.mixture_schedule,
            "data.mixture_schedule needs data.sources: data.shards is a single source",
        )
        names = [source.name for source in self.sources]
        for source in self.sources:
            _require(
                bool(source.name) and names.count(source.name) == 1,
                f"data.sources has the names {names}: each source needs a name of its own",
            )
            _require(bool(source.shards), f"data.sources: {source.name!r} has no shards")
        self._check_weights("data.sources", names, {source.name: source.weight for source in self.sources})
        for switch in self.mixture_schedule:
            self._check_weights(f"data.mixture_schedule at {switch.at_samples}", names, switch.weights)
        starts = [0, *(switch.at_samples for switch in self.mixture_schedule)]
        _require(
            all(earlier < later for earlier, later in pairwise(starts)),
            f"data.mixture_schedule switches at {starts[1:]} samples: the positions must rise, the first above 0",
        )

    def _check_weights(self, where: str, names: Iterable[str], weights: dict[str, float]) -> None:
        unknown = sorted(set(weights) - set(names))
        _require(not unknown, f"{where} names {unknown}, which data.sources does not have")
        if self.sources:
            _require(
                all(0 <= weight <= 1e9 for weight in weights.values()) and any(weights.values()),
                f"{where} has the weights {weights}: each from 0 to 1e9, none may be negative, one must be above 0",
            )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DataError(message)
