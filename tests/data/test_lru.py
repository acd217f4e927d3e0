"""The least recently used value goes first, and is closed."""

from data.shards.lru import Lru


def test_the_least_recently_used_goes_first() -> None:
    made: list[int] = []
    discarded: list[int] = []

    def make(key: int) -> int:
        made.append(key)
        return -key

    store: Lru[int, int] = Lru(2, make, discarded.append)
    assert [store[key] for key in (1, 2, 1, 3, 1, 2)] == [-1, -2, -1, -3, -1, -2]
    assert made == [1, 2, 3, 2]
    assert discarded == [-2, -3]
    assert len(store) == 2
