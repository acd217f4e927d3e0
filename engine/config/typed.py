"""Typed settings from text: the field decides what a text means, and a key that no field has is refused.

`typed` turns a tree of containers and text into one of values (partial: only what was given), `built` a whole tree into
dataclasses. A list of one may be given as its only entry; a model as the name of its preset.
"""

import math
import re
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, NewType, TypeVar, Union, get_args, get_origin, get_type_hints

from engine.config.errors import ConfigError
from engine.config.text import Argument, Quoted, listed, read_text
from models.config import ModelConfig

T = TypeVar("T")
Unbounded = NewType("Unbounded", float)
"""A number that may be infinite."""

_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][+-]?\d+)?", re.ASCII)
_REFERENCE = re.compile(r"\$\{\w")
_NULL = ("", "~", "null", "Null", "NULL")
_TRUE, _FALSE = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")
_MOST_DIGITS = 18
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def typed(value: Any, kind: Any, key: str) -> Any:
    """A value of the kind (a field's type) out of what was given for `key`. Raises ConfigError that names the key."""
    if get_origin(kind) in (Union, types.UnionType):
        return _typed_choice(value, kind, key)
    if is_dataclass(kind):
        return _typed_section(value, kind, key)
    if get_origin(kind) is list:
        return _typed_list(value, get_args(kind)[0], key)
    if get_origin(kind) is dict:
        inner = get_args(kind)[1]
        mapping = _mapping(value, key, "a mapping")
        return {str(name): typed(item, inner, f"{key}.{name}") for name, item in mapping.items()}
    if kind is Any:
        return value
    return _SCALARS[kind](value, key)


def kinds_of(section: type) -> dict[str, Any]:
    """Field -> what may be given for it; its metadata "given" says more than its annotation."""
    hints = _hints_of(section)
    return {field.name: field.metadata.get("given", hints[field.name]) for field in fields(section)}


@cache
def _hints_of(section: type) -> Mapping[str, Any]:
    """Field -> its annotation, evaluated once a class: a config asks for it a hundred times."""
    return types.MappingProxyType(get_type_hints(section))


def built(section: type[T], tree: Mapping[str, Any]) -> T:
    """The dataclass of a tree of typed values; what is missing has its default."""
    hints = _hints_of(section)  # type: ignore[arg-type]
    return section(**{name: _built(kind, tree[name]) for name, kind in hints.items() if name in tree})


def merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """One tree in which later ones win, mapping by mapping. The trees stay as they are."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                old = result.get(key)
                value = merged(old, value) if isinstance(old, Mapping) else merged(value)
            result[key] = value
    return result


def _built(kind: Any, value: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        kind = next((choice for choice in get_args(kind) if is_dataclass(choice)), kind)
    if is_dataclass(kind) and isinstance(value, Mapping):
        return built(kind, value)  # type: ignore[arg-type]
    if get_origin(kind) is list and isinstance(value, list):
        return [_built(get_args(kind)[0], entry) for entry in value]
    return merged(value) if isinstance(value, Mapping) else value


def _typed_choice(value: Any, kind: Any, key: str) -> Any:
    choices = [choice for choice in get_args(kind) if choice is not types.NoneType]
    if len(choices) < len(get_args(kind)) and (value is None or (isinstance(value, Argument) and value in _NULL)):
        return None
    if len(choices) == 1:
        return typed(value, choices[0], key)
    lists = [choice for choice in choices if get_origin(choice) is list]
    is_list = isinstance(value, list) or (isinstance(value, Argument) and listed(value) is not None)
    return typed(value, lists[0] if is_list else next(c for c in choices if c not in lists), key)


def _typed_section(value: Any, section: Any, key: str) -> dict[str, Any]:
    if section is ModelConfig and isinstance(value, str) and not _opens(value, "{"):
        return {"preset": str(value)}
    kinds = kinds_of(section)
    first = next(iter(kinds))
    what = f"a section with keys of its own, such as {_joined(key, first)}=…"
    if key == "evaluate":
        what += "; evaluate.every_steps=0 switches it off"
    what = "a preset's name or a mapping" if section is ModelConfig else what
    tree = _mapping(value, key, what)
    for name in tree:
        if name not in kinds:
            raise ConfigError(_unknown(_joined(key, name), name, kinds, key))
    return {name: typed(item, kinds[name], _joined(key, name)) for name, item in tree.items()}


def _typed_list(value: Any, kind: Any, key: str) -> list[Any]:
    if isinstance(value, Argument):
        if is_dataclass(kind):
            value = read_text(value, key) if _opens(value, "[") else str(value)
        else:
            entries = listed(value)
            value = [str(value)] if entries is None else entries
    if value is None:
        raise ConfigError(f"{key} is null: it takes a list; leave it out for its default, or give []")
    if is_dataclass(kind) and not isinstance(value, list):
        raise ConfigError(f"{key} is {value!r}: it takes a list of mappings")
    entries = list(value) if isinstance(value, list | tuple) else [value]
    return [typed(entry, kind, f"{key}[{number}]") for number, entry in enumerate(entries)]


def _mapping(value: Any, key: str, what: str) -> Mapping[Any, Any]:
    if isinstance(value, Argument) and _opens(value, "{"):
        value = read_text(value, key)
    if value is None:  # a section whose keys are all commented out
        return {}
    if not isinstance(value, Mapping):
        given = str(value) if isinstance(value, str) else value
        raise ConfigError(f"{key or 'the config'} is {given!r}: it takes {what}")
    return value


def _opens(text: str, bracket: str) -> bool:
    return text.lstrip().startswith(bracket)


def _text(value: Any, key: str) -> str:
    if isinstance(value, str):
        if _REFERENCE.search(value):
            raise ConfigError(
                f"{key} is {str(value)!r}: nothing replaces ${{…}} in a setting, write what it stands for"
            )
        return str(value)
    if value is None:
        raise ConfigError(f"{key} is null: it takes text; leave it out for its default, or quote the word")
    if isinstance(value, Path) or type(value) is int:
        return str(value)
    raise _wrong(value, str, key)


def _boolean(value: Any, key: str) -> bool:
    text = str(value).strip().lower() if isinstance(value, str | int) else ""
    if text not in (*_TRUE, *_FALSE):
        raise _wrong(value, bool, key)
    return text in _TRUE


def _whole(value: Any, key: str) -> int:
    number = _decimal(value, int, key)
    if number != number.to_integral_value() or number.adjusted() > _MOST_DIGITS:
        raise _wrong(value, int, key)
    return int(number)


def _real(value: Any, key: str) -> float:
    number = float(_decimal(value, float, key))
    if math.isinf(number):
        raise _wrong(value, float, key)
    return number


def _unbounded(value: Any, key: str) -> float:
    text = str(value).strip().lower()
    return math.inf if text in ("inf", ".inf", "+inf", "infinity") else _real(value, key)


def _decimal(value: Any, kind: type, key: str) -> Decimal:
    """Exact value of a finite number, or of text that is one."""
    text = repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str) or isinstance(text, Quoted) or not _NUMBER.fullmatch(text.strip()):
        raise _wrong(value, kind, key)
    return Decimal(text.strip())


_SCALARS = {str: _text, bool: _boolean, int: _whole, float: _real, Unbounded: _unbounded}


def _wrong(value: Any, kind: type, key: str) -> ConfigError:
    given = str(value) if isinstance(value, str) else value
    nothing = " (write null for none)" if given == "None" else ""
    return ConfigError(f"{key} is {'null' if value is None else repr(given)}: it takes {_WORDS[kind]}{nothing}")


def _unknown(path: str, name: str, kinds: Mapping[str, Any], section: str) -> str:
    from engine.config.help.names import hint  # it knows the schema, which is made of this

    return f"{path} is not a setting{hint(path)}; {section or 'a config'} has {', '.join(kinds)}"


def _joined(section: str, name: str) -> str:
    return f"{section}.{name}" if section else str(name)
