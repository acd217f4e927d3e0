"""Sees every operator of a step: what it computes, what it sends and what it keeps.

Works on real tensors and on fake ones. Units of work that are alike (a micro-batch through a chunk of layers) need to
run only once: `Folding` says which run, and the recorder books the others as repetitions.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.parallel.mesh import Mesh
from engine.parallel.traffic import TrafficReader, Transfer
from engine.pipeline.clock import Phases
from engine.pipeline.program import Unit
from tools.dryrun.absent import DEVICE
from tools.dryrun.flops import flops
from tools.dryrun.folding import Folding
from tools.dryrun.memory import MemoryTracker

_CATEGORIES = {
    "contrastive": {
        "encode": "activations",
        "replay": "activations",
        "backward": "activations",
        "deal": "teacher",
        "teacher": "teacher",
        "encode_text": "text",
        "backward_text": "text",
        "loss": "loss",
        "exchange": "loss",
    },
    "mim": {
        "forward": "activations",
        "backward": "activations",
        "teacher": "teacher",
        "exchange": "teacher",
    },
}
"""Objective -> phase of its step -> whose memory it takes; the rest is temporary."""


@dataclass(kw_only=True)
class Tally:
    """What operators did."""

    flops: int = 0
    transfers: Counter[Transfer] = field(default_factory=Counter)

    def add(self, other: "Tally") -> None:
        """Sum."""
        self.flops += other.flops
        self.transfers.update(other.transfers)


@dataclass(frozen=True, kw_only=True)
class _Example:
    """A unit that ran, for those like it that need not."""

    tally: Tally
    left_bytes: int
    """Memory that it left behind."""


class Recorder(TorchDispatchMode):
    """Records one step of this rank."""

    def __init__(self, mesh: Mesh, folding: Folding, objective: str):
        super().__init__()
        self._categories = _CATEGORIES[objective]
        self.memory = MemoryTracker()
        self.phases: dict[str, Tally] = {}
        """What each phase did; phase "" is what lies between the phases."""
        self.folding = folding
        self._traffic = TrafficReader(mesh)
        self._tally = self.phases.setdefault("", Tally())
        self._examples: dict[tuple[str, int, bool], _Example] = {}
        self._has_stash = "loss" in self._categories
        """Until the loss."""
        self._enter("")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch wraps the method below to keep its compiler out: none comes here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Sees every operator, collectives and backward included."""
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if func.namespace == "c10d":
            transfer = self._traffic.read(func, args)
            if transfer is not None:
                self._tally.transfers[transfer] += 1
                self._book_message(transfer, args)
        elif func.namespace == "aten":
            self._tally.flops += flops(func, args)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.memory.see(result)
        elif isinstance(result, list | tuple):
            for part in result:
                if isinstance(part, Tensor):
                    self.memory.see(part)
        return result

    @contextmanager
    def phase(self, name: str, unit: Unit | None = None) -> Iterator[None]:
        """Book what the block does under `name`."""
        outer_tally, outer_phase, self._tally = self._tally, self.memory.phase, Tally()
        self._enter(name)
        before = self.memory.live.total
        try:
            yield
            done = self._tally if unit is None else self._book(name, unit, self.memory.live.total - before)
            self.phases.setdefault(name, Tally()).add(done)
        finally:
            self._tally = outer_tally
            self._enter(outer_phase)

    def _book_message(self, transfer: Transfer, args: tuple[Any, ...]) -> None:
        """What a stage receives before a loss that is a barrier is its input, which it stashes."""
        if transfer.kind == "receive" and transfer.axis == "pipeline":
            for buffer in args[0]:
                self.memory.move(buffer, "stash" if self._has_stash else "messages")

    def _enter(self, phase: str) -> None:
        self._has_stash &= phase != "loss"
        self.memory.enter(phase, self._categories.get(phase, "temporary"))

    def _book(self, phase: str, unit: Unit, left_bytes: int) -> Tally:
        key = (phase, unit.chunk, self.folding.is_kept(unit.micro_batch))
        if self.folding.runs(unit.micro_batch):
            self._examples[key] = _Example(tally=self._tally, left_bytes=left_bytes)
        return self._examples[key].tally

    def left_bytes(self, unit: Unit) -> int:
        """Memory that a unit like this one leaves behind in the current phase."""
        return self._examples[self.memory.phase, unit.chunk, self.folding.is_kept(unit.micro_batch)].left_bytes


class RecordedPhases(Phases):
    """The phases of a step, told to a recorder instead of a clock."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    @contextmanager
    def time(self, name: str, unit: Any = None) -> Iterator[None]:
        """Book the block."""
        with self.recorder.phase(name, unit):
            yield
