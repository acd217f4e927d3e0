"""Which tensors a load takes: strict by default, exceptions only by pattern, and printed."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from engine.checkpoint.format.errors import CheckpointError, listed

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Exceptions:
    """Patterns (shell style: `vision.head.*`) of logical names that a load may treat differently."""

    skip: list[str] = field(default_factory=list)
    """Tensors of the checkpoint that are left where they are."""
    reinit: list[str] = field(default_factory=list)
    """Tensors of the model that keep their fresh values, whether the checkpoint has them or not."""


@dataclass(frozen=True)
class Match:
    """The outcome: every tensor of both sides is in exactly one list, or the load is refused."""

    load: list[str]
    reinit: list[str]
    skip: list[str]

    def lines(self) -> list[str]:
        """For people: what is not simply loaded."""
        out = [f"loaded {len(self.load)} tensors"]
        if self.reinit:
            out.append(f"fresh values for {len(self.reinit)} tensors:{listed(self.reinit)}")
        if self.skip:
            out.append(f"left in the checkpoint, {len(self.skip)} tensors:{listed(self.skip)}")
        return out


@dataclass(frozen=True)
class Differences:
    """What keeps a state dict from being loaded, in torch's words; sorted names."""

    missing: list[str]
    """Names that are wanted and not offered."""
    unexpected: list[str]
    """Names that are offered and not wanted."""
    mismatched: list[str]
    """Names of both sides with different shapes."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)


def compare(wanted: Shapes, offered: Shapes) -> Differences:
    """Compare two state dicts by name and shape."""
    both = wanted.keys() & offered.keys()
    return Differences(
        missing=sorted(wanted.keys() - offered.keys()),
        unexpected=sorted(offered.keys() - wanted.keys()),
        mismatched=sorted(name for name in both if tuple(wanted[name]) != tuple(offered[name])),
    )


def match(stored: Shapes, wanted: Shapes, exceptions: Exceptions, source: str, keys: str = "checkpoint") -> Match:
    """Compare by name and shape.

    keys: the config section whose `skip` and `reinit` the messages name. Raises CheckpointError that lists missing,
    unexpected and mismatched tensors, and one for a pattern that matches nothing.
    """
    _refuse_idle_patterns(exceptions.skip, stored, f"{keys}.skip", source)
    _refuse_idle_patterns(exceptions.reinit, wanted, f"{keys}.reinit", "the model")
    skip = [name for name in stored if matches(name, exceptions.skip)]
    reinit = [name for name in wanted if matches(name, exceptions.reinit)]
    aside = set(skip) | set(reinit)
    needed = {name: shape for name, shape in wanted.items() if name not in set(reinit)}
    found = compare(needed, {name: shape for name, shape in stored.items() if name not in aside})
    if found:
        raise CheckpointError(_refusal(source, keys, found, [_shapes(n, stored, needed) for n in found.mismatched]))
    return Match(load=list(needed), reinit=reinit, skip=skip)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns (shell style) is the name's."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_idle_patterns(patterns: list[str], names: Shapes, key: str, where: str) -> None:
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        example = next(iter(names), "nothing")
        raise CheckpointError(f"{key} {idle} matches no tensor of {where} (names look like {example})")


def _shapes(name: str, offered: Shapes, needed: Shapes) -> str:
    return f"{name}: stored {list(offered[name])}, wanted {list(needed[name])}"


def _refusal(source: str, keys: str, found: Differences, shapes: list[str]) -> str:
    parts = [f"{source} does not fit the model:"]
    afresh = f"name them in {keys}.reinit to start them afresh"
    lists = (
        ("missing", found.missing, afresh),
        ("unexpected", found.unexpected, f"name them in {keys}.skip to leave them out"),
        ("mismatched", shapes, afresh),
    )
    parts += [f"  {what}, {len(names)} ({cure}):{listed(names)}" for what, names, cure in lists if names]
    return "\n".join(parts)
