"""The fingerprint of the data: what it sees, what it rightly ignores, and how it says so."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig, MixtureSwitch, SourceConfig
from data.fingerprint import differences, fingerprint
from data.shards.write import write_shard
from data.sources import Sources
from tests.data.shard_factory import good_sample, make_shards

Change = Callable[[Path, DataConfig], DataConfig]


def _print_of(config: DataConfig, seed: int = 0, batch: int = 4) -> dict[str, Any]:
    sources = Sources(config, seed=seed, train=True, global_batch_size=batch)
    made = fingerprint(config, sources, seed=seed, global_batch_size=batch)
    return json.loads(json.dumps(made))  # as it comes out of a checkpoint


def _swap_files(first: str, second: str) -> None:
    os.rename(first, first + ".aside")
    os.rename(second, first)
    os.rename(first + ".aside", second)


def _rewrite(path: str, edit: Callable[[int, dict[str, bytes]], None], numbers: range) -> None:
    samples = [good_sample(number) for number in numbers]
    for number, (_, members) in zip(numbers, samples, strict=True):
        edit(number, members)
    write_shard(path, samples)


def _add(folder: Path, config: DataConfig) -> DataConfig:
    write_shard(str(folder / "00003.tar"), [good_sample(100)])
    return replace(config, shards=[str(folder)])


def _swap(folder: Path, config: DataConfig) -> DataConfig:
    _swap_files(str(folder / "00001.tar"), str(folder / "00002.tar"))
    return config


def _permute_captions(folder: Path, config: DataConfig) -> DataConfig:
    def caption_of_another(number: int, members: dict[str, bytes]) -> None:
        members["txt"] = f"picture number {4 if number == 5 else 5}".encode()  # the same lengths

    _rewrite(str(folder / "00001.tar"), caption_of_another, range(4, 6))
    return config


def _other_metadata(folder: Path, config: DataConfig) -> DataConfig:
    _rewrite(str(folder / "00001.tar"), lambda _, members: members.update(json=b"[]"), range(4, 6))
    return config


def _fewer_samples(folder: Path, config: DataConfig) -> DataConfig:
    write_shard(str(folder / "00000.tar"), [good_sample(number) for number in range(3)])
    return config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_add, "3 shards with 8 samples were, 4 with 9 are"),
        (lambda folder, config: replace(config, shards=config.shards[::-1]), "another order of shards 0 to 2"),
        (_swap, "other keys, captions or picture sizes in shards 1 to 2"),
        (_permute_captions, "other keys, captions or picture sizes in shard 1 of the list"),
        (_other_metadata, "other keys, captions or picture sizes in shard 1 of the list"),
        (_fewer_samples, "other sample counts in shard 0 of the list (8 samples were, 7 are)"),
        (lambda folder, config: replace(config, shuffle=False), "data.shuffle: True was, False is"),
        (lambda folder, config: replace(config, shuffle_group_shards=2), "data.shuffle_group_shards: 64 was, 2 is"),
        (lambda folder, config: replace(config, scaled_decode=1.5), "data.scaled_decode: 0.0 was, 1.5 is"),
    ],
)
def test_what_changes_the_order_is_named(tmp_path: Path, change: Change, words: str) -> None:
    config = DataConfig(shards=make_shards(tmp_path, [4, 2, 2]))
    before = _print_of(config)
    assert differences(before, _print_of(config), position=8) == []
    lines = differences(before, _print_of(change(tmp_path, config)), position=8)
    assert words in "\n".join(lines)


def test_a_checkpoint_from_before_scaled_decoding_decoded_in_full(tmp_path: Path) -> None:
    config = DataConfig(shards=make_shards(tmp_path, [2]))
    before = {name: value for name, value in _print_of(config).items() if name != "scaled_decode"}
    assert differences(before, _print_of(config), position=8) == []
    (line,) = differences(before, _print_of(replace(config, scaled_decode=2.0)), position=8)
    assert line == "data.scaled_decode: 0.0 was, 2.0 is"


def test_other_rows_of_features_are_other_data_and_pixels_in_their_place_are_not(tmp_path: Path) -> None:
    shards = [str(path) for path in make_shards(tmp_path, [4])]
    config = DataConfig(shards=shards, features=str(tmp_path / "rows.npz"))
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)

    def written(rows: np.ndarray) -> dict[str, Any]:
        np.savez(config.features, image_embeddings=rows, image_valid=np.ones(4, dtype=bool))
        return _print_of(config)

    was = written(rows)
    assert differences(was, written(rows), position=0) == []
    assert differences(was, written(rows[::-1]), position=0) == ["data.features: its rows are not those that were"]
    pixels = _print_of(replace(config, features=""))
    assert differences(pixels, was, position=0) == differences(was, pixels, position=0) == []
    del was["features"]  # written before the fingerprint knew of them
    assert differences(was, written(rows[::-1]), position=0) == []


def test_a_moved_touched_or_repacked_shard_is_the_same_data(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    config = DataConfig(shards=make_shards(tmp_path / "a", [4, 2]))
    before = _print_of(config)
    os.rename(tmp_path / "a", tmp_path / "b")
    shards = [str(tmp_path / "b" / f"0000{number}.tar") for number in range(2)]
    os.utime(shards[0])
    with open(shards[1], "ab") as shard:
        shard.write(bytes(10240))
    os.utime(shards[1])
    assert differences(before, _print_of(DataConfig(shards=shards)), position=8) == []


def test_seed_and_the_batch_of_one_per_batch_count(tmp_path: Path) -> None:
    plain = DataConfig(shards=make_shards(tmp_path, [4]))
    assert differences(_print_of(plain), _print_of(plain, batch=8), position=8) == []
    assert differences(_print_of(plain), _print_of(plain, seed=1), position=8) == ["train.seed: 0 was, 1 is"]
    whole = DataConfig(sources=[SourceConfig(name="a", shards=plain.shards)], mix="one_per_batch")
    (line,) = differences(_print_of(whole), _print_of(whole, batch=8), position=8)
    assert line.startswith("train.global_batch_size") and line.endswith("4 was, 8 is")


def test_a_source_may_come_in_after_the_position_and_not_before_it(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [4, 2])
    first = SourceConfig(name="a", shards=[shards[0]])
    late = [first, SourceConfig(name="b", shards=[shards[1]], weight=0)]
    switch = [MixtureSwitch(at_samples=16, weights={"a": 1, "b": 1})]
    before = _print_of(DataConfig(sources=[first]))
    after = _print_of(DataConfig(sources=late, mixture_schedule=switch))
    assert differences(before, after, position=16) == []
    (line,) = differences(before, after, position=17)
    assert line.startswith("weights of the sources up to position 17")
    assert "source b is gone" in differences(after, before, position=20)


def test_a_source_may_join_plain_shards(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [9, 4])
    alone = DataConfig(shards=shards[:1])
    joined = DataConfig(
        sources=[
            SourceConfig(name="data.shards", shards=shards[:1]),
            SourceConfig(name="late", shards=shards[1:], weight=0),
        ],
        mixture_schedule=[MixtureSwitch(at_samples=14, weights={"data.shards": 1, "late": 1})],
    )
    assert differences(_print_of(alone), _print_of(joined), position=14) == []
    orders = [Sources(config, seed=0, train=True, global_batch_size=2).order for config in (alone, joined)]
    before, after = (np.stack(order.locate(np.arange(14))) for order in orders)
    assert np.array_equal(before, after)
    assert set(orders[1].locate(np.arange(14, 22))[0].tolist()) == {0, 1}


def test_more_shards_than_ranges_take_a_few_kilobytes(tmp_path: Path) -> None:
    (shard,) = make_shards(tmp_path, [1])
    config = DataConfig(shards=[shard] * 200, shuffle_group_shards=1)
    made = _print_of(config)
    assert made["sources"]["data.shards"]["samples"] == 200
    assert len(json.dumps(made)) < 5000
