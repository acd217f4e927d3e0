"""The same global batches at every layout, after a resume at another one, with bad samples listed once."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data.config import DataConfig, SourceConfig
from data.errors import DataError
from data.reader import SampleReader
from data.shards.write import write_shard
from engine.config.read import Config, ConfigError, resolve
from engine.feed import Feed, list_together
from engine.parallel.agree import everyone
from engine.parallel.mesh import Mesh, build_mesh
from engine.resilience.quarantine import QUARANTINE_FILE, Quarantine
from engine.resilience.roll_call import RollCall
from tests.data.shard_factory import encode, good_sample, picture
from tests.distributed import run_distributed, world

BATCH, STEPS, SIDE, CONTEXT = 16, 4, 12, 8
# TP, PP (the rest of four ranks is DP); the second steps of each pair run at the layout that follows
LAYOUTS = [(1, 1), (2, 1), (2, 2), (1, 2), (4, 1), (1, 4)]


def _config(folder: str, tensor: int = 1, pipeline: int = 1, **data: Any) -> Config:
    sources = [
        {"name": "laion", "shards": f"{folder}/laion-[0-2].tar", "weight": 3, "subset": f"{folder}/subset.npy"},
        {"name": "coyo", "shards": f"{folder}/coyo.tar", "weight": 1},
    ]
    vision = {"image_size": SIDE, "patch_size": 6, "depth": 4, "width": 16, "head_width": 4, "mlp_hidden": 32}
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "depth": 1, "heads": 2}
    tree = {
        "model": {"embed_dim": 8, "vision": vision, "text": text},
        "data": {"sources": sources, "shuffle_group_shards": 2, "max_bad_fraction": 0.5} | data,
        "parallel": {"tensor": tensor, "pipeline": pipeline, "sequence": False},
        "train": {"global_batch_size": BATCH, "micro_batch_size": 2, "seed": 3, "mask_false_negatives": "both"},
    }
    return resolve(tree, [])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    bad = [("undecodable", {"jpg": encode(picture(5), "JPEG")[:400], "txt": b"words"}), ("mute", {"png": b"x"})]
    for shard in range(3):
        samples = [good_sample(number) for number in range(10 * shard, 10 * shard + 10)]
        write_shard(str(folder / f"laion-{shard}.tar"), samples + bad[shard : shard + 1])
    wanted = [f"good{number}" for number in range(30) if number % 7 != 3]
    np.save(folder / "subset.npy", [*wanted, *(key for key, _ in bad)])
    write_shard(str(folder / "coyo.tar"), [good_sample(number) for number in range(50, 57)])
    return str(folder)


def _expected(shards: str) -> Any:
    config = _config(shards)
    reader = SampleReader(config.data, image_size=SIDE, context_length=CONTEXT, seed=3, train=True, picture_ids=True)
    return reader.read(np.arange(BATCH * STEPS))


def _feed_all(folder: str, run_dir: str) -> list[dict[str, Any]]:
    """Half of the steps at each layout, the other half at the next; what this rank got."""
    meshes = [build_mesh(*layout, world()) for layout in LAYOUTS]
    return [
        _feed_steps(folder, Path(run_dir) / f"{number}", meshes[number - offset], first=STEPS // 2 * offset)
        for number in range(1, len(LAYOUTS))
        for offset in (0, 1)
    ]


def _counted(patch: pytest.MonkeyPatch, call: str) -> Counter[str]:
    """Path -> how often this process asks the file system by this function of os."""
    asked, original = Counter[str](), getattr(os, call)

    def ask(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
        asked[str(path)] += 1
        return original(path, *args, **kwargs)

    patch.setattr(os, call, ask)
    return asked


def _feed_steps(folder: str, run_dir: Path, mesh: Mesh, *, first: int) -> dict[str, Any]:
    cpu = torch.device("cpu")
    config = _config(folder, mesh.tensor.size, mesh.pipeline.size, workers=0)
    with pytest.MonkeyPatch.context() as patch:
        statuses, listings = (_counted(patch, call) for call in ("stat", "scandir"))
        listing = list_together(config.data, mesh)
        feed = Feed(config, mesh, cpu, start_position=first * BATCH, steps=STEPS // 2, listing=listing)
        of_all = everyone((statuses, listings), mesh.control)
    # Whatever the number of ranks: the first lists the folder and asks whether each shard is there (and whether a name
    # is a folder's), one reader asks how large it is.
    whole = sum((of_rank for of_rank, _ in of_all), Counter[str]())
    asked = {name: whole[f"{folder}/{name}.tar"] for name in ("laion-0", "laion-1", "laion-2", "coyo")}
    assert asked == {"laion-0": 2, "laion-1": 2, "laion-2": 2, "coyo": 3}
    assert [of_rank[folder] for _, of_rank in of_all] == [1, *[0] * (len(of_all) - 1)]
    quarantine = Quarantine(run_dir, mesh, start_position=first * BATCH, max_bad_fraction=0.5)
    roll_call = RollCall(run_dir, mesh, None)
    result: dict[str, Any] = {"place": (mesh.data.rank, mesh.pipeline.rank, mesh.tensor.rank), "steps": []}
    for step in range(first, first + STEPS // 2):
        _, totals = roll_call(feed.read(), quarantine.counts(feed.bad))
        quarantine.report(feed.bad, totals, samples_seen=(step + 1) * BATCH)
        batch = feed.share()
        result["steps"].append(
            {
                "step": step,
                "positions": torch.from_numpy(batch.positions),
                "images": batch.images,
                "tokens": batch.tokens,
                "pictures": batch.picture_ids,
                "sources": dict(batch.source_counts),
            }
        )
    feed.close()
    result["bad"] = dict(quarantine.by_reason)
    return result


@pytest.mark.dist
def test_every_layout_feeds_the_same_batches_and_lists_bad_samples_once(shards: str, tmp_path: Path) -> None:
    expected = _expected(shards)
    ranks = run_distributed(_feed_all, 4, folder=shards, run_dir=str(tmp_path))
    for number in range(1, len(LAYOUTS)):
        runs = [run for rank in ranks for run in rank[2 * (number - 1) : 2 * number]]
        _check_images(runs, expected.images)
        _check_own_rows(runs, "tokens", expected.tokens)
        _check_own_rows(runs, "pictures", expected.picture_ids)
        listed = [json.loads(line) for line in (tmp_path / f"{number}" / QUARANTINE_FILE).read_text().splitlines()]
        wanted = sorted((bad.shard, bad.key, bad.reason, bad.position) for bad in expected.bad)
        assert sorted((e["shard"], e["key"], e["reason"], e["position"]) for e in listed) == wanted and wanted
        assert all(run["bad"] == runs[-1]["bad"] for run in runs if run["steps"][0]["step"] > 0)
        assert sum(runs[-1]["bad"].values()) == len(wanted)


def _check_images(runs: list[dict[str, Any]], expected: torch.Tensor) -> None:
    """Every first-stage rank holds the images of its positions; together they are all."""
    seen: list[int] = []
    for run in runs:
        _, stage, tensor = run["place"]
        for step in run["steps"]:
            if stage > 0:
                assert step["images"] is None and step["sources"] == {}
                continue
            assert step["images"].equal(expected[step["positions"]])
            assert sum(step["sources"].values()) == (step["step"] + 1) * BATCH
            seen += step["positions"].tolist() if tensor == 0 else []
    assert sorted(seen) == list(range(BATCH * STEPS))


def _check_own_rows(runs: list[dict[str, Any]], what: str, expected: torch.Tensor) -> None:
    """The ranks' own rows of a step, in the order of data, stage and tensor rank, are those of the global batch."""
    for number in range(STEPS):
        parts = [(run["place"], step[what]) for run in runs for step in run["steps"] if step["step"] == number]
        rows = torch.cat([own for _, own in sorted(parts, key=lambda part: part[0])])
        assert rows.equal(expected[number * BATCH : (number + 1) * BATCH])


