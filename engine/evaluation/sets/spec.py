"""What a suite asks of a set: one entry of its YAML, checked when it is read."""

import re
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from data.errors import DataError

KINDS = ("classification", "multilabel", "retrieval", "association", "video", "video_retrieval")
METRICS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_top1_top5": "mean of top-1 and top-5 (Kinetics)",
    "mean_per_class": "mean over classes of their recall",
    "macro_f1": "mean over classes of their F1",
    "macro_f1_present": "mean F1 of the classes that have a picture (WILDS)",
    "worst_group": "top-1 of the worst group",
    "worst_group_top5": "top-5 of the worst group",
    "average_precision": "mean over classes of the average precision (area)",
    "average_precision_11": "mean over classes of the 11-point average precision (VOC 2007)",
    "mean_recall": "mean of R@1, 5 and 10 both ways",
    "mean_recall_at_1": "mean of R@1 both ways",
    "jaccard": "mean Jaccard index of the chosen pictures and the right ones",
    "jaccard_10_12": "the same of questions with 10 to 12 pictures (DataComp)",
}
"""Names that `metric` may have, in words."""
_GROUPS = re.compile(r"json:.+|npy:\d+|csv:.+")
_OF_KIND = {
    "classification": (
        "top1",
        "top5",
        "mean_top1_top5",
        "mean_per_class",
        "macro_f1",
        "macro_f1_present",
        "worst_group",
        "worst_group_top5",
    ),
    "multilabel": ("average_precision", "average_precision_11"),
    "retrieval": ("mean_recall", "mean_recall_at_1"),
    "association": ("jaccard", "jaccard_10_12"),
}


@dataclass(frozen=True, kw_only=True)
class SetSpec:
    """One set of a suite."""

    name: str
    """The key in results, and the folder: ROOT/wds_NAME or ROOT/NAME."""
    title: str = ""
    """The name in tables."""
    folders: list[str] = field(default_factory=list)
    """Further folder names to look for."""
    kind: str = "classification"
    """classification | multilabel | retrieval | association | video | video_retrieval."""
    classes: int | None = None
    """Classes that the class list must have; None: any."""
    samples: list[int] = field(default_factory=list)
    """Test samples that the set may have, the reference's number first; empty: any."""
    metric: str = "top1"
    """The measure that stands for the set in tables and averages."""
    split: str = "test"
    """The part that is scored."""
    templates: list[str] = field(default_factory=list)
    """Prompts in place of the folder's; {c} stands for the class."""
    prompts: str = ""
    """The set of the package clip-benchmark whose prompts stand in where the folder has none; empty: its name."""
    groups: str = ""
    """Where the group of a sample stands for worst_group: json:FIELD of its .json, npy:COLUMN (from 0) of its .npy, or
    csv:COLUMN.
    """
    reference: dict[str, float] = field(default_factory=dict)
    """Published percentages by transform: best, squash, crop, or by frames: 1, 8, 16."""
    note: str = ""
    """What differs from the reference, for the page."""

    @property
    def scored_as(self) -> str:
        """classification, multilabel, retrieval or association."""
        return {"video": "classification", "video_retrieval": "retrieval"}.get(self.kind, self.kind)

    @property
    def is_video(self) -> bool:
        """Whether --frames counts."""
        return self.kind.startswith("video")


@dataclass(frozen=True, kw_only=True)
class Average:
    """A mean over sets, for the tables."""

    name: str
    sets: list[str]
    metric: str = ""
    """A measure of every set; empty: the set's own."""
    gap_to: str = ""
    """The robustness gap: this set's score minus the mean."""
    reference: dict[str, float] = field(default_factory=dict)
    """The published percentage, `best`; of clips by frames: 1, 8, 16."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Sets and the means over them."""

    name: str
    title: str
    source: str
    sets: list[SetSpec]
    averages: list[Average]


def builtin_suites() -> list[str]:
    """The names of the suites that come with the engine."""
    return sorted(
        entry.name[:-5] for entry in files("engine.evaluation.suites").iterdir() if entry.name.endswith(".yaml")
    )


