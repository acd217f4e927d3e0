"""Several sources under one position: exact proportions, exact switches, and nothing to replay."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig, MixtureSwitch, SourceConfig
from data.errors import DataError
from data.order.mixture import MixtureLaw, Switch, integer_weights, shares
from data.reader import SampleReader
from data.shards.write import write_shard
from data.sources import Sources
from tests.data.shard_factory import good_sample, make_shards


def _law(*phases: tuple[int, tuple[int, ...]], turn: int = 1) -> MixtureLaw:
    return MixtureLaw([Switch(start=start, weights=weights) for start, weights in phases], turn_samples=turn)


def test_weights_are_read_as_decimals() -> None:
    assert integer_weights([1.6, 0.4]) == (4, 1)
    assert integer_weights([0.1, 0.2, 0.0]) == (1, 2, 0)
    assert integer_weights([1_613_482_231, 412_345_678]) == (1_613_482_231, 412_345_678)


@pytest.mark.parametrize("weights", [(4, 1), (1, 1, 1), (80, 20, 1), (0, 3, 5), (2,), (7, 0, 5, 11, 13)])
def test_every_turn_falls_to_one_source_and_the_counts_are_exact(weights: tuple[int, ...]) -> None:
    total, turns = sum(weights), np.arange(3 * sum(weights) + 1, dtype=object)
    counts = np.stack(shares(turns, weights), axis=1).astype(np.int64)
    steps = np.diff(counts, axis=0)
    assert set(np.unique(steps).tolist()) <= {0, 1} and (steps.sum(axis=1) == 1).all()
    assert counts[::total].tolist() == [[period * weight for weight in weights] for period in range(4)]
    exact = np.arange(len(counts))[:, None] * np.array(weights) / total
    assert np.abs(counts - exact).max() < len(weights)


def test_large_weights_at_late_positions_do_not_overflow() -> None:
    law = _law((0, (1_613_482_231, 412_345_678)))
    counts = law.counts(6_000_000_000)
    assert sum(counts) == 6_000_000_000
    assert abs(counts[0] / 6e9 - 1_613_482_231 / 2_025_827_909) < 1e-9
    (source,), (place,) = law.place(np.array([6_000_000_000]))
    assert place == counts[source]


LAWS = {
    "one phase": _law((0, (4, 1))),
    "switches": _law((0, (4, 1, 0)), (37, (1, 1, 2)), (60, (0, 0, 1))),
    "one source a batch": _law((0, (2, 1)), (24, (1, 3)), turn=8),
}


@pytest.mark.parametrize("name", LAWS)
def test_places_of_a_source_follow_each_other_without_gaps(name: str) -> None:
    law, positions = LAWS[name], np.arange(200)
    sources, places = law.place(positions)
    for source in np.unique(sources):
        assert places[sources == source].tolist() == list(range((sources == source).sum()))
    for position in range(0, 200, 7):
        seen = Counter(sources[:position].tolist())
        assert law.counts(position) == [seen[source] for source in range(len(law.counts(0)))]


def test_positions_may_come_in_any_order_and_split() -> None:
    law, positions = LAWS["switches"], np.random.default_rng(0).permutation(150)
    sources, places = law.place(np.arange(150))
    for part in np.array_split(positions, 11):
        found_sources, found_places = law.place(part)
        assert found_sources.tolist() == sources[part].tolist() and found_places.tolist() == places[part].tolist()


def test_a_switch_holds_from_its_position_on() -> None:
    sources, _ = LAWS["switches"].place(np.arange(100))
    assert set(sources[:37].tolist()) == {0, 1} and set(sources[37:60].tolist()) == {0, 1, 2}
    assert set(sources[60:].tolist()) == {2}


def test_one_source_a_batch() -> None:
    sources, _ = LAWS["one source a batch"].place(np.arange(80))
    batches = sources.reshape(10, 8)
    assert (batches == batches[:, :1]).all()
    assert Counter(batches[:3, 0].tolist()) == {0: 2, 1: 1} and Counter(batches[3:7, 0].tolist()) == {0: 1, 1: 3}
    with pytest.raises(DataError, match="switches at 30 samples, within a global batch of 8"):
        _law((0, (1, 1)), (30, (1, 0)), turn=8)


# --- through the reader ------------------------------------------------------------------------------------------


def _named(folder: Path, name: str, count: int) -> SourceConfig:
    samples = [(f"{name}{number}", good_sample(number)[1]) for number in range(count)]
    path = str(folder / f"{name}.tar")
    write_shard(path, samples)
    return SourceConfig(name=name, shards=[path])


def _reader(config: DataConfig, batch: int = 10) -> SampleReader:
    return SampleReader(
        config, image_size=8, context_length=8, seed=0, train=True, global_batch_size=batch, evaluation="squash"
    )


@pytest.fixture
def sources(tmp_path: Path) -> list[SourceConfig]:
    return [
        replace(_named(tmp_path, name, count), weight=weight)
        for name, count, weight in (("laion", 30, 1.6), ("coyo", 6, 0.4), ("video", 4, 0.0))
    ]


def _of(keys: list[str]) -> Counter[str]:
    return Counter(key.rstrip("0123456789") for key in keys)


def test_batches_hold_the_sources_in_proportion(sources: list[SourceConfig]) -> None:
    schedule = [MixtureSwitch(at_samples=40, weights={"laion": 1, "video": 1})]
    reader = _reader(DataConfig(sources=sources, mixture_schedule=schedule))
    keys = reader.read(np.arange(80)).keys
    assert [_of(keys[first:last]) for first, last in pairwise([0, 10, 20, 40, 60])] == [
        {"laion": 8, "coyo": 2},
        {"laion": 8, "coyo": 2},
        {"laion": 16, "coyo": 4},
        {"laion": 10, "video": 10},
    ]
    assert reader.sources.counts(60) == {"laion": 42, "coyo": 8, "video": 10}


def test_a_used_up_source_starts_its_next_epoch_in_another_order(sources: list[SourceConfig]) -> None:
    reader = _reader(DataConfig(sources=sources))
    coyo = [key for key in reader.read(np.arange(90)).keys if key.startswith("coyo")]
    first, second, third = coyo[:6], coyo[6:12], coyo[12:18]
    assert sorted(first) == sorted(second) == sorted(third)
    assert first != second != third
    assert reader.sources.epochs_begun(0, 30) == []
    assert reader.sources.epochs_begun(30, 40) == [
        "source laion starts epoch 2 of its 30 samples",
        "source coyo starts epoch 2 of its 6 samples",
    ]
    steps = [reader.sources.epochs_begun(first, last) for first, last in pairwise(range(0, 91, 10))]
    assert sum("coyo" in line for lines in steps for line in lines) == 2  # once a border


def test_a_bad_sample_is_replaced_by_the_next_of_its_source(tmp_path: Path, sources: list[SourceConfig]) -> None:
    bad = ("coyo0", {"png": b"", "txt": b"words"})
    write_shard(sources[1].shards[0], [bad, *((f"coyo{number}", good_sample(number)[1]) for number in (1, 2))])
    whole = _reader(DataConfig(sources=sources, mix="one_per_batch", shuffle=False)).read(np.arange(50))
    assert [_of(whole.keys[first : first + 10]) for first in (0, 10)] == [{"coyo": 10}, {"laion": 10}]
    assert "coyo0" not in whole.keys and {sample.key for sample in whole.bad} == {"coyo0"}


def test_equal_shards_in_two_sources_are_not_walked_in_step(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [40])
    twins = [SourceConfig(name=name, shards=shards) for name in ("a", "b")]
    keys = _reader(DataConfig(sources=twins)).read(np.arange(80)).keys
    assert keys[::2] != keys[1::2] and sorted(keys[::2]) == sorted(keys[1::2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mix": "shaken"}, "data.mix is 'shaken'"),
        ({"shards": ["x.tar"]}, "both set"),
        ({"sources": [SourceConfig(name="a", shards=["x"])] * 2}, "name of its own"),
        ({"sources": [SourceConfig(name="a")]}, "'a' has no shards"),
        ({"sources": [SourceConfig(name="a", shards=["x"], weight=0)]}, "one must be above 0"),
        ({"mixture_schedule": [MixtureSwitch(at_samples=10, weights={"cc": 1})]}, r"names \['cc'\]"),
        ({"mixture_schedule": [MixtureSwitch(at_samples=0, weights={"coyo": 1})]}, "must rise"),
        ({"sources": [], "shards": ["x"], "mixture_schedule": [MixtureSwitch(at_samples=9)]}, "needs data.sources"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(sources: list[SourceConfig], change: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        DataConfig(**({"sources": sources} | change)).check()


def test_a_source_smaller_than_its_part_of_a_batch_is_named(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [6, 3])
    plain = Sources(DataConfig(shards=shards), seed=0, train=True, global_batch_size=10)
    assert plain.copies_within(9) == []
    (line,) = plain.copies_within(10)
    assert line.startswith("data.shards has 9 samples, but a global batch takes 10 of it")
    two = [SourceConfig(name=name, shards=[shard]) for name, shard in zip(("a", "b"), shards, strict=True)]
    mixed = Sources(DataConfig(sources=two), seed=0, train=True, global_batch_size=8)
    assert mixed.copies_within(6) == []
    (line,) = mixed.copies_within(8)
    assert line.startswith("source b has 3 samples, but a global batch takes 4 of it")
    whole = Sources(DataConfig(sources=two, mix="one_per_batch"), seed=0, train=True, global_batch_size=4)
    assert [text.split()[1] for text in whole.copies_within(4)] == ["b"]
