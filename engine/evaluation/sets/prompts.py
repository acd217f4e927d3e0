"""Class names and prompts of a set: its folder's files, or those of the package clip-benchmark where they lack.

No prompt is part of this repository. The package's files are read without importing it, which would want torchvision.
"""

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from data.errors import DataError
from engine.evaluation.sets.spec import SetSpec
from engine.evaluation.text_files import read_lines

NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
_PACKAGE = "clip_benchmark"
_ADVICE = "pip install --no-deps clip-benchmark brings those of many sets"


def class_names(folder: Path, spec: SetSpec, of_layout: list[str]) -> tuple[list[str], str]:
    """(names by label, a remark on where they come from). of_layout: what the layout itself says; may be empty."""
    path = folder / NAMES
    if not path.is_file():
        if of_layout:
            return of_layout, ""
        if packaged := _packaged("en_classnames.json", spec):
            return packaged, f"Class names: {_source()}."
    return read_lines(path, f"the class names in the order of their labels ({_ADVICE})", numbered=True), ""


def templates(folder: Path, spec: SetSpec) -> tuple[list[str], str]:
    """(prompts with {c} in the place of the name, a remark on where they come from)."""
    if spec.templates:
        return [template.replace("{}", "{c}") for template in spec.templates], ""
    path = folder / TEMPLATES
    if not path.is_file() and (packaged := _packaged("en_zeroshot_classification_templates.json", spec)):
        return packaged, f"Prompts: {_source()}."
    lines = read_lines(
        path, f"prompts with {{c}} in the place of the class name (or `templates:` in the suite; {_ADVICE})"
    )
    without = [line for line in lines if "{c}" not in line]
    if without:
        raise DataError(f"{path}: {without[0]!r} has no {{c}} in the place of the class name")
    return lines, ""


def _packaged(name: str, spec: SetSpec) -> list[str]:
    """What the package's file says of the set; empty without package, file or set."""
    found = find_spec(_PACKAGE)
    places = list(found.submodule_search_locations or []) if found is not None else []
    for path in (Path(place) / "datasets" / name for place in places):
        if path.is_file():
            tree = json.loads(path.read_text(encoding="utf-8"))
            listed = tree.get(spec.prompts or spec.name)
            return [str(entry) for entry in listed] if isinstance(listed, list) else []
    return []


def _source() -> str:
    return f"clip-benchmark {version('clip-benchmark')}"
