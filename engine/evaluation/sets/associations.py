"""Sets of associations: which of several pictures go with a cue (WinoGAViL, arXiv 2207.12576).

Read as its authors publish them: a table `cue,candidates,associations` whose last two columns are JSON lists of picture
names, and the pictures in `images/`. The Jaccard index of a question is that of the k pictures that score highest with
the pictures that are right, k being their number (DataComp's eval_utils/wino_eval.py, the cue as "A cue" or "An cue").
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError


@dataclass(frozen=True)
class Question:
    """A cue and the pictures to choose among."""

    cue: str
    candidates: list[int]
    """Rows of the pictures."""
    right: list[int]
    """Rows of those that go with the cue."""

    @property
    def prompt(self) -> str:
        """What the text tower reads."""
        cue = self.cue.lower()
        return f"{'An' if cue[0] in 'aeiou' else 'A'} {cue}"


def list_questions(
    folder: Path, table: Path, endings: tuple[str, ...], rows: Iterable[dict[str, str]]
) -> tuple[list[str], list[Question]]:
    """(files of the different pictures, questions). Raises DataError for a row that is no question."""
    files: dict[str, str] = {}
    number: dict[str, int] = {}
    questions = []
    for at, row in enumerate(rows, start=2):
        where = f"{table}: row {at}"
        candidates, right = (_names(where, column, row[column]) for column in ("candidates", "associations"))
        strangers = [name for name in right if name not in candidates]
        if not row["cue"] or not right or strangers or len(right) == len(candidates):
            wanted = "it needs a cue, and some of the candidates but not all"
            why = f"{strangers[0]!r} is no candidate" if strangers else wanted
            raise DataError(f"{where} ({row['cue']!r}) is no question: {why}")
        for name in candidates:
            if name not in files:
                files[name] = _file_of(folder, where, name, endings)
                number[name] = len(number)
        questions.append(Question(row["cue"], [number[n] for n in candidates], [number[n] for n in right]))
    if not questions:
        raise DataError(f"{table} has no row below its header")
    return list(files.values()), questions


def _names(where: str, column: str, cell: str) -> list[str]:
    try:
        names = json.loads(cell)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise DataError(f"{where}: {column} is no JSON list of different names: {cell[:40]!r}")
    return names


def _file_of(folder: Path, where: str, name: str, endings: tuple[str, ...]) -> str:
    for base in (folder / "images", folder):
        for ending in ("", *endings):
            if (base / f"{name}{ending}").is_file():
                return str(base / f"{name}{ending}")
    raise DataError(f"{where}: the picture {name!r} is not in {folder / 'images'}")
