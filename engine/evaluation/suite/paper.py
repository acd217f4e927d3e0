"""The published tables of arXiv 2402.04252 as data, and a run's means beside those of the paper's models."""

from importlib.resources import files
from typing import Any

import yaml

from engine.evaluation.suite.results import Results

_MEANS = {
    "27 image sets": ("2", "{}", "average"),
    "Mean recall, Flickr30K and COCO": ("3", "{}", "mean_recall"),
    "4 video sets, 1 frame": ("5", "{}, 1 frame", "average"),
    "ImageNet variants and ObjectNet": ("6a", "{}", "average"),
    "Robustness gap to ImageNet-1K": ("6a", "{}", "gap"),
}
"""A mean of the suite `paper` -> table, how it names its rows, and column."""
_PROBE = "ImageNet-1K, linear probe"


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
    probed = [row.measures.get("probe_linear_top1") for row in results.rows if row.name == "imagenet1k"]
    best = max((100 * share for share in probed if share is not None), default=None)
    rows: list[list[str | float | None]] = [["model", *_MEANS, _PROBE]]
    rows.append(["this run", *(ours.get(name) for name in _MEANS), best])
    for model in reversed(published["2"]["rows"]):
        found = [published[table]["rows"].get(form.format(model), {}) for table, form, _ in _MEANS.values()]
        columns = [column for _, _, column in _MEANS.values()]
        linear = published["7"]["rows"].get(model, {}).get("imagenet1k")
        rows.append([model, *(row.get(column) for row, column in zip(found, columns, strict=True)), linear])
    return rows
