"""What a suite found: rows, means, the published numbers beside them; as JSON, CSV and Markdown."""

import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.evaluation.sets.spec import METRICS, Average, SetSpec, Suite
from engine.evaluation.text_files import write_whole

_PROBE = re.compile(r"probe_\w+_top1")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The measures of a set under one transform and number of frames."""

    name: str
    transform: str
    """squash or crop."""
    frames: int
    measures: dict[str, float]
    """Shares (0..1) and counts."""
    samples: int
    left_out: int
    """Samples that could not be read."""
    reasons: dict[str, int] = field(default_factory=dict)
    remark: str = ""

    def as_json(self) -> dict[str, Any]:
        """Flat, for results.json."""
        return {
            "name": self.name,
            "transform": self.transform,
            "frames": self.frames,
            "samples": self.samples,
            "left_out": self.left_out,
            "reasons": self.reasons,
            "remark": self.remark,
            **self.measures,
        }


@dataclass(kw_only=True)
class Results:
    """Everything that is written about one checkpoint."""

    suite: Suite
    about: dict[str, Any]
    """The checkpoint, the layout, the settings."""
    rows: list[Row]
    missing: dict[str, str]
    """Sets that were not scored, and why."""

    def best(self, spec: SetSpec, frames: int = 0) -> Row | None:
        """The row that stands for a set: squash for retrieval, else the better transform, as the paper's tables do.

        frames: of clips; 0: the fewest that were run.
        """
        rows = [row for row in self.rows if row.name == spec.name]
        frames = frames or min((row.frames for row in rows), default=1)
        rows = [row for row in rows if row.frames == frames or not spec.is_video]
        if spec.scored_as == "retrieval":
            rows = [row for row in rows if row.transform == "squash"] or rows
        return max(rows, key=lambda row: row.measures[spec.metric], default=None)

    def chosen(self) -> list[tuple[SetSpec, Row]]:
        """Every set that has a row, with the one that stands for it."""
        pairs = [(spec, self.best(spec)) for spec in self.suite.sets]
        return [(spec, row) for spec, row in pairs if row is not None]

    def average(self, average: Average, frames: int = 0) -> float | None:
        """Mean in 0..1; None where a set of it has no row. frames: as in `best`."""
        specs = {spec.name: spec for spec in self.suite.sets}
        scores = []
        for name in average.sets:
            row = self.best(specs[name], frames)
            if row is None:
                return None
            scores.append(row.measures[average.metric or specs[name].metric])
        mean = sum(scores) / len(scores)
        if not average.gap_to:
            return mean
        base = self.best(specs[average.gap_to], frames)
        return None if base is None else base.measures[average.metric or specs[average.gap_to].metric] - mean

    def set_table(self) -> list[dict[str, Any]]:
        """One entry a row, the best of each set first marked; numbers in percent beside the reference's."""
        table = []
        for spec in self.suite.sets:
            for row in (row for row in self.rows if row.name == spec.name):
                chosen = self.best(spec, row.frames)
                score = 100 * row.measures[spec.metric]
                reference = _reference(spec, row, row is chosen)
                table.append(
                    {
                        "set": spec.title,
                        "transform": row.transform,
                        "frames": row.frames,
                        "best": row is chosen,
                        "metric": METRICS[spec.metric],
                        "score": score,
                        "reference": reference,
                        "difference": None if reference is None else score - reference,
                        "chance": 100 * row.measures["chance"],
                        "samples": row.samples,
                        "left_out": row.left_out,
                        "remark": row.remark,
                        "probes": {k: 100 * v for k, v in row.measures.items() if _PROBE.fullmatch(k)},
                    }
                )
        return table

    def average_table(self) -> list[dict[str, Any]]:
        """Means in percent beside the reference's; those over clips once for every number of frames that was run."""
        table = []
        for average in self.suite.averages:
            for frames in self._frames_of(average):
                value = self.average(average, frames)
                score = None if value is None else 100 * value
                reference = average.reference.get(str(frames) if frames else "best")
                known = reference is not None and score is not None
                table.append(
                    {
                        "name": average.name + (f", {frames} frame{'s' if frames > 1 else ''}" if frames else ""),
                        "sets": len(average.sets),
                        "score": score,
                        "reference": reference,
                        "difference": score - reference if known else None,  # type: ignore[operator]
                    }
                )
        return table

    def _frames_of(self, average: Average) -> list[int]:
        """Numbers of frames that clips of the mean were run with; 0 alone for pictures."""
        clips = {spec.name for spec in self.suite.sets if spec.is_video and spec.name in average.sets}
        return sorted({row.frames for row in self.rows if row.name in clips}) or ([1] if clips else [0])

    def write(self, out: Path) -> None:
        """results.json, results.csv and results.md."""
        tree = self.about | {
            "suite": self.suite.name,
            "sets": [row.as_json() for row in self.rows],
            "best": self.set_table(),
            "averages": self.average_table(),
            "missing": self.missing,
        }
        write_whole(out / "results.json", json.dumps(tree, indent=1, ensure_ascii=False))
        write_whole(out / "results.csv", self._csv())
        write_whole(out / "results.md", self._markdown())

    def _csv(self) -> str:
        rows = [row.as_json() | {"reasons": json.dumps(row.reasons)} for row in self.rows]
        columns = list(dict.fromkeys(key for row in rows for key in row)) or ["name"]
        stream = io.StringIO()
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue()

    def _markdown(self) -> str:
        lines = [f"# {self.suite.title}", "", *[f"* {key}: {value}" for key, value in self.about.items()], ""]
        lines += ["| set | transform | frames | measure | % | reference | difference | chance | samples | left out |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
        for entry in self.set_table():
            name = f"**{entry['set']}**" if entry["best"] else entry["set"]
            numbers = [f"{entry['score']:.2f}", *(_number(entry[key]) for key in ("reference", "difference", "chance"))]
            counts = [f"{entry['samples']:,}", f"{entry['left_out']:,}"]
            cells = [name, entry["transform"], entry["frames"], entry["metric"], *numbers, *counts]
            lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
        for entry in self.set_table():
            for name, score in entry["probes"].items():
                told = f"{entry['set']} ({entry['transform']})"
                lines.append(f"| {told} | | | {name.replace('_', ' ')} | {score:.2f} | | | | | |")
        lines += ["", "| mean | sets | % | reference | difference |", "| --- | --- | --- | --- | --- |"]
        for entry in self.average_table():
            numbers = [_number(entry[key]) for key in ("score", "reference", "difference")]
            lines.append(f"| {entry['name']} | {entry['sets']} | {' | '.join(numbers)} |")
        lines += ["", *[f"* not scored: {name}: {why}" for name, why in self.missing.items()], ""]
        return "\n".join(lines)


def _reference(spec: SetSpec, row: Row, is_best: bool) -> float | None:
    keys = [str(row.frames) if spec.is_video else row.transform, *(["best"] if is_best else [])]
    return next((spec.reference[key] for key in keys if key in spec.reference), None)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
