"""The contrastive step as a program: encode, loss, backprop (docs/contrastive_step.md).

The loss needs every embedding of the global batch before any gradient exists, so there is a barrier:
1. encode: each micro-batch runs through the stages without grad; a stage keeps ("stashes") its inputs only;
2. loss: exact, over the rows of all ranks, gradients of the embeddings in closed form; no graph crosses it;
3. backprop: each stage replays a micro-batch from its stash with grad and sends the input's gradient upstream.
The last k micro-batches may keep their activations and are not replayed: (4 - k / m) forwards of compute instead of 4.
Backprop goes from the last micro-batch to the first, whatever k: kept activations are freed first, and the sum of
gradients has the same order for every k.

Every rank also encodes captions of its own, in parts, where its stage would otherwise wait: a stage with s of P - 1
stages before it does s / (P - 1) of them before the first input arrives, and the rest after its last output left;
backward likewise. Frozen teachers (train.distill) work there, too, on pixels that are dealt at the start.

Chunks of the tower below everything that is trained (train.freeze) have encode turns only, and so do the captions where
they learn nothing. The first chunk above them sends no gradient on.

Parts of a rank (chunks of the vision tower, and the captions' side, the last part) take turns. The weights of a part
that is sharded are gathered while the part before it works and leave behind its turn; its gradients are reduced while
the part after it works. So at most two chunks are whole at any time. The captions are shared by all ranks, whose stages
take their turn at different times: no rank may wait for the others there. On a pipeline their weights are asked for by
every rank at once, ahead of both phases, and their gradients are whole until the step's end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from engine.config.schema import Config
from engine.config.sections.freeze import frozen_of
from engine.config.stages import stage_layers
from engine.pipeline.program import (
    Accumulate,
    Action,
    Alone,
    Await,
    Backward,
    Forward,
    Gather,
    Open,
    Program,
    Receive,
    Reduced,
    Release,
    Replay,
    Send,
    Together,
    Unit,
)


@dataclass(frozen=True)
class _Turn:
    """Units of one chunk in a row, or some of the captions, which have none; and whose turn is next."""

    part: int
    units: list[Unit]
    then: int | None
    share: tuple[float, float] = (0.0, 1.0)
    """Beginning and end of what of the captions it does, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveProgram(Program):
    """Encode, loss, backprop, and the captions of a rank."""

    keep: int | tuple[int, ...] = 0
    """k, the last micro-batches that are not replayed; a tuple where stages differ."""
    sharded_weights: frozenset[int] = frozenset()
    """Parts whose weights are gathered for their turns."""
    sharded_gradients: frozenset[int] = frozenset()
    """Parts whose gradients are whole from their turn backward to their reduction only."""
    trained_from: int = 0
    """Chunks of the tower, in its order over all stages, below the first that is trained; all: the tower is locked."""
    trains_captions: bool = True
    """Whether the captions' side has a backward."""
    gathers_ahead: bool = True
    """Whether the weights of the next turn are gathered during this one."""
    teaches: bool = False
    """Whether frozen teachers embed the rank's pairs, ahead of its captions."""
    reads_features: bool = False
    """Whether the images' embeddings are read (data.features): nothing of the tower runs."""
    deals_captions: bool = True
    """Whether a stage may have captions before and after its units, as it has unless their side comes and goes."""

    def __post_init__(self) -> None:
        """Raise ValueError for what the engine refuses, too."""
        super().__post_init__()
        wrong = [k for k in map(self.kept, range(self.stages)) if not 0 <= k <= self.micro_batches]
        if wrong:
            raise ValueError(f"keep {wrong[0]} is not within 0 and the {self.micro_batches} micro-batches")

    def kept(self, stage: int) -> int:
        """k of a stage."""
        return self.keep[stage] if isinstance(self.keep, tuple) else self.keep

    def units(self) -> list[Unit]:
        """None where the images' embeddings are read."""
        return [] if self.reads_features else super().units()

    def trains(self, stage: int, unit: Unit) -> bool:
        """Whether a unit has a backward."""
        return self._place(stage, unit) >= self.trained_from

    def returns_gradient(self, stage: int, unit: Unit) -> bool:
        """Whether the unit's backward has a gradient of its input to send: there is something to train below."""
        return self._place(stage, unit) > self.trained_from

    def _place(self, stage: int, unit: Unit) -> int:
        """Number of the unit's chunk in the tower."""
        return unit.chunk * self.stages + stage

    @property
    def captions(self) -> int:
        """Number of the part that is the captions' side."""
        return self.chunks

    def actions(self, stage: int) -> Iterator[Action]:
        """Encode, exchange of embeddings, loss, exchange of their gradients, backprop."""
        if self.teaches or self.reads_features:
            yield Together("deal")
        yield from self._encode(stage)
        yield Together("exchange", 0)
        # Before the loss, what backprop needs first is asked for.
        if self.trains_captions:
            yield from self._ask_for_captions()
        for turn in self._backward_turns(stage)[:1]:
            yield from self._expect(turn.part)
        yield Together("loss")
        if self.trained_from < self.stages * self.chunks:
            yield Together("exchange", 1)
        yield from self._backprop(stage)

    def _encode(self, stage: int) -> Iterator[Action]:
        yield Open("forward")
        yield from self._ask_for_captions()
        first_kept = self.micro_batches - self.kept(stage)
        for turn in self._turns(self.units(), waits=stage):
            if self.teaches and turn.part == self.captions and turn.share[0] == 0:
                yield Alone("teacher")
            yield from self._begin(turn)
            if turn.part == self.captions:
                yield Alone("encode_text", turn.share)
            for unit in turn.units:
                if not self.starts(stage, unit):
                    yield Receive("forward")
                trains, keeps = self.trains(stage, unit), unit.micro_batch >= first_kept
                yield Forward(unit, "encode", keeps=trains and keeps, trains=trains)
                if not self.ends(stage, unit):
                    yield Send("forward")
            yield from self._end(turn)

    def _backprop(self, stage: int) -> Iterator[Action]:
        yield Open("backward")
        reducing: list[Action] = []
        for turn in self._backward_turns(stage):
            yield from self._begin(turn)
            is_sharded = turn.part in self.sharded_gradients
            if is_sharded:
                yield Accumulate(turn.part)
            if turn.part == self.captions:
                yield Alone("backward_text", turn.share)
            for unit in turn.units:
                yield from self._back(stage, unit, reducing)
            yield from self._end(turn)
            if is_sharded and turn.part != self.captions:
                yield from reducing  # no other reduction may begin in its group
                reducing = [Reduced(turn.part)]
        yield from reducing

    def _back(self, stage: int, unit: Unit, reducing: list[Action]) -> Iterator[Action]:
        """A replay needs nothing from other stages: it runs while the gradient travels."""
        if unit.micro_batch < self.micro_batches - self.kept(stage):
            yield Replay(unit)
        if not self.ends(stage, unit):
            yield Receive("backward")
        is_last = unit.micro_batch == 0  # of this chunk: units come in reverse order
        if is_last:
            yield from reducing
            reducing.clear()
        yield Backward(unit, is_last)
        if self.returns_gradient(stage, unit):
            yield Send("backward")

    def _backward_turns(self, stage: int) -> list[_Turn]:
        units = [unit for unit in self.units()[::-1] if self.trains(stage, unit)]
        return self._turns(units, waits=self.stages - 1 - stage, captions=self.trains_captions)

    def _turns(self, units: Sequence[Unit], *, waits: int, captions: bool = True) -> list[_Turn]:
        """Captions go where the stage would otherwise wait. waits: units that pass before its first can begin."""
        comes_and_goes = self.captions in self.sharded_weights | self.sharded_gradients
        has_two_turns = self.stages > 1 and self.deals_captions and not comes_and_goes
        before = waits / (self.stages - 1) if has_two_turns else float(waits > 0)
        turns = [_Turn(chunk, list(run), None) for chunk, run in groupby(units, key=lambda unit: unit.chunk)]
        if captions and before > 0:
            turns.insert(0, _Turn(self.captions, [], None, (0.0, before)))
        if captions and before < 1:
            turns.append(_Turn(self.captions, [], None, (before, 1.0)))
        following = [*(turn.part for turn in turns[1:]), None]
        return [replace(turn, then=then) for turn, then in zip(turns, following[: len(turns)], strict=True)]

    def _begin(self, turn: _Turn) -> Iterator[Action]:
        if turn.part in self.sharded_weights:
            yield Await(turn.part)
        if turn.then is not None and turn.then != turn.part:
            yield from self._expect(turn.then)

    def _end(self, turn: _Turn) -> Iterator[Action]:
        if turn.part in self.sharded_weights:
            yield Release(turn.part)

    def _expect(self, part: int) -> Iterator[Action]:
        is_asked_for = self.stages > 1 and part == self.captions
        if self.gathers_ahead and part in self.sharded_weights and not is_asked_for:
            yield Gather(part)

    def _ask_for_captions(self) -> Iterator[Action]:
        """All ranks ask at once: on a pipeline some have the captions' turn first, and others last."""
        if self.stages > 1 and self.captions in self.sharded_weights:
            yield Gather(self.captions)


