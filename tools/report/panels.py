"""Which charts a report has: one panel a quantity, and only for quantities that some run has recorded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tools.report.runs import EVALUATION_PREFIX, Run, is_share, metric_heading


@dataclass(frozen=True, kw_only=True)
class Line:
    """One quantity of a panel."""

    label: str
    """Name beside its line style; unused if it is alone in its panel."""
    values: Callable[[Run], np.ndarray]
    """float64 [records], NaN where unknown."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes; runs differ by colour, quantities by line style."""

    title: str
    """Heading."""
    unit: str
    """Label of the y axis."""
    lines: tuple[Line, ...]
    """One or two quantities: solid, then dashed."""
    log: bool = False
    """Logarithmic y axis."""
    from_zero: bool = False
    """The y axis starts at 0."""


def metric(key: str, label: str = "", *, scale: float = 1.0) -> Line:
    """A column of the metrics file as a line."""
    return Line(label=label, values=lambda run: scale * run.column(key))


def _if_any(key: str, label: str) -> Line:
    """A counter that is worth a line only where it has counted something."""

    def values(run: Run) -> np.ndarray:
        counts = run.column(key)
        return counts if np.nansum(counts) > 0 else np.full_like(counts, np.nan)

    return Line(label=label, values=values)


_LOSSES = {"contrastive": ("Contrastive loss", "loss (nats)"), "mim": ("Masked-feature loss", "-cosine")}
_LEARNING_RATE = Panel(
    title="Learning rate",
    unit="learning rate",
    lines=(metric("lr_vision", "vision"), metric("lr_text", "text")),
    from_zero=True,
)
_TOP1 = Panel(
    title="Top-1 within the batch",
    unit="accuracy (%)",
    lines=(metric("i2t_top1", "image → text", scale=100), metric("t2i_top1", "text → image", scale=100)),
    from_zero=True,
)
_OTHERS = (
    Panel(title="Gradient norm before clipping", unit="L2 norm", lines=(metric("grad_norm"),), log=True),
    Panel(title="Throughput", unit="samples / s", lines=(Line(label="", values=Run.samples_per_s),), from_zero=True),
    Panel(
        title="Time of a step",
        unit="seconds",
        lines=(metric("step_time_s", "whole step"), metric("data_time_s", "waiting for data")),
        from_zero=True,
    ),
    Panel(
        title="Steps without an update",
        unit="count",
        lines=(_if_any("skipped_steps", "skipped"), _if_any("rewinds", "rewinds")),
        from_zero=True,
    ),
)


def panels(runs: Sequence[Run]) -> list[Panel]:
    """The panels of these runs, in the order of the page."""
    candidates = [_loss(runs), *_evaluations(runs), _TOP1, _LEARNING_RATE, *_OTHERS]
    return [panel for panel in (_with_data(candidate, runs) for candidate in candidates) if panel is not None]


def main_panels(runs: Sequence[Run]) -> list[Panel]:
    """Loss and learning rate: what the picture shows."""
    found = (_with_data(candidate, runs) for candidate in (_loss(runs), _LEARNING_RATE))
    return [panel for panel in found if panel is not None]


def _with_data(panel: Panel, runs: Sequence[Run]) -> Panel | None:
    """The panel with the lines that some run has values for."""
    lines = tuple(line for line in panel.lines if any(np.isfinite(line.values(run)).any() for run in runs))
    return replace(panel, lines=lines) if lines else None


def _loss(runs: Sequence[Run]) -> Panel:
    objectives = {run.objective for run in runs}
    title, unit = _LOSSES.get(next(iter(objectives)), ("Loss", "loss")) if len(objectives) == 1 else ("Loss", "loss")
    return Panel(title=title, unit=unit, lines=(metric("loss"),))


def _evaluations(runs: Sequence[Run]) -> list[Panel]:
    """One panel for every result of the evaluation between steps."""
    keys = dict.fromkeys(key for run in runs for key in run.evaluation_keys())
    return [
        Panel(
            title=f"Evaluation: {metric_heading(key.removeprefix(EVALUATION_PREFIX))}",
            unit="%" if is_share(key) else "value",
            lines=(metric(key, scale=100 if is_share(key) else 1),),
            from_zero=is_share(key),
        )
        for key in keys
    ]
