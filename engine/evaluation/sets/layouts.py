"""The layouts in which sets lie on disk, each listed as a part: samples, labels, captions, groups.

Three layouts are read as they are:

* CLIP-benchmark's: `classnames.txt`, `zeroshot_classification_templates.txt`, `test/0.tar …` with `test/nshards.txt`;
* a folder a class: `[test/]CLASS/picture.jpg`, with `labels.csv` (id,name) where folders are named by ids;
* a list: `test.csv` with a header, `path,label`, `path,caption` or `video_id,sentence`, paths from the set's folder;
  of associations (engine/evaluation/sets/associations.py) `cue,candidates,associations`.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.errors import DataError
from engine.evaluation.sets.associations import Question, list_questions
from engine.evaluation.sets.labels import read_members
from engine.evaluation.sets.spec import SetSpec
from engine.evaluation.text_files import caption_lines, read_lines

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_SPLITS = ("val", "validation", "valid", "test", "train")
"""Folders that are parts of a set, never classes."""
CLIPS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One split of a set; plain data, so that one rank can list and tell the others."""

    shards: list[str] = field(default_factory=list)
    """Tar files; or else:"""
    paths: list[str] = field(default_factory=list)
    """Files of pictures or clips, in order."""
    count: int
    """Samples."""
    labels: np.ndarray | None = None
    """int64 [count], or uint8 [count, classes] of a multi-label set."""
    captions: list[list[str]] = field(default_factory=list)
    """Captions of every sample, for retrieval."""
    groups: list[str] = field(default_factory=list)
    """The group of every sample, where the metric needs it."""
    names: list[str] = field(default_factory=list)
    """Class names that the layout itself gives, by label."""
    questions: list[Question] = field(default_factory=list)
    """Cues with the pictures to choose among, of a set of associations."""

    @property
    def size(self) -> int:
        """What a set counts: its questions where it has some, else its samples."""
        return len(self.questions) or self.count


def list_part(folder: Path, spec: SetSpec, split: str) -> Part | None:
    """The part of a set in whichever layout it lies; None if there is none. Raises DataError."""
    if spec.scored_as == "association":
        return _of_questions(folder, spec, split)
    place = folder / split
    if place.is_dir() and any(place.glob("*.tar")):
        return _of_tars(place, spec)
    if (folder / f"{split}.csv").is_file():
        return _of_list(folder, folder / f"{split}.csv", spec)
    for base in (place, *([folder] if split == spec.split and not place.is_dir() else [])):
        if base.is_dir() and (part := _of_folders(folder, base, spec)) is not None:
            return part
    return None


def _of_tars(place: Path, spec: SetSpec) -> Part:
    shards = sorted(place.glob("*.tar"), key=lambda path: (len(path.stem), path.stem))
    counted = place / "nshards.txt"
    if counted.is_file():
        text = read_lines(counted, "the number of shards")[0]
        wanted = int(text) if text.isdecimal() else 0
        missing = [f"{n}.tar" for n in range(wanted) if not (place / f"{n}.tar").is_file()]
        if missing or len(shards) != wanted:
            lacks = f"{missing[0]} is missing" if missing else f"there are {len(shards)}"
            raise DataError(f"{place}: nshards.txt says {text} shards, but {lacks}: complete the download")
    members = read_members([str(shard) for shard in shards], spec)
    return Part(
        shards=[str(shard) for shard in shards],
        count=members.count,
        labels=members.labels,
        captions=members.captions,
        groups=members.groups,
    )


def _of_folders(folder: Path, base: Path, spec: SetSpec) -> Part | None:
    if spec.scored_as != "classification":
        return None
    if base == folder and (split := next((name for name in _SPLITS if (folder / name).is_dir()), None)):
        raise DataError(f"{folder} has no {spec.split}/, but {split}/: rename it, or say `split: {split}` in the suite")
    suffixes = CLIPS if spec.is_video else PICTURES
    found = [
        (child.name, sorted(path for path in child.rglob("*") if path.suffix.lower() in suffixes))
        for child in sorted(base.iterdir())
        if child.is_dir()
    ]
    found = [(name, paths) for name, paths in found if paths]
    if not found:
        return None
    ids, names = _names_of_folders(folder, [name for name, _ in found])
    unknown = [name for name, _ in found if name not in ids]
    if unknown:
        raise DataError(f"{base / unknown[0]}: neither labels.csv nor classnames.txt has that class")
    paths = [str(path) for _, of_class in found for path in of_class]
    labels = [ids[name] for name, of_class in found for _ in of_class]
    return Part(paths=paths, count=len(paths), labels=np.array(labels, dtype=np.int64), names=names)