def contrastive_program(config: Config, data: int, keep: int) -> ContrastiveProgram:
    """The program of a config on `data` replicas. keep: k, micro-batches that keep their activations; -1: all."""
    parallel = config.parallel
    micro_batches = config.train.global_batch_size // (data * config.micro_batch_samples)
    vision = range(parallel.virtual if data > 1 else 0)
    captions = [parallel.virtual] if parallel.tensor * parallel.pipeline * data > 1 else []
    shared = frozenset([*vision, *captions])
    frozen = frozen_of(config)
    layers = stage_layers(config.model.vision.depth, parallel.pipeline * parallel.virtual, parallel.layers)
    return ContrastiveProgram(
        stages=parallel.pipeline,
        micro_batches=micro_batches,
        chunks=parallel.virtual,
        keep=micro_batches if keep < 0 else keep,
        # All micro-batches in a row where a chunk's weights come and go.
        round_size=parallel.round_size or (micro_batches if parallel.shard != "optimizer" else None),
        sharded_weights=shared if parallel.shard == "weights" else frozenset(),
        sharded_gradients=shared if parallel.shard != "optimizer" else frozenset(),
        trained_from=frozen.first_chunk(layers),
        trains_captions=not frozen.locks_text,
        gathers_ahead=parallel.overlap,
        teaches=bool(config.train.distill),
        reads_features=bool(config.data.features),
    )
