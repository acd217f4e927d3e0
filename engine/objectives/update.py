"""What ends a step of any objective: gradients reduced, judged, clipped, applied, and the new weights on every rank."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.build import Towers
from engine.config.read import HealthConfig
from engine.optim.average import move_average
from engine.optim.optimizer import ShardedOptimizer
from engine.parallel.mesh import Mesh
from engine.pipeline.clock import Phases
from engine.resilience.audit import AtRest, Audit
from engine.resilience.judge import Health


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step reports."""

    loss: Tensor
    """0-d fp32, of the global batch, the same on every rank."""
    metrics: Mapping[str, Tensor]
    """Further 0-d numbers of the step record, by name."""
    gradient_norm: float
    """Norm of the whole gradient before clipping."""
    rates: Mapping[str, float]
    """Base rates of this step by tower, before layer decay."""

    def on_host(self) -> tuple[float, dict[str, float]]:
        """The loss and the metrics as numbers, in one copy from the device."""
        device = self.loss.device
        numbers = torch.stack([number.detach().to(device).double() for number in (self.loss, *self.metrics.values())])
        loss, *metrics = numbers.tolist()
        return loss, dict(zip(self.metrics, metrics, strict=True))


class Update:
    """The end of every step on this rank. Collective over the mesh."""

    def __init__(self, towers: Towers, optimizer: ShardedOptimizer, mesh: Mesh, health: HealthConfig):
        self.towers, self.optimizer, self.mesh = towers, optimizer, mesh
        self.health = Health(health)
        self.at_rest = AtRest(optimizer, watched=health.audit_every_steps > 0)
        self.audit: Audit | None = None
        """What compares copies of weights."""
        self.audit_due = False
        """Copies of weights are compared before the next update, whatever is seen of the state at rest."""
        self._audit_was_due = False

    def __call__(self, phases: Phases, clamps: Mapping[str, tuple[float, float]], loss: Tensor) -> float:
        """Reduce, update, gather -> gradient norm before clipping. A step that is not sound changes nothing, but for
        state that turns out in the update to be at fault: it is loaded anew, or the job ends.

        clamps: bounds of learned scalars by name. loss: 0-d, global, the same on every rank.
        """
        with phases.time("reduce"):
            self.reduce()
        with phases.time("optimizer"):
            self.at_rest.check(update_follows=True)
            if self.audit_due or self._audit_was_due:  # before a save and after it
                self.at_rest.check_frozen()
            self._audit_was_due = self.audit_due
            gradient_norm, loss_value, changed = self.optimizer.gradient_norm_and(loss, self.at_rest.count())
            differs = self._differences() if self.audit_due or changed else ""
            if differs:
                verdict = self.health.diverged(differs, state_at_fault=changed > 0)
            else:
                verdict = self.health.judge(loss_value, gradient_norm)
            if verdict.action != "apply" and not changed and self.at_rest.check_now():
                verdict = self.health.diverged(self._differences(), state_at_fault=True)
            if verdict.action != "apply":
                self.optimizer.skip()
            elif not self._apply(gradient_norm, clamps):
                self.health.diverged(self.audit.state() if self.audit is not None else "", state_at_fault=True)
        with phases.time("gather_weights"):
            self.towers.gather_weights()
        return gradient_norm

    def _differences(self) -> str:
        """What copies of weights, and the state at rest, have to tell."""
        return self.audit.compare() if self.audit is not None else ""

    def _apply(self, gradient_norm: float, clamps: Mapping[str, tuple[float, float]]) -> bool:
        """Whether the update counts: it does not where the state turns out to have changed by itself."""
        if not self.optimizer.apply(gradient_norm, lambda: not self.at_rest.check_the_rest()):
            return False
        for name, (lowest, highest) in clamps.items():  # on the master weight, before the all-gather
            self.optimizer.clamp(name, lowest, highest)
        move_average(self.optimizer)
        self.at_rest.begin()
        return True

    def reduce(self) -> None:
        """Complete the gradients on the ranks that own them."""
        self.towers.finish_reduction()
        self._reduce_over_tensor_ranks()

    def _reduce_over_tensor_ranks(self) -> None:
        """Sum gradients that each tensor rank computed from its own tokens only (norms, biases, embedding).

        After the reduction over data ranks: both are sums, and that one may still be running during the backward.
        """
        gradients = [gradient for part in self.towers.parts for gradient in part.partial_gradients()]
        if not gradients:
            return
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat, group=self.mesh.tensor.group)
        torch._foreach_copy_(
            gradients,
            [t.view_as(g) for t, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)],
        )
