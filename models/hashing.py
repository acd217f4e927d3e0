"""A hash that is computed once: caches ask for it at every look-up, and a config has fifty fields."""

from dataclasses import fields


class HashedOnce:
    """Base of a frozen dataclass, which says `__hash__ = HashedOnce.__hash__`: dataclasses write one of their own else.

    The hash lies in a slot, so that `vars()` of a config are its fields. It does not travel to other processes, where
    the same words have other hashes.
    """

    __slots__ = ("_hash",)
    _hash: int

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            values = tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
            object.__setattr__(self, "_hash", hash(values))
            return self._hash

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__
