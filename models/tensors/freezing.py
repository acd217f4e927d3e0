"""Which tensors of a model are not trained, by patterns over their logical names, and how much of a tower lies below
everything that is. No torch: config checks, the program of a step and the planner ask here.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

_RANGE = re.compile(r"(\d+)-(\d+)")
_BLOCK = re.compile(r"(?:vision|text)\.blocks\.(\d+)\.")
_FRONT = ("vision.embed.", "text.token_embedding", "text.pos_embed")


def frozen_names(patterns: Sequence[str], names: Collection[str]) -> frozenset[str]:
    """The names that a pattern matches: `*` and `?` as in file names, `0-20` a range of block numbers."""
    found = [re.compile(_regex(pattern)) for pattern in patterns]
    return frozenset(name for name in names if any(regex.fullmatch(name) for regex in found))


def idle_pattern(patterns: Sequence[str], names: Collection[str]) -> str | None:
    """The first pattern, or end of its range, that no name matches; None where each has its own."""
    for pattern in patterns:
        ends = (".".join(_end_of(part, end) for part in pattern.split(".")) for end in (1, 2))
        if not all(frozen_names([one], names) for one in (pattern, *ends)):
            return pattern
    return None


def nearest(pattern: str, names: Collection[str]) -> list[str]:
    """What was meant by a pattern that matches nothing: whole folders of names, then single ones; at most three."""
    folders = {f"{name.rsplit('.', depth)[0]}.*" for name in names for depth in range(1, name.count(".") + 1)}
    if f"{pattern}.*" in folders:
        return [f"{pattern}.*"]
    return get_close_matches(pattern, sorted(folders), n=2, cutoff=0.5) + get_close_matches(
        pattern, sorted(names), n=1, cutoff=0.5
    )


def layer_of(name: str, depth: int) -> int:
    """Place of a tensor in its tower of `depth` blocks: 0 in front of them, k + 1 block k, depth + 1 behind them."""
    block = _BLOCK.match(name)
    if block is not None:
        return int(block[1]) + 1
    return 0 if name.startswith(_FRONT) else depth + 1


def lowest_trained(tower: str, depth: int, trained: Iterable[str]) -> int:
    """The lowest place (`layer_of`) of a tower, vision or text, with something to train; depth + 2 where nothing is."""
    return min((layer_of(name, depth) for name in trained if name.startswith(f"{tower}.")), default=depth + 2)


def _regex(pattern: str) -> str:
    return r"\.".join(_part_regex(part) for part in pattern.split("."))


def _part_regex(part: str) -> str:
    match = _RANGE.fullmatch(part)
    if match is None:
        return re.escape(part).replace(r"\*", ".*").replace(r"\?", ".")
    return f"(?:{'|'.join(map(str, range(int(match[1]), int(match[2]) + 1))) or '(?!)'})"


def _end_of(part: str, end: int) -> str:
    match = _RANGE.fullmatch(part)
    return part if match is None else match[end]
