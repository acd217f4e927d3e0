"""Settings as the text that people typed: YAML files and `dotted.key=value` arguments, before any type is looked at.

YAML 1.1 makes a number of `0017`, `47_11`, `12:30` and `1e5`, a date of `2026-11-29` and a boolean of `off`. Here every
scalar stays text (a plain `null` of a file is None), and the type of the field decides (engine/config/typed.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.config.errors import ConfigError


class Argument(str):
    """The value of an override: lists, mappings and null are read out of it where the field takes them."""


class Quoted(str):
    """An entry of a list in quotes: text, even if it reads like a number."""


class _TextLoader(yaml.SafeLoader):
    """YAML whose scalars are text: only null and the merge key are told from it."""


_TextLoader.yaml_implicit_resolvers = {
    first: [r for r in resolvers if r[0] in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_TextLoader.add_constructor("tag:yaml.org,2002:merge", lambda loader, node: str(node.value))  # << that is no key


def read_text(text: str, where: str) -> Any:
    """Containers, text and None of a YAML document. Raises ConfigError that begins with `where`."""
    try:
        loader = _TextLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_repeats(node)
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}{_hint(text)}") from None


def _refuse_repeats(node: yaml.Node) -> None:
    """YAML lets the last of equal keys win; here they are a mistake."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            _refuse_repeats(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeats(value)


def read_file(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file; an empty file is an empty one. Raises ConfigError that names the file."""
    if not path.is_file():
        raise ConfigError(f"config file {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        content = path.read_bytes()
        tree = read_text(content.decode("utf-8-sig"), str(path))
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"config file {path} is not UTF-8: byte 0x{content[error.start]:02x} in line {line}; save it as UTF-8"
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        found = "a list" if isinstance(tree, list) else repr(tree)
        raise ConfigError(f"{path} must hold a mapping of settings, not {found}")
    return tree


def _hint(text: str) -> str:
    if "{" in text and ".." in text:
        return " (a brace pattern in a list or at the start of a value wants quotes: ['/data/{0..9}.tar'])"
    return ""


def split_override(text: str) -> tuple[list[str], Argument]:
    """(parts of the key, value) of `dotted.key=value`."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form dotted.key=value{_stray(text)}")
    if key.startswith(("-", "+")):
        raise ConfigError(f"override {text!r}: settings have no {key[0]} in front: {text.lstrip('+-')}")
    return key.split("."), Argument(value)


def _stray(text: str) -> str:
    if text.endswith(".tar"):
        return ": to name several shards, give a list, data.shards=[a.tar,b.tar], or a quoted pattern"
    return " (a value with spaces wants quotes)" if "=" not in text else ""


def nested(parts: Sequence[str], value: Any) -> Any:
    """{"a": {"b": value}} of ["a", "b"]."""
    for part in reversed(parts):
        value = {part: value}
    return value


def listed(text: str) -> list[str] | None:
    """Entries of `[a, {0..3}.tar, 'b, c']`; None for text that is no such list (`[v2]/*.tar` is a path).

    Commas in brackets, braces and quotes do not split, so brace patterns need no quotes of their own.
    """
    text = text.strip()
    if not text.startswith("["):
        return None
    entries, start, open_brackets, quote = [], 1, "", ""
    for at, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and not text[start:at].strip():
            quote = character
        elif character in "[{":
            open_brackets += character
        elif character in "]}" and open_brackets[-1:] == {"]": "[", "}": "{"}[character]:
            open_brackets = open_brackets[:-1]
            if not open_brackets:
                entries.append(text[start:at])
                return [_unquoted(entry) for entry in _without_last_comma(entries)] if at == len(text) - 1 else None
        elif character == "," and open_brackets == "[":
            entries.append(text[start:at])
            start = at + 1
    return None


def _without_last_comma(entries: list[str]) -> list[str]:
    return entries if entries[-1].strip() else entries[:-1]


def _unquoted(entry: str) -> str:
    entry = entry.strip()
    if len(entry) > 1 and entry[0] == entry[-1] and entry[0] in "\"'":
        return Quoted(entry[1:-1])
    return entry
