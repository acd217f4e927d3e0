"""The step of masked-feature distillation as a program: the teacher, then one forward, one backward in turn (1F1B).

The loss needs no barrier. A stage runs as many forwards ahead as stages lie behind it, then takes a backward for every
forward: it never holds the activations of more than P micro-batches, where all forwards first would hold m. With v
chunks a rank (interleaved 1F1B) it runs 2 (P - 1 - stage) + (v - 1) P units ahead, and the bubble shrinks from
(P - 1) / m of the work to (P - 1) / (v m). Source: Narayanan et al. 2021 (arXiv 2104.04473), sections 2.2.1 and 2.2.2.

Receives are posted one message ahead and sends are not waited for, in both directions at once. Every rank takes its
forwards, and its backwards, in the order of all others.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.config.schema import Config
from engine.pipeline.program import Action, Alone, Backward, Forward, Open, Program, Receive, Send, Together, Unit


@dataclass(frozen=True, kw_only=True)
class MimProgram(Program):
    """Images to every rank, its share of the teaching, targets to the last stage, 1F1B."""

    def actions(self, stage: int) -> Iterator[Action]:
        """The teacher runs ahead of 1F1B: weights that the last update gathers may be under way meanwhile."""
        yield Together("exchange", 0)
        yield Alone("teacher")
        yield Together("exchange", 1)
        yield Open("forward")
        yield Open("backward")
        for unit, is_forward in self.turns(stage):
            yield from self._forward(stage, unit) if is_forward else self._backward(stage, unit)

    def turns(self, stage: int) -> list[tuple[Unit, bool]]:
        """(unit, whether it goes forward) of everything that a stage does, in order."""
        units = self.units()
        forwards = [(unit, True) for unit in units]
        # Gradients come back from the end of the tower: the same order with the chunks reversed.
        backwards = [(Unit(self.chunks - 1 - unit.chunk, unit.micro_batch), False) for unit in units]
        behind = self.stages - 1 - stage
        ahead = min(len(units), behind if self.chunks == 1 else 2 * behind + (self.chunks - 1) * self.stages)
        pairs = zip(forwards[ahead:], backwards, strict=False)
        return [*forwards[:ahead], *(turn for pair in pairs for turn in pair), *backwards[len(units) - ahead :]]

    def _forward(self, stage: int, unit: Unit) -> Iterator[Action]:
        if not self.starts(stage, unit):
            yield Receive("forward")
        yield Forward(unit, "forward", keeps=True)
        if not self.ends(stage, unit):
            yield Send("forward")

    def _backward(self, stage: int, unit: Unit) -> Iterator[Action]:
        if not self.ends(stage, unit):
            yield Receive("backward")
        yield Backward(unit, is_last=unit.micro_batch == self.micro_batches - 1)
        if not self.starts(stage, unit):
            yield Send("backward")


def mim_program(config: Config, data: int) -> MimProgram:
    """The program of a config on `data` replicas."""
    return MimProgram(
        stages=config.parallel.pipeline,
        micro_batches=config.train.global_batch_size // (data * config.train.micro_batch_size),
        chunks=config.parallel.virtual,
    )
