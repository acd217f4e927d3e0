"""The forward passes of a pipeline and no more, as a program: embeddings and features, without gradients."""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.pipeline.program import Action, Forward, Open, Program, Receive, Send, Together


@dataclass(frozen=True, kw_only=True)
class ForwardProgram(Program):
    """Every micro-batch through all chunks, then what the last stage has found to every rank.

    A replica may have none where there are fewer samples than replicas: it takes part in the exchange only. The last
    group of micro-batches may be smaller than the others, since no backward has to follow in its order.
    """

    def __post_init__(self) -> None:
        """Raise ValueError where there is no stage or no chunk."""
        if min(self.stages, self.chunks) < 1 or self.micro_batches < 0:
            raise ValueError(
                f"stages {self.stages} and chunks {self.chunks} must be at least 1, "
                f"micro-batches {self.micro_batches} at least 0"
            )

    def actions(self, stage: int) -> Iterator[Action]:
        """Units in their order; nothing of them stays."""
        yield Open("forward")
        for unit in self.units():
            if not self.starts(stage, unit):
                yield Receive("forward")
            yield Forward(unit, "embed", keeps=False, trains=False)
            if not self.ends(stage, unit):
                yield Send("forward")
        yield Together("exchange")
