"""The global order of several weighted sources: still one integer position.

A position falls to a source, and within the source to its next place; both follow from (position, weights,
switches) by integer arithmetic, without replaying what came before. So a mixture resumes as a single source
does, at any layout.

The law: of the first n turns, source 0 takes floor(n w0 / W); of the turns that are left, source 1 takes its
share in the same way, and so on. Counts are exact at every multiple of the weights' smallest integer sum and
off by less than the number of sources in between. A turn is one sample (`within_batch`) or one global batch
(`one_per_batch`). A source that is used up starts its next epoch, in another order; the others are not
touched by that. A switch of weights goes on where each source stands.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import gcd, lcm

import numpy as np

from data.errors import DataError
from data.order.order import SampleOrder


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers in the proportion of the weights, read as decimals: (1.6, 0.4) -> (4, 1)."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return tuple(weight // gcd(*whole) for weight in whole)


def shares(turns: np.ndarray, weights: Sequence[int]) -> list[np.ndarray]:
    """How many of the first `turns` turns fall to each source. turns: object [n] of Python ints (a position
    times a weight may pass 64 bits).
    """
    left, total, taken = turns, sum(weights), []
    for weight in weights:
        share = left * weight // total if total else left * 0
        taken.append(share)
        left, total = left - share, total - weight
    return taken


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Weights from one position on."""

    start: int
    """First position under these weights."""
    weights: tuple[int, ...]
    """One a source."""


class MixtureLaw:
    """Positions to (source, place within the source's own endless stream)."""

    def __init__(self, switches: Sequence[Switch], *, turn_samples: int) -> None:
        """turn_samples: 1, or the global batch size where a batch comes from one source. Raises DataError for
        a switch within a batch.
        """
        for switch in switches:
            if switch.start % turn_samples:
                raise DataError(
                    f"data.mixture_schedule switches at {switch.start} samples, within a global batch of "
                    f"{turn_samples} that data.mix=one_per_batch takes from one source: use a multiple of it"
                )
        self._switches = switches
        self._starts = [switch.start for switch in switches]
        self._turn = turn_samples
        self._used = [(0,) * len(switches[0].weights)]
        for earlier, later in pairwise(switches):
            gained = self._gained(earlier, np.array([later.start], dtype=object))
            self._used.append(tuple(int(n) + int(g[0]) for n, g in zip(self._used[-1], gained, strict=True)))

    def _gained(self, switch: Switch, positions: np.ndarray) -> list[np.ndarray]:
        """Samples of each source between the switch and positions at the border of a turn."""
        return [taken * self._turn for taken in shares((positions - switch.start) // self._turn, switch.weights)]

    def place(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """positions int64 [n] -> (source int64 [n], place int64 [n])."""
        sources, places = np.empty(len(positions), dtype=np.int64), np.empty(len(positions), dtype=np.int64)
        phases = np.searchsorted(self._starts, positions, side="right") - 1
        for phase in np.unique(phases).tolist():
            rows = phases == phase
            sources[rows], places[rows] = self._place_in(phase, positions[rows].astype(object))
        return sources, places

    def _place_in(self, phase: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        switch = self._switches[phase]
        turn_start = positions - positions % self._turn
        before = np.stack(self._gained(switch, turn_start), axis=-1)
        after = np.stack(self._gained(switch, turn_start + self._turn), axis=-1)
        source = np.argmax(after > before, axis=-1)
        place = np.take_along_axis(before, source[:, None], axis=-1)[:, 0] + positions % self._turn
        return source, place.astype(np.int64) + np.array(self._used[phase], dtype=np.int64)[source]

    def most_in_a_row(self, samples: int) -> list[int]:
        """The most samples of each source among `samples` positions from a switch on (one turn: a whole turn)."""
        if self._turn > 1:
            return [
                samples * any(switch.weights[source] for switch in self._switches) for source in range(self._sources)
            ]
        gained = [self._gained(switch, np.array([switch.start + samples], dtype=object)) for switch in self._switches]
        return [max(int(of_switch[source][0]) for of_switch in gained) for source in range(self._sources)]

    @property
    def _sources(self) -> int:
        return len(self._switches[0].weights)

    def counts(self, position: int) -> list[int]:
        """Samples of each source among the positions below `position`."""
        phase = bisect_right(self._starts, position) - 1
        border = position - position % self._turn
        gained = [int(g[0]) for g in self._gained(self._switches[phase], np.array([border], dtype=object))]
        counts = [used + gain for used, gain in zip(self._used[phase], gained, strict=True)]
        if position > border:
            source, _ = self.place(np.array([border], dtype=np.int64))
            counts[int(source[0])] += position - border
        return counts


class Mixture:
    """SampleOrders of the sources under one law; a single source is the mixture of one."""

    def __init__(
        self, law: MixtureLaw, orders: Sequence[SampleOrder], first_shards: Sequence[int], first_position: int = 0
    ) -> None:
        """first_shards: id of each source's first shard in the joint list of shards. first_position: where in the run
        this order begins (a phase of training begins its own).
        """
        self._law = law
        self._orders = orders
        self._first_shards = first_shards
        self._first_position = first_position

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """positions int64 [n] (>= first_position, any order) -> (shard ids int64 [n], sample ids within the shard
        int64 [n]).
        """
        sources, places = self._law.place(np.asarray(positions, dtype=np.int64) - self._first_position)
        shard_ids, sample_ids = np.empty_like(places), np.empty_like(places)
        for source in np.unique(sources).tolist():
            rows = sources == source
            shard_ids[rows], sample_ids[rows] = self._locate_in(source, places[rows])
        return shard_ids, sample_ids

    def following(self, position: int, count: int) -> list[tuple[int, int]]:
        """(shard, sample) of the `count` samples that follow the one of `position` in its own source: a bad
        sample is replaced by the next of its kind, so replacements do not shift the proportions.
        """
        sources, places = self._law.place(np.array([position - self._first_position], dtype=np.int64))
        shards, samples = self._locate_in(int(sources[0]), places[0] + np.arange(1, count + 1))
        return list(zip(shards.tolist(), samples.tolist(), strict=True))

    def most_in_a_row(self, samples: int) -> list[int]:
        """The most samples that each source gives to `samples` positions in a row."""
        return self._law.most_in_a_row(samples)

    def total_of(self, position: int) -> int:
        """Samples of one epoch of the position's own source."""
        sources, _ = self._law.place(np.array([position - self._first_position], dtype=np.int64))
        return self.totals[int(sources[0])]

    def _locate_in(self, source: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards, samples = self._orders[source].locate(places)
        return shards + self._first_shards[source], samples

    @property
    def totals(self) -> list[int]:
        """Samples of one epoch of each source."""
        return [order.total for order in self._orders]

    def counts(self, position: int) -> list[int]:
        """Samples of each source among the positions below `position`; divided by `totals`: its epochs."""
        return self._law.counts(position - self._first_position)