# --- one rank ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_mesh(1, 1, world())
    dist.destroy_process_group()


def _feed(config: Config, mesh: Mesh, start: int = 0) -> Feed:
    return Feed(config, mesh, torch.device("cpu"), start_position=start, steps=3)


def test_readers_work_in_units_of_a_micro_batch_within_the_bound(shards: str, mesh: Mesh) -> None:
    feed = _feed(_config(shards, workers=3, prefetch_batches=2), mesh)
    assert [unit.stop - unit.start for unit in feed.units] == [2] * 8
    assert feed._units_ahead(_config(shards, workers=3, prefetch_batches=2)) == 6  # 3 x 6 units hold 2 batches of 8
    images = next(feed).images
    assert images is not None and images.shape == (BATCH, 3, SIDE, SIDE)
    feed.close()


def test_readers_ahead_change_nothing_of_a_run_that_goes_on(shards: str, mesh: Mesh) -> None:
    expected = _expected(shards)
    for start, workers in ((0, 2), (BATCH, 1), (BATCH, 0)):
        feed = _feed(_config(shards, workers=workers), mesh, start)
        bad = []
        for first in range(start, 3 * BATCH, BATCH):
            assert feed.read() is None
            bad += feed.bad
            batch = feed.share()
            rows = slice(first, first + BATCH)
            assert batch.images is not None and batch.picture_ids is not None
            assert batch.images.equal(expected.images[rows]) and batch.tokens.equal(expected.tokens[rows])
            assert batch.picture_ids.equal(expected.picture_ids[rows])
            assert batch.bad == bad[-len(batch.bad) :] if batch.bad else True
        wanted = [sample for sample in expected.bad if start <= sample.position < 3 * BATCH]
        assert sorted(bad, key=repr) == sorted(wanted, key=repr) and wanted
        feed.close()


