"""What the folder of a set holds, listed and checked before any picture is decoded.

Layouts: engine/evaluation/sets/layouts.py; class names and prompts: engine/evaluation/sets/prompts.py.
"""

from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from engine.evaluation.sets.layouts import Part, list_part
from engine.evaluation.sets.prompts import class_names, templates
from engine.evaluation.sets.spec import SetSpec


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A set that is there and in order."""

    spec: SetSpec
    folder: str
    classes: list[str]
    """Class names by label; names may repeat."""
    templates: list[str]
    """Prompts; {c} stands for the name."""
    test: Part
    train: Part | None
    remark: str = ""
    """What differs from the reference."""


def find_folder(root: Path, spec: SetSpec) -> Path | None:
    """The set's folder under `root`."""
    names = [spec.name, *spec.folders]
    # DataComp's download script appends _test to the names of CLIP-benchmark's folders.
    for candidate in (root / form for name in names for form in (f"wds_{name}", f"wds_{name}_test", name)):
        if candidate.is_dir():
            return candidate
    return None


def list_set(root: Path, spec: SetSpec, *, train: bool, any_size: bool) -> Listing | None:
    """None if the folder is not there. Raises DataError for one that is not what the suite asks for.

    train: list the part that probes are fitted on, too. any_size: other numbers of samples are a remark, no error.
    """
    folder = find_folder(root, spec)
    if folder is None:
        return None
    test = list_part(folder, spec, spec.split)
    if test is None:
        raise DataError(f"{folder}: no {spec.split}/*.tar, no folders of classes and no {spec.split}.csv in it")
    classes, prompts, remarks = _words(folder, spec, test)
    _check_labels(folder, test, len(classes))
    _check_metric(folder, spec, test, len(classes))
    remarks.insert(0, _check_sizes(folder, spec, test, classes, any_size))
    fitted = list_part(folder, spec, "train") if train else None
    if fitted is not None:
        if fitted.names != test.names:
            raise DataError(f"{folder}: train and {spec.split} hold different classes: write classnames.txt, in order")
        _check_labels(folder, fitted, len(classes))
    return Listing(
        spec=spec,
        folder=str(folder),
        classes=classes,
        templates=prompts,
        test=test,
        train=fitted,
        remark=" ".join(filter(None, remarks)),
    )


def _words(folder: Path, spec: SetSpec, test: Part) -> tuple[list[str], list[str], list[str]]:
    """(class names, prompts, remarks); empty for sets without classes."""
    if spec.scored_as not in ("classification", "multilabel"):
        return [], [], []
    names, of_names = class_names(folder, spec, test.names)
    prompts, of_prompts = templates(folder, spec)
    return names, prompts, [of_names, of_prompts]


def _check_metric(folder: Path, spec: SetSpec, test: Part, classes: int) -> None:
    """What the set's own measure needs of its samples."""
    if spec.metric.startswith("worst_group") and not test.groups:
        raise DataError(f"{folder}: {spec.metric} needs the group of every sample, there is no {spec.groups} here")
    if spec.metric == "jaccard_10_12" and not any(10 <= len(q.candidates) <= 12 for q in test.questions):
        raise DataError(f"{folder}: no question has 10 to 12 pictures, which {spec.metric} is about")
    if "top5" in spec.metric and classes <= 5:
        raise DataError(f"{folder}: {spec.metric} of {classes} classes says nothing: all are among the first five")


def _check_labels(folder: Path, part: Part, classes: int) -> None:
    if part.labels is None:
        return
    if part.labels.ndim == 2:
        if part.labels.shape[1] != classes:
            raise DataError(f"{folder}: the .npy labels have {part.labels.shape[1]} columns for {classes} classes")
        return
    if len(part.labels) and not 0 <= int(part.labels.min()) <= int(part.labels.max()) < classes:
        span = f"{int(part.labels.min())} to {int(part.labels.max())}"
        raise DataError(
            f"{folder}: the labels go from {span}, but classnames.txt has {classes} names (0 to {classes - 1})"
        )


def _check_sizes(folder: Path, spec: SetSpec, test: Part, classes: list[str], any_size: bool) -> str:
    if spec.classes is not None and classes and len(classes) != spec.classes:
        raise DataError(f"{folder}: {len(classes)} classes, the suite asks for {spec.classes}: complete the class list")
    if not spec.samples or test.size == spec.samples[0]:
        return spec.note
    wanted = " or ".join(f"{n:,}" for n in spec.samples)
    if test.size in spec.samples:
        return f"{test.size:,} samples where the reference has {spec.samples[0]:,}. {spec.note}".strip()
    if any_size:
        return f"{test.size:,} samples, not {wanted}. {spec.note}".strip()
    raise DataError(
        f"{folder}: {test.size:,} samples, the suite asks for {wanted}: complete the set, or say --any-size"
    )
