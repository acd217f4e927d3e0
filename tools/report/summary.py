"""The tables of a report: runs, their phases, their evaluation, and where their configs differ."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from tools.report.curves import PALETTE
from tools.report.runs import EVALUATION_PREFIX, Phase, Run, config_differences, is_share, metric_heading

TAIL_STEPS = 20
_NONE = "–"
_MANY = 3


def label(runs: Sequence[Run], run: Run) -> str:
    """Run name behind its colour, as HTML."""
    color = PALETTE[runs.index(run)]
    return f'<span class="swatch" style="background:{color}"></span>{escape(run.name)}'


def runs_table(runs: Sequence[Run]) -> str:
    """What each run is and how far it came."""
    header = (
        "model", "layout", "batch", "steps", "samples seen", "loss", "top-1", "best evaluation", "samples / s", "MFU",
        "memory of a rank", "waiting for data", "time",
    )  # fmt: skip
    note = (
        f'<p class="muted">Loss and top-1 (image → text within the batch): mean of the last {TAIL_STEPS} steps. '
        "Samples / s: median over all steps. Time: sum of all steps in the file.</p>"
    )
    return sheet(runs, runs, zip(header, *map(_summary_cells, runs), strict=True)) + note


def _summary_cells(run: Run) -> list[str]:
    seconds = run.column("step_time_s")
    waiting = np.nansum(run.column("data_time_s")) / max(np.nansum(seconds), 1e-9)
    return [
        _model(run),
        str(run.facts.get("layout") or (run.result or {}).get("layout") or _NONE),
        _batch(run),
        f"{run.records[-1]['step'] + 1:,}",
        number(run.column("samples_seen")[-1], ",.0f"),
        number(_tail_mean(run.column("loss")), ".4f"),
        percent(_tail_mean(run.column("i2t_top1"))),
        _best_evaluation(run),
        number(_median(run.samples_per_s()), ",.1f"),
        percent(_median(run.column("mfu"))),
        _gigabytes(run.column("memory_gb")),
        percent(waiting),
        duration(float(np.nansum(seconds))),
    ]


def _gigabytes(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return f"{known.max():,.3g} GB" if len(known) else _NONE


def _model(run: Run) -> str:
    """Preset, or the vision tower's shape; with its objective where that is not contrastive."""
    config = run.config or {}
    preset, depth, width = (config.get(f"model.{key}") for key in ("preset", "vision.depth", "vision.width"))
    name = preset if preset not in (None, "null") else f"{depth} × {width}" if depth and width else ""
    parameters = run.facts.get("parameters")
    size = f"{_short(parameters)} parameters" if isinstance(parameters, int) else ""
    objective = {"contrastive": ""}.get(run.objective, run.objective)
    return ", ".join(part for part in (name, size, objective) if part) or _NONE


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _batch(run: Run) -> str:
    sizes = run.global_batch_sizes()
    known = sizes[np.isfinite(sizes)]
    if not len(known):
        return _NONE
    low, high = round(known.min()), round(known.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _best_evaluation(run: Run) -> str:
    """The highest zero-shot (else first) result between steps, or that of result.json."""
    keys = sorted((key for key in run.evaluation_keys() if is_share(key)), key=lambda key: "top1" not in key)
    if keys:
        values = run.column(keys[0])
        best = int(np.nanargmax(values)) if np.isfinite(values).any() else None
        if best is not None:
            heading = metric_heading(keys[0].removeprefix(EVALUATION_PREFIX))
            return f"{percent(values[best])} {heading}, step {run.records[best]['step'] + 1:,}"
    top1 = (run.result or {}).get("zero_shot_top1")
    return f"{percent(top1)} zero-shot top-1" if isinstance(top1, float) else _NONE


def phases_table(runs: Sequence[Run]) -> str:
    """One row a phase of each run that has phases."""
    header: tuple[str, ...] = ("run", "phase", "steps", "samples", "loss at its end", "samples / s")
    rows = [[label(runs, run), *map(escape, _phase_cells(run, phase))] for run in runs for phase in run.phases()]
    if len(runs) == 1:
        header, rows = header[1:], [row[1:] for row in rows]
    return table(header, rows) if rows else ""


def _phase_cells(run: Run, phase: Phase) -> list[str]:
    part = slice(phase.first, phase.stop)
    return [
        phase.name or "(before)",
        f"{run.records[phase.first]['step'] + 1:,} to {run.records[phase.stop - 1]['step'] + 1:,}",
        number(float(np.nansum(run.global_batch_sizes()[part])), ",.0f"),
        number(_tail_mean(run.column("loss")[part]), ".4f"),
        number(_median(run.samples_per_s()[part]), ",.1f"),
    ]


def evaluation_table(runs: Sequence[Run]) -> str:
    """The result.json of the runs that have one: a line a number."""
    evaluated = [(run, run.result) for run in runs if run.result is not None]
    if not evaluated:
        return ""
    keys = list(dict.fromkeys(key for _, result in evaluated for key in result))
    rows = []
    for key in keys:
        rows.append([metric_heading(key), *(_result_value(key, result.get(key)) for _, result in evaluated)])
        if key == "zero_shot_top1" and "chance" in keys:
            rows.append(["over chance", *(times_chance(result) for _, result in evaluated)])
    return sheet(runs, [run for run, _ in evaluated], rows)


def times_chance(result: dict[str, Any]) -> str:
    """Zero-shot accuracy as a multiple of guessing, e.g. "157 ×"."""
    top1, chance = result.get("zero_shot_top1"), result.get("chance")
    return f"{top1 / chance:,.0f} ×" if isinstance(top1, float) and chance else _NONE


def _result_value(key: str, value: Any) -> str:
    if isinstance(value, float) and is_share(key):
        return percent(value)
    if isinstance(value, int | float) and key == "seconds":
        return duration(value)
    return f"{value:.4g}" if isinstance(value, float) else _NONE if value is None else str(value)


def differences_table(runs: Sequence[Run]) -> str:
    """Settings that are not the same in all runs."""
    if len(runs) == 1:
        return ""
    missing = [run.name for run in runs if run.config is None]
    note = f'<p class="muted">No config.yaml in: {escape(", ".join(missing))}.</p>' if missing else ""
    rows = config_differences(runs)
    if not rows:
        return note or '<p class="muted">The configs are equal.</p>'
    cells = [[escape(key), *(escape(value) for value in values)] for key, values in rows]
    return table(["key", *(label(runs, run) for run in runs)], cells, css_class="text") + note


def sheet(runs: Sequence[Run], shown: Sequence[Run], lines: Iterable[Sequence[str]]) -> str:
    """A table with a column for each run of `shown` and a line for each number that one of them has; plain text."""
    rows = [[escape(cell) for cell in line] for line in lines if any(cell != _NONE for cell in line[1:])]
    look = "sheet many" if len(shown) > _MANY else "sheet"  # many columns are narrow on a small screen
    return table(["", *(label(runs, run) for run in shown)], rows, css_class=look)


def table(header: Iterable[str], rows: Iterable[Iterable[str]], *, css_class: str = "") -> str:
    """A table of ready HTML cells."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{css_class}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'


def _tail_mean(values: np.ndarray) -> float:
    known = values[-TAIL_STEPS:][np.isfinite(values[-TAIL_STEPS:])]
    return float(known.mean()) if len(known) else float("nan")


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else float("nan")


def number(value: float, spec: str) -> str:
    """A value for people; a dash for what is not known."""
    return format(value, spec) if np.isfinite(value) else _NONE


def percent(share: float) -> str:
    """A share between 0 and 1."""
    return f"{100 * share:.3g} %" if np.isfinite(share) else _NONE


def duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest_s:02d} s" if minutes else f"{seconds:.1f} s"
    )