def load_suite(name: str) -> Suite:
    """A suite by its name, or from FILE.yaml. Raises DataError for what is not understood."""
    if name in builtin_suites():
        text = (files("engine.evaluation.suites") / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(name)
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            raise DataError(
                f"--suite {name}: choose one of {', '.join(builtin_suites())}, or a file FILE.yaml that exists"
            )
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"{name} is not UTF-8: save it as UTF-8") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{name} is no YAML: {' '.join(str(error).split())}") from None
    return _suite(name, tree)


def _suite(name: str, tree: Any) -> Suite:
    if not isinstance(tree, dict) or not isinstance(tree.get("sets"), list) or not tree["sets"]:
        raise DataError(f"{name}: a suite is a mapping with a list `sets:` of {{name: …, classes: …, samples: …}}")
    unknown = set(tree) - {"title", "source", "sets", "averages"}
    if unknown:
        raise DataError(f"{name}: {sorted(unknown)[0]!r} is no part of a suite: title, source, sets, averages")
    sets = [_set_spec(name, entry) for entry in tree["sets"]]
    names = [spec.name for spec in sets]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise DataError(f"{name}: the set {twice!r} stands there twice")
    averages = [_average(name, entry, names) for entry in tree.get("averages") or []]
    return Suite(
        name=Path(name).stem,
        title=str(tree.get("title") or Path(name).stem),
        source=str(tree.get("source") or ""),
        sets=sets,
        averages=averages,
    )


def _set_spec(suite: str, entry: Any) -> SetSpec:
    entry = _mapping(suite, "set", entry, SetSpec)
    samples = entry.get("samples", [])
    entry["samples"] = [samples] if isinstance(samples, int) else list(samples or [])
    entry["reference"] = _reference(entry)
    entry.setdefault("title", entry["name"])
    spec = SetSpec(**entry)
    where = f"{suite}: set {spec.name!r}"
    if spec.kind not in KINDS:
        raise DataError(f"{where}: kind {spec.kind!r} is none of {', '.join(KINDS)}")
    if "metric" not in entry:
        spec = SetSpec(**(entry | {"metric": _OF_KIND[spec.scored_as][0]}))
    if spec.metric not in _OF_KIND[spec.scored_as]:
        raise DataError(
            f"{where}: metric {spec.metric!r} of a {spec.kind} set is none of {', '.join(_OF_KIND[spec.scored_as])}"
        )
    if any("{c}" not in template and "{}" not in template for template in spec.templates):
        raise DataError(f"{where}: every template needs {{c}} in the place of the class name")
    if spec.metric.startswith("worst_group") and not spec.groups:
        raise DataError(f"{where}: {spec.metric} needs groups: json:FIELD, npy:COLUMN or csv:COLUMN")
    if spec.groups and not _GROUPS.fullmatch(spec.groups):
        raise DataError(f"{where}: groups {spec.groups!r} is none of json:FIELD, npy:COLUMN (a number) and csv:COLUMN")
    if not all(isinstance(n, int) and n > 0 for n in [*spec.samples, spec.classes or 1]):
        raise DataError(f"{where}: classes and samples are whole numbers above 0")
    return spec


def _average(suite: str, entry: Any, names: list[str]) -> Average:
    entry = _mapping(suite, "average", entry, Average)
    chosen = names if entry.get("sets") == "all" else list(entry.get("sets") or [])
    unknown = [name for name in [*chosen, *([entry["gap_to"]] if entry.get("gap_to") else [])] if name not in names]
    if not chosen or unknown:
        raise DataError(
            f"{suite}: average {entry['name']!r} names {unknown or 'no set'}, which the suite does not have"
        )
    return Average(**(entry | {"sets": chosen, "reference": _reference(entry)}))


def _reference(entry: dict[str, Any]) -> dict[str, float]:
    published = entry.get("reference") or {}
    if isinstance(published, int | float):
        return {"best": float(published)}
    return {str(key): float(value) for key, value in published.items()}


def _mapping(suite: str, what: str, entry: Any, kind: type) -> dict[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise DataError(f"{suite}: a {what} is a mapping with a name, not {entry!r}")
    unknown = set(entry) - {f.name for f in fields(kind)}
    if unknown:
        known = ", ".join(f.name for f in fields(kind))
        raise DataError(f"{suite}: {what} {entry['name']!r} has {sorted(unknown)[0]!r}, which is none of {known}")
    return dict(entry)
