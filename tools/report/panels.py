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
_PAIRS = (("top1", "top5"), ("image_to_text", "text_to_image"))
"""Parts of names of evaluations that share a panel."""
SHOWN_EVALUATIONS = 6
"""Charts of evaluations that stand open; a suite of forty sets has the others folded below."""
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
    Panel(title="Model FLOPs utilisation", unit="MFU (%)", lines=(metric("mfu", scale=100),), from_zero=True),
    Panel(title="Peak memory of a rank", unit="GB", lines=(metric("memory_gb"),), from_zero=True),
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
    """The panels of these runs that stand open, in the order of the page."""
    shown = _evaluations(runs)[:SHOWN_EVALUATIONS]
    return _drawable([*_losses(runs), *shown, _TOP1, _LEARNING_RATE, *_OTHERS], runs)


def folded_panels(runs: Sequence[Run]) -> list[Panel]:
    """The panels of the evaluations that are left."""
    return _drawable(_evaluations(runs)[SHOWN_EVALUATIONS:], runs)


def main_panels(runs: Sequence[Run]) -> list[Panel]:
    """Losses and learning rate, two of them: what the picture shows."""
    return _drawable([*_losses(runs), _LEARNING_RATE], runs)[:2]


def _drawable(candidates: Sequence[Panel], runs: Sequence[Run]) -> list[Panel]:
    return [panel for panel in (_with_data(candidate, runs) for candidate in candidates) if panel is not None]


def _with_data(panel: Panel, runs: Sequence[Run]) -> Panel | None:
    """The panel with the lines that some run has values for."""
    lines = tuple(line for line in panel.lines if any(np.isfinite(line.values(run)).any() for run in runs))
    return replace(panel, lines=lines) if lines else None


def _losses(runs: Sequence[Run]) -> list[Panel]:
    """One panel an objective: nats and cosines share no axis."""
    return [
        Panel(title=title, unit=unit, lines=(_loss_of(objective),))
        for objective in dict.fromkeys(run.objective for run in runs)
        for title, unit in [_LOSSES.get(objective, ("Loss", "loss"))]
    ]


def _loss_of(objective: str) -> Line:
    def values(run: Run) -> np.ndarray:
        losses = run.column("loss")
        return {run.objective: losses}.get(objective, np.full_like(losses, np.nan))

    return Line(label="", values=values)


def _evaluations(runs: Sequence[Run]) -> list[Panel]:
    """One panel for every result of the evaluation between steps; what belongs together shares one, and what repeats
    another one's curve (the mean of a suite of one set) has none.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.evaluation_keys()))
    keys = [key for key in keys if not _is_mean_of_two(key, keys)]
    found, seen = [], set()
    while keys:
        group = _together(keys[0], keys)
        keys = [key for key in keys if key not in group]
        curves = [[run.column(key) for run in runs] for key in group]
        identity = tuple(column.tobytes() for curve in curves for column in curve)
        if identity not in seen:
            found.append(
                _evaluation(group, all(_is_share_of(key, curve) for key, curve in zip(group, curves, strict=True)))
            )
        seen.add(identity)
    return found


def _together(key: str, keys: Sequence[str]) -> list[str]:
    """The keys of a panel: both of a pair, such as the two directions of a recall, where both are there."""
    for pair in _PAIRS:
        for part in pair:
            both = [key.replace(part, other) for other in pair]
            if part in key and set(both) <= set(keys):
                return both
    return [key]


def _is_mean_of_two(key: str, keys: Sequence[str]) -> bool:
    """Whether a recall is the mean of two directions that are both there."""
    name = key.removeprefix(EVALUATION_PREFIX)
    return all(f"{EVALUATION_PREFIX}{way}_{name}" in keys for way in _PAIRS[1])


def _is_share_of(key: str, curve: Sequence[np.ndarray]) -> bool:
    values = np.concatenate(curve)
    values = values[np.isfinite(values)]
    return is_share(key) or ("loss" not in key and bool(((values >= 0) & (values <= 1)).all()))


def _evaluation(group: Sequence[str], share: bool) -> Panel:
    parts = next((pair for pair in _PAIRS if len(group) > 1 and pair[0] in group[0]), ("",))
    title = metric_heading(group[0].removeprefix(EVALUATION_PREFIX).replace(parts[0], ""))
    return Panel(
        title=f"Evaluation: {' '.join(title.split())}",
        unit="%" if share else "value",
        lines=tuple(
            metric(key, metric_heading(part).replace(" to ", " → "), scale=100 if share else 1)
            for key, part in zip(group, parts, strict=True)
        ),
        from_zero=share,
    )
