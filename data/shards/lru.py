"""A small least-recently-used store whose entries may need closing (indices, permutations, open files)."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """At most `capacity` values, each made by `make(key)` at first use; `discard(value)` runs on eviction."""

    def __init__(self, capacity: int, make: Callable[[K], V], discard: Callable[[V], None] | None = None) -> None:
        self._capacity = capacity
        self._make = make
        self._discard = discard
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, key: K) -> V:
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = self._make(key)
        if len(self._values) > self._capacity:
            _, evicted = self._values.popitem(last=False)
            if self._discard is not None:
                self._discard(evicted)
        return value
