"""Bad samples of all ranks: counted by reason, listed in run_dir/quarantine.jsonl, and too many of them end the run.

One JSON object a line: shard, key, reason, position. World rank 0 alone writes, so lines never interleave; like the
metrics, the file is cut back to the checkpoint's position on resume, so that it lists every bad sample once.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from data.bad import REASONS, judge_bad_fraction
from data.batch import BadSample
from engine.parallel.agree import everyone
from engine.parallel.mesh import Mesh

QUARANTINE_FILE = "quarantine.jsonl"
_REASONS = list(REASONS)


class Quarantine:
    """Collects what the readers replaced. Collective over the mesh: every rank calls with what it read."""

    def __init__(self, run_dir: Path, mesh: Mesh, *, start_position: int, max_bad_fraction: float) -> None:
        """start_position: samples seen; entries of an earlier attempt from there on are dropped."""
        self._path = run_dir / QUARANTINE_FILE
        self._mesh = mesh
        self._max_bad_fraction = max_bad_fraction
        before = _keep_before(self._path, start_position) if mesh.world.rank == 0 else Counter()
        self.by_reason: Counter[str] = everyone(before, mesh.control)[0]
        """Bad samples of the run so far, the same on every rank."""

        self.caption_fallbacks = 0
        """Samples of the last step whose chosen text could not be used (data.captions), of all ranks."""

    @staticmethod
    def counts(bad: Sequence[BadSample], caption_fallbacks: int = 0) -> list[int]:
        """How many of them have each reason, and how many captions stand in for another, for the roll call."""
        found = Counter(sample.reason for sample in bad)
        return [*(found[reason] for reason in _REASONS), caption_fallbacks]

    def report(self, bad: Sequence[BadSample], totals: Sequence[int], *, samples_seen: int) -> int:
        """Add one step's bad samples of this rank; returns how many all ranks had.

        totals: `counts` of all ranks together. Raises DataError on every rank when the run has too many.
        """
        *of_reasons, self.caption_fallbacks = totals
        step = +Counter(dict(zip(_REASONS, of_reasons, strict=True)))
        if step.total():
            self.by_reason += step
            self._write(bad)
            reads = samples_seen + self.by_reason.total()
            judge_bad_fraction(self.by_reason, reads=reads, limit=self._max_bad_fraction)
        return step.total()

    def _write(self, bad: Sequence[BadSample]) -> None:
        world = self._mesh.control
        parts: list[list[dict]] = [[] for _ in range(world.size)]
        dist.gather_object(
            [asdict(sample) for sample in bad],
            parts if world.rank == 0 else None,
            dst=dist.get_global_rank(world.group, 0),
            group=world.group,
        )
        if world.rank == 0:
            with _warned(self._path), self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for part in parts for entry in part)


@contextmanager
def _warned(path: Path) -> Iterator[None]:
    """A list that cannot be written does not end the training; the counts are in the metrics and checkpoints."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        print(f"WARNING: {path} cannot be written ({error.strerror})", file=sys.stderr, flush=True)


def _keep_before(path: Path, start_position: int) -> Counter[str]:
    """Drop the entries from `start_position` on, and a last line that a killed writer left unfinished; the reasons of
    those that are kept.
    """
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = _parse(line)
            if entry is not None and entry["position"] < start_position:
                kept.append(entry)
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        partial.replace(path)
    return Counter(entry["reason"] for entry in kept)


def _parse(line: str) -> dict | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and entry.get("reason") in REASONS else None
