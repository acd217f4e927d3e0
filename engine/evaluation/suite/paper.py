"""The published tables of arXiv 2402.04252 as data, and a run's means beside those of the paper's models."""

from importlib.resources import files
from typing import Any

import yaml

from engine.evaluation.suite.results import Results

_MEANS = {
    "27 image sets": ("2", "{}", "average"),
    "Mean recall, Flickr30K and COCO": ("3", "{}", "mean_recall"),
    "4 video sets, 1 frame": ("5", "{}, 1 frame", "average"),
    "Robustness gap to ImageNet-1K": ("6a", "{}", "gap"),
}
"""A mean of the suite `paper` -> table, how it names its rows, and column."""


def tables() -> dict[str, Any]:
    """Table number -> title and rows: {model: {set: percent}}."""
    text = (files("engine.evaluation") / "paper_tables.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)["tables"]


def beside_the_papers_models(results: Results) -> list[list[str | float | None]]:
    """Rows for a table: what a column is, then this run and every model of the paper; empty for another suite."""
    if results.suite.name != "paper":
        return []
    published = tables()
    ours = {average["name"]: average["score"] for average in results.average_table()}
    rows: list[list[str | float | None]] = [["model", *_MEANS], ["this run", *(ours[name] for name in _MEANS)]]
    for model in reversed(published["2"]["rows"]):
        found = [published[table]["rows"].get(form.format(model), {}) for table, form, _ in _MEANS.values()]
        columns = [column for _, _, column in _MEANS.values()]
        rows.append([model, *(row.get(column) for row, column in zip(found, columns, strict=True))])
    return rows
