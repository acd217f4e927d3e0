"""Is a step sound? Judged before its update, from the global loss and gradient norm, so the same on every rank.

A step is not sound if either number is not finite, or, where health.on_spike asks for it, if the loss or the gradient
norm is above a factor of its median over the last good steps. An unsound step never touches weights, moments or the
moving average, whatever the policy; its numbers do not enter the medians. One thing is seen in the update only: state
that has changed by itself, which is loaded anew or ends the job (engine/resilience/audit.py).
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from engine.config.read import HealthConfig


class UnhealthyStep(Exception):
    """A step that the policy does not bear; the weights are those before it, unless they are at fault themselves."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is wrong with a step and what to do about it."""

    problem: str
    """Problem in words, with the numbers; empty for a sound step."""
    action: str
    """apply | stop | skip | repair | rewind."""
    state_at_fault: bool = False
    """The weights that the step began with may be the cause."""
    advice: str = (
        "resume from the last checkpoint with a lower optim.lr_vision or a longer optim.warmup_steps, or let "
        "health.on_nonfinite and health.on_spike skip or rewind"
    )
    """What a person can do about it."""


SOUND = Verdict(problem="", action="apply")


class Health:
    """Judges the steps of a run. Every rank has one and feeds it the same numbers."""

    def __init__(self, config: HealthConfig):
        self.config = config
        self.verdict = SOUND
        """Verdict on the last step."""
        self.skips_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=config.window_steps)
        self._norms: deque[float] = deque(maxlen=config.window_steps)

    def judge(self, loss: float, gradient_norm: float) -> Verdict:
        """Call once a step, before its update."""
        self.verdict = self._verdict(loss, gradient_norm)
        if self.verdict is SOUND:
            self._losses.append(loss)
            self._norms.append(gradient_norm)
        self.skips_in_a_row = self.skips_in_a_row + 1 if self.verdict.action == "skip" else 0
        if self.skips_in_a_row > self.config.max_skips:
            problem = f"{self.verdict.problem}, after {self.config.max_skips} skipped steps in a row"
            self.verdict = replace(self.verdict, problem=problem, action="stop")
        return self.verdict

    def diverged(self, problem: str, *, state_at_fault: bool) -> Verdict:
        """Judge, in place of `judge`, where the audit has found something.

        state_at_fault: in what goes into checkpoints; a copy of a weight does not.
        """
        self.verdict = Verdict(
            problem=problem,
            action=self.config.on_divergence,
            state_at_fault=state_at_fault,
            advice="its memory may be bad: take the host out of the job and resume, or let health.on_divergence "
            "repair or rewind",
        )
        return self.verdict

    def _verdict(self, loss: float, gradient_norm: float) -> Verdict:
        numbers = f"loss {loss:g}, gradient norm {gradient_norm:g}"
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return Verdict(problem=f"{numbers}: not finite", action=self.config.on_nonfinite, state_at_fault=True)
        if self.config.on_spike != "off":
            for name, value, window, factor in (
                ("loss", loss, self._losses, self.config.loss_factor),
                ("gradient norm", gradient_norm, self._norms, self.config.gradient_factor),
            ):
                if factor and len(window) == window.maxlen and value > factor * median(window):
                    spike = f"{name} above {factor:g} x the median {median(window):g} of {len(window)} steps"
                    return Verdict(problem=f"{numbers}: {spike}", action=self.config.on_spike)
        return SOUND

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: a resumed run judges as the one it continues. Empty where nothing is remembered."""
        if self.config.on_spike == "off" and self.config.on_nonfinite != "skip":
            return {}
        return {"losses": list(self._losses), "norms": list(self._norms), "skips_in_a_row": self.skips_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; a window that became shorter keeps its newest numbers."""
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
        self.skips_in_a_row = state["skips_in_a_row"]
