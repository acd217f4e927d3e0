"""Every setting with its text, type and default, read from the dataclasses themselves."""

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from engine.config.errors import ConfigError
from engine.config.help.names import hint
from engine.config.schema import Config, PhaseConfig
from models.config import ModelConfig

_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a config."""

    key: str
    """The dotted key; entries of a list have [] in it."""
    takes: str
    """What may be given, in words."""
    default: str
    """The default as it would be written."""
    text: str
    """What it means."""

    def __str__(self) -> str:
        text = textwrap.fill(self.text, 100, initial_indent="  ", subsequent_indent="  ")
        return f"{self.key} ({self.takes}; default {self.default})\n{text}"


@cache
def settings() -> dict[str, Setting]:
    """Dotted key -> setting, in the order of the sections."""
    return {setting.key: setting for setting in _settings(Config, "")}


def sections() -> dict[str, str]:
    """Section -> what it holds; those that lie in others come after them."""
    found = {name: kind for name, kind in get_type_hints(Config).items() if dataclasses.is_dataclass(kind)}
    return {name: _first_sentence(kind.__doc__) for name, kind in found.items()} | {
        "phases[]": _first_sentence(PhaseConfig.__doc__)
    }


def explain(key: str) -> str:
    """A setting's text, or the settings of a section. Raises ConfigError for neither, with what may be meant."""
    known = settings()
    if key in known:
        return str(known[key])
    below = [setting for name, setting in known.items() if name.startswith((f"{key}.", f"{key}[]."))]
    if not below:
        raise ConfigError(f"{key} is not a setting or a section{hint(key)}")
    return "\n".join(map(str, below))


def as_markdown() -> str:
    """The page docs/settings.md."""
    lines = [
        "# Every setting",
        "",
        "Written by `python -m engine.train --settings` from the dataclasses; a test compares. How values are written:",
        "`docs/config.md`. One setting on the terminal: `python -m engine.train --explain train.keep_activations`.",
    ]
    section = None
    for setting in settings().values():
        above = setting.key.rpartition(".")[0]
        if above != section:
            section = above
            head = ["| setting | takes | default | meaning |", "| --- | --- | --- | --- |"]
            lines += ["", f"## {above or 'The job'}", "", *head]
        cells = (f"`{setting.key}`", setting.takes, f"`{setting.default}`", setting.text)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _settings(section: type, above: str) -> Iterator[Setting]:
    hints, texts = get_type_hints(section), _texts(section)
    inner: list[tuple[type, str]] = []
    for field in dataclasses.fields(section):
        kind, key = hints[field.name], f"{above}{field.name}"
        part = _part_of(kind)
        if part is not None and field.name != "teacher_model":
            inner.append((part, f"{key}{'[]' if get_origin(kind) is list else ''}."))
            continue
        yield Setting(
            key=key,
            takes=_takes(field.metadata.get("given", kind)),
            default=_default(field),
            text=texts.get(field.name, ""),
        )
    for part, prefix in inner:
        yield from _settings(part, prefix)


def _part_of(kind: Any) -> Any:
    """The dataclass of a section or of a list's entries."""
    entry = get_args(kind)[0] if get_origin(kind) is list else kind
    return entry if dataclasses.is_dataclass(entry) else None


def _takes(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join("null" if choice is types.NoneType else _takes(choice) for choice in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {_takes(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"mapping of names to {_takes(get_args(kind)[1])}"
    if kind is ModelConfig:
        return "model (a preset, or a mapping)"
    if dataclasses.is_dataclass(kind):
        return "mapping"
    return _WORDS.get(kind, "number, or inf")


def _default(field: Any) -> str:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) or "(empty)"


def _texts(section: type) -> dict[str, str]:
    """Field -> the docstring under it."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())