def _names_of_folders(folder: Path, present: list[str]) -> tuple[dict[str, int], list[str]]:
    """(label by folder name, class name by label)."""
    table = folder / "labels.csv"
    if table.is_file():
        rows = list(rows_of(table, ("id", "name")))
        names = [row["name"] for row in rows]
        by_id = {row["id"]: number for number, row in enumerate(rows)}
        return {name: number for number, name in enumerate(names)} | by_id, names
    if (folder / "classnames.txt").is_file():
        names = read_lines(folder / "classnames.txt", "class names")
        forms = [{name, name.replace(" ", "_"), str(number)} for number, name in enumerate(names)]
        ids: dict[str, int] = {}
        for number, of_name in enumerate(forms):
            for form in of_name:
                ids.setdefault(form, number)
        return ids, names
    return {name: number for number, name in enumerate(present)}, [name.replace("_", " ") for name in present]


def _of_list(folder: Path, table: Path, spec: SetSpec) -> Part:
    key = "video_id" if spec.kind == "video_retrieval" else "path"
    value = {"video_retrieval": "sentence", "retrieval": "caption"}.get(spec.kind, "label")
    group = spec.groups.removeprefix("csv:") if spec.groups.startswith("csv:") else ""
    captions: dict[str, list[str]] = {}
    labels: list[str] = []
    groups: list[str] = []
    for row in rows_of(table, (key, value, *([group] if group else []))):
        if spec.scored_as == "retrieval":
            captions.setdefault(row[key], []).extend(caption_lines(row[value]))
        else:
            captions.setdefault(row[key], [])
            labels.append(row[value])
            groups += [row[group]] if group else []
    if spec.scored_as != "retrieval" and len(labels) != len(captions):
        raise DataError(f"{table}: {len(labels)} rows name {len(captions)} files: give each file once")
    paths = [_file_of(folder, table, name, spec) for name in captions]
    if spec.scored_as == "retrieval":
        return Part(paths=paths, count=len(paths), captions=list(captions.values()))
    numbers, names = _numbers_of_labels(folder, table, labels)
    return Part(paths=paths, count=len(paths), labels=np.array(numbers, dtype=np.int64), groups=groups, names=names)


def _numbers_of_labels(folder: Path, table: Path, labels: list[str]) -> tuple[list[int], list[str]]:
    if labels and all(label.isdecimal() for label in labels):
        return [int(label) for label in labels], []
    path = folder / "classnames.txt"
    names = read_lines(path, "class names") if path.is_file() else sorted(set(labels))
    number = {name: at for at, name in reversed(list(enumerate(names)))}
    unknown = [label for label in labels if label not in number]
    if unknown:
        raise DataError(f"{table}: the label {unknown[0]!r} is no line of {path}")
    return [number[label] for label in labels], names


def _file_of(folder: Path, table: Path, name: str, spec: SetSpec) -> str:
    suffixes = ("", *CLIPS) if spec.is_video else ("",)
    bases = (folder, folder / "videos", folder / spec.split) if spec.is_video else (folder, folder / spec.split)
    for candidate in (base / f"{name}{suffix}" for base in bases for suffix in suffixes):
        if candidate.is_file():
            return str(candidate)
    raise DataError(f"{table}: {name!r} is no file in {folder}: give paths from that folder")


def rows_of(table: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The columns asked for of every row. Raises DataError."""
    lines = read_lines(table, f"a header {','.join(columns)} and rows")
    reader = csv.DictReader(io.StringIO("\n".join(lines)))
    missing = [column for column in columns if column not in (reader.fieldnames or [])]
    if missing:
        raise DataError(f"{table}: the header has no column {missing[0]!r}: it needs {','.join(columns)}")
    for number, row in enumerate(reader, start=2):
        if any(row[column] is None for column in columns):
            raise DataError(f"{table}: row {number} has too few columns")
        yield {column: row[column].strip() for column in columns}


def _of_questions(folder: Path, spec: SetSpec, split: str) -> Part | None:
    tables = (folder / f"{split}.csv", *([folder / "winogavil_dataset.csv"] if split == spec.split else []))
    table = next((path for path in tables if path.is_file()), None)
    if table is None:
        return None
    paths, questions = list_questions(folder, table, PICTURES, rows_of(table, ("cue", "candidates", "associations")))
    return Part(paths=paths, count=len(paths), questions=questions)