def test_pixels_beyond_the_shared_memory_are_refused(shards: str, mesh: Mesh) -> None:
    with pytest.raises(
        DataError, match=r"prefetch_batches=900000000 lets 1 readers hold .* GB of pixels, but /dev/shm"
    ):
        _feed(_config(shards, prefetch_batches=900_000_000), mesh)


def test_clips_keep_their_frames(shards: str, mesh: Mesh) -> None:
    feed = _feed(_config(shards, frames=2, workers=0), mesh)
    images = next(feed).images
    assert images is not None and images.shape == (BATCH, 2, 3, SIDE, SIDE)


def test_a_fresh_quarantine_and_a_resumed_one(tmp_path: Path, mesh: Mesh, shards: str) -> None:
    lines = [
        json.dumps({"shard": "a", "key": str(at), "reason": "empty_image", "position": at}) for at in (3, 15, 16, 40)
    ]
    (tmp_path / QUARANTINE_FILE).write_text("\n".join(lines) + '\n{"shard": "a", "ke')
    options: dict[str, Any] = {"max_bad_fraction": 0.01}
    resumed = Quarantine(tmp_path, mesh, start_position=16, **options)
    assert resumed.by_reason == {"empty_image": 2}
    assert (tmp_path / QUARANTINE_FILE).read_text().splitlines() == lines[:2]
    bad = _expected(shards).bad
    assert resumed.report(bad, resumed.counts(bad), samples_seen=32) == len(bad)  # too few reads to judge
    with pytest.raises(DataError, match=r"of 10\d\d samples were bad .*data\.max_bad_fraction=0\.01"):
        resumed.report(bad * 10, resumed.counts(bad * 10), samples_seen=1000)
    fresh = Quarantine(tmp_path, mesh, start_position=0, **options)
    assert not fresh.by_reason and (tmp_path / QUARANTINE_FILE).read_text() == ""


def test_a_mixture_in_a_config_file(shards: str) -> None:
    schedule = [{"at_samples": 32, "weights": {"coyo": 1}}]
    data = _config(shards, mixture_schedule=schedule, mix="one_per_batch").data
    assert isinstance(data, DataConfig) and isinstance(data.sources[0], SourceConfig)
    assert data.sources[1].shards == [f"{shards}/coyo.tar"] and data.mixture_schedule[0].weights == {"coyo": 1}
    with pytest.raises(ConfigError, match="switches at 33 samples, within a batch of"):
        _config(shards, mixture_schedule=[{"at_samples": 33, "weights": {"coyo": 1}}], mix="one_per_batch")
    with pytest.raises(ConfigError, match=r"data\.frames is 0"):
        _config(shards, frames=0)
