"""What a run cost beyond its steps: starts, work done again, rewinds, slow ranks, goodput."""

from collections.abc import Sequence

from engine.callbacks.history import Toll, toll
from tools.report.runs import Run
from tools.report.summary import duration, number, percent, sheet


def toll_table(runs: Sequence[Run]) -> str:
    """A column for each run that has a history."""
    counted = [(run, cost) for run in runs if (cost := toll(run.folder, run.records)) is not None]
    header = (
        "starts", "steps done again", "their time", "rewinds", "skipped steps", "slow ranks",
        "between starts", "goodput",
    )  # fmt: skip
    note = (
        '<p class="muted">Between starts: from the last sign of life of one start to the next. Goodput: share of the '
        "time from the first start to the last sign of life in which steps of the curve were made, each counted "
        "once.</p>"
    )
    cells = [_cells(run, cost) for run, cost in counted]
    return sheet(runs, [run for run, _ in counted], zip(header, *cells, strict=True)) + note if counted else ""


def _cells(run: Run, cost: Toll) -> list[str]:
    return [
        f"{cost.starts:,}",
        f"{cost.steps_again:,}",
        duration(cost.lost_s),
        f"{cost.rewinds:,}",
        number(run.column("skipped_steps")[-1], ",.0f"),
        ", ".join(map(str, cost.slow_ranks)) or "none",
        duration(cost.down_s),
        percent(cost.goodput),
    ]
