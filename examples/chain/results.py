"""What came out of a chain: result.json, the table, and the page of all its runs."""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.callbacks.metrics import METRICS_FILE, read_metrics

TOP1 = "eval_zero_shot_top1"
TAIL_STEPS = 20
"""Steps whose mean is the student's loss."""

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Where the parts of a finished chain lie."""

    out: Path
    teacher: Path
    student: Path
    strong: dict[int, Path]
    """Seed -> run of the bigger CLIP from the student; the first went through all phases."""
    scratch: dict[int, Path]
    """Seed -> the same without the student."""
    longer: Path | None
    """From scratch, and with the student's samples as further pairs; first seed. None: not run."""
    compared_phase: str
    """Phase at whose end the arms are compared."""
    clips_before: Path
    """Scores of the first seed on held-out clips before the video phase."""
    clips_after: Path


def report(chain: Chain) -> None:
    """Write result.json and report.html, print the table."""
    result = collect(chain)
    path = chain.out / "result.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    runs = [chain.teacher, chain.student, *_first(chain.strong), *_first(chain.scratch)]
    runs += [] if chain.longer is None else [chain.longer]
    page = chain.out / "report.html"
    subprocess.run([sys.executable, "-m", "tools.report", *map(str, runs), "--out", str(page)], check=True)
    Console(width=110).print(_table(result))
    print(f"{path}\n{page}")


def collect(chain: Chain) -> dict[str, Any]:
    """All numbers; accuracies are shares."""
    strong, scratch = (_compared(runs, chain.compared_phase) for runs in (chain.strong, chain.scratch))
    margins = [strong[seed] - scratch[seed] for seed in strong]
    first = next(iter(chain.strong.values()))
    teacher, student = _records(chain.teacher), _records(chain.student)
    longer = {} if chain.longer is None else {"from_scratch_longer": _summary(_records(chain.longer))}
    clips = {
        when: {key: scores[key] for key in ("zero_shot_top1", "recall_at_5", "chance")}
        for when, path in (("before_video", chain.clips_before), ("after_video", chain.clips_after))
        for scores in [json.loads(path.read_text(encoding="utf-8"))]
    }
    return {
        "chance": teacher[-1]["eval_chance"],
        "teacher": _summary(teacher),
        "student": {"loss": statistics.mean(r["loss"] for r in student[-TAIL_STEPS:]), **_cost(student)},
        "compared_after": chain.compared_phase,
        "weak_to_strong": strong,
        "from_scratch": scratch,
        "compared_samples": _end_of(_records(first), chain.compared_phase)["samples_seen"],
        "margin": {"mean": statistics.mean(margins), "lowest": min(margins), "highest": max(margins)},
        **longer,
        "phases": {name: _end_of(_records(first), name)[TOP1] for name in _phases(first)},
        "clips": clips,
    }


def _first(runs: dict[int, Path]) -> list[Path]:
    return list(runs.values())[:1]


def _records(run: Path) -> list[Record]:
    return read_metrics(run / METRICS_FILE)


def _phases(run: Path) -> Iterable[str]:
    return dict.fromkeys(record["phase"] for record in _records(run))


def _compared(runs: dict[int, Path], phase: str) -> dict[int, float]:
    return {seed: _end_of(_records(run), phase)[TOP1] for seed, run in runs.items()}


def _end_of(records: list[Record], phase: str) -> Record:
    return [record for record in records if record["phase"] == phase][-1]


def _summary(records: list[Record]) -> Record:
    return {"zero_shot_top1": records[-1][TOP1], **_cost(records)}


def _cost(records: list[Record]) -> Record:
    return {"samples": records[-1]["samples_seen"], "seconds": round(sum(r["step_time_s"] for r in records), 1)}


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"Zero-shot top-1 on held-out pictures (chance {_percent(result['chance'])})")
    for column in ("stage", "samples", "result"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    compared, student = f"{result['compared_samples']:,}", result["student"]
    rows = [
        ("teacher: small CLIP", f"{result['teacher']['samples']:,}", _percent(result["teacher"]["zero_shot_top1"])),
        ("student: mean cosine to the teacher's features", f"{student['samples']:,}", f"{-student['loss']:.3f}"),
        ("bigger CLIP, weak to strong", compared, _over_seeds(result["weak_to_strong"])),
        ("bigger CLIP, from scratch", compared, _over_seeds(result["from_scratch"])),
        ("  margin (points)", "", _margin(result["margin"])),
        *_longer_row(result),
        *((f"weak to strong, after phase {name}", "", _percent(top1)) for name, top1 in result["phases"].items()),
    ]
    clips = result["clips"]
    rows += [
        (f"clips ({_percent(clips[when]['chance'])} chance), {when.replace('_', ' ')}", "",
         _percent(clips[when]["zero_shot_top1"]))
        for when in clips
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    return table


def _longer_row(result: Record) -> list[tuple[str, str, str]]:
    longer = result.get("from_scratch_longer")
    if longer is None:
        return []
    return [
        ("  from scratch, with the student's samples", f"{longer['samples']:,}", _percent(longer["zero_shot_top1"]))
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _over_seeds(scores: dict[int, float]) -> str:
    each = ", ".join(f"{100 * score:.1f}" for score in scores.values())
    return f"{each} %" if len(scores) == 1 else f"{_percent(statistics.mean(scores.values()))} ({each})"


def _margin(margin: dict[str, float]) -> str:
    return f"{100 * margin['mean']:+.1f} (from {100 * margin['lowest']:+.1f} to {100 * margin['highest']:+.1f})"
