"""Is the job that goes on the one that the checkpoint is of? What changed is said; what changes the result is refused.

Layout, micro-batches, kernels, kept activations, evaluation, logging and health do not change what is computed (beyond
the order of sums): they may differ without a word. Settings that change the mathematics, and the data, are refused
unless the job accepts the change by name (`checkpoint.accept`, `data.changed`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.fingerprint import differences
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.matching import matches

_CHANGES_THE_RESULT = (
    "objective", "model.fp8", "model.fp8_bf16_blocks",
    "train.global_batch_size", "train.patch_dropout", "train.precision", "train.logit_scale", "train.loss",
    "train.matryoshka", "train.mask_false_negatives", "train.freeze",
    "parallel.reduce_dtype",
    "optim.*", "data.crop_scale", "data.flip", "data.frames", "mim.masked_patches", "mim.min_block", "mim.max_block",
    "mim.min_aspect", "mim.patch_gradient_scale", "mim.teacher_precision",
    "train.distill", *(f"train.distill.*.{name}" for name in ("feature", "interactive", "relational", "logit_scale",
    "precision", "model.embed_dim", "model.vision.*", "model.text.*")),
)  # fmt: skip
_ONLY_SAID = ("train.steps", "optim.ema_decay", "mim.teacher", "train.distill.*.path")
"""A longer run is a wish, and its schedule follows; an average follows the weights; a teacher may have moved."""


@dataclass(frozen=True)
class Change:
    """A setting that the checkpoint was written with and the job has not."""

    name: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} {self.was} → {self.now}"


def changed_settings(
    stored: Mapping[str, Any],
    wanted: Mapping[str, Any],
    watched: Sequence[str] = (*_CHANGES_THE_RESULT, *_ONLY_SAID),
) -> list[Change]:
    """Settings that matter to what is computed and differ. stored, wanted: nested, as a checkpoint holds a config.

    A setting that the checkpoint does not know (written before there was one) is no change. watched: patterns.
    """
    was, now = _flat(stored), _flat(wanted)
    return [
        Change(name, was[name], now[name])
        for name in sorted(was.keys() & now.keys())
        if was[name] != now[name] and matches(name, watched)
    ]


def accept_settings(changes: Sequence[Change], accepted: Sequence[str], folder: object) -> str:
    """What to say about them; empty where nothing changed. Raises CheckpointError for what is not accepted."""
    refused = [change for change in changes if not matches(change.name, (*_ONLY_SAID, *accepted))]
    if refused:
        raise CheckpointError(
            f"{folder} was written with other settings: {'; '.join(map(str, refused))}. Restore them, or go on with "
            f"the new ones by checkpoint.accept=[{','.join(change.name for change in refused)}]; another run needs "
            "another run_dir"
        )
    return f"goes on with other settings: {'; '.join(map(str, changes))}" if changes else ""


def accept_data(was: Mapping[str, Any], now: Mapping[str, Any], *, accepted: bool, seen: int, folder: object) -> str:
    """The same for the data (data/fingerprint.py). was: empty in checkpoints that do not say. seen: samples so far."""
    if not was:
        return f"{folder} does not say what data it has seen: whether it is the same was not checked"
    lines = differences(dict(was), dict(now), position=seen)
    if lines and not accepted:
        raise CheckpointError(
            f"the data is not that of {folder}, so samples would repeat and others never be seen: {'; '.join(lines)}. "
            "Restore it, or go on with the new order by data.changed=accept"
        )
    return f"goes on with other data: {'; '.join(lines)}" if lines else ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Entries of a list of sections are numbered, and the list itself stands for how many there are."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
            entries = {str(number): entry for number, entry in enumerate(value)}
            flat |= {f"{prefix}{key}": f"{len(value)} entries", **_flat(entries, f"{prefix}{key}.")}
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
