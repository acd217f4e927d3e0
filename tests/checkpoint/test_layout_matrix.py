"""Promise 4: a run that was stopped continues at any layout on the curve that it would have had.

One rank saves (in this process), four ranks save at several layouts and load, one rank loads again. The quick matrix
has every 1 <-> 4 change of an axis and the same layout twice; the slow one has all pairs.
"""

from pathlib import Path

import pytest

from engine.checkpoint.reader import Checkpoint
from engine.parallel.mesh import Mesh
from tests.checkpoint.jobs import alone, build, differing, job_config, run_steps, save, world_mesh
from tests.distributed import MANY_CASES_S, run_distributed

TOLERANCE = 1e-5
BEFORE, AFTER = 2, 2

LAYOUTS = {
    "tp4": ["parallel.tensor=4"],
    "tp4-no-sp": ["parallel.tensor=4", "parallel.sequence=false"],
    "pp4": ["parallel.pipeline=4"],
    "pp2-virtual2": ["parallel.pipeline=2", "parallel.virtual=2"],
    "pp2-by-hand": ["parallel.pipeline=2", "parallel.layers=[4,1]"],
    "dp4": [],
    "tp2-pp2": ["parallel.tensor=2", "parallel.pipeline=2"],
    "dp4-sharded": ["parallel.virtual=2", "parallel.shard=weights"],
    "tp2-dp2-node": ["parallel.tensor=2", "parallel.shard=weights", "parallel.shard_ranks=1"],
    "tp2-dp2": ["parallel.tensor=2", "parallel.bucket_size=500"],
}
QUICK = [
    ("one", "tp4"), ("one", "pp4"), ("one", "dp4"), ("tp4", "one"), ("pp4", "one"), ("dp4", "one"), ("one", "one"),
    ("tp4", "tp4"), ("tp4", "pp2-virtual2"), ("pp4", "tp2-pp2"), ("dp4", "tp4-no-sp"),
    ("one", "dp4-sharded"), ("dp4-sharded", "one"), ("dp4-sharded", "tp2-dp2-node"),
]  # fmt: skip
ALL = [
    (source, target)
    for source in ("one", "tp4", "pp4", "dp4", "pp2-virtual2", "tp2-dp2", "dp4-sharded")
    for target in ("one", *LAYOUTS)
]


def _curve_and_checkpoint(folder: Path, name: str, overrides: list[str], mesh: Mesh) -> list[float]:
    """Train, save, train on: the losses after the save are those of the uninterrupted run."""
    trainer = build(job_config(folder / name, *overrides), mesh)
    run_steps(trainer, BEFORE)
    save(trainer)
    return run_steps(trainer, AFTER)


def _load(folder: Path, source: str, name: str, overrides: list[str], mesh: Mesh) -> tuple[list[float], list[str]]:
    """(losses after resuming, tensors that a checkpoint of the resumed state holds differently)."""
    origin = folder / source / "checkpoints" / f"step_{BEFORE:08d}"
    config = job_config(folder / f"{source}-at-{name}", *overrides, f"checkpoint.resume={origin}")
    trainer = build(config, mesh)
    again = save(trainer)
    return run_steps(trainer, AFTER), differing(origin, again) if mesh.world.rank == 0 else []


def _four_ranks(folder: Path, sources: list[str], pairs: list[tuple[str, str]]) -> dict:
    meshes = {name: world_mesh(job_config(folder, *overrides)) for name, overrides in LAYOUTS.items()}
    curves = {name: _curve_and_checkpoint(folder, name, LAYOUTS[name], meshes[name]) for name in sources}
    found = {f"{s} -> {t}": _load(folder, s, t, LAYOUTS[t], meshes[t]) for s, t in pairs}
    return {
        "curves": curves,
        "loaded": {k: v[0] for k, v in found.items()},
        "changed": {k: v[1] for k, v in found.items()},
    }


def _check_matrix(folder: Path, pairs: list[tuple[str, str]]) -> None:
    with alone() as mesh:
        reference = _curve_and_checkpoint(folder, "one", [], mesh)
    sources = [s for s in dict.fromkeys(s for s, _ in pairs) if s != "one"]
    on_four = [pair for pair in pairs if pair[1] != "one"]
    four = run_distributed(_four_ranks, 4, folder=folder, sources=sources, pairs=on_four, timeout_s=MANY_CASES_S)[0]
    with alone() as mesh:
        one = {f"{s} -> one": _load(folder, s, "one", [], mesh) for s, t in pairs if t == "one"}
    loaded = four["loaded"] | {case: losses for case, (losses, _) in one.items()}
    changed = four["changed"] | {case: names for case, (_, names) in one.items()}
    assert len(loaded) == len(pairs)
    off = {
        case: losses
        for case, losses in (four["curves"] | loaded).items()
        if not max(abs(a - b) for a, b in zip(losses, reference, strict=True)) <= TOLERANCE
    }
    assert not off, f"curves that leave {reference}: {off}"
    # No arithmetic lies between a checkpoint and the same state saved at another layout.
    assert not {case: names for case, names in changed.items() if names}
    # At the same layout the losses are equal to the bit.
    for name in sources:
        if f"{name} -> {name}" in loaded:
            assert loaded[f"{name} -> {name}"] == four["curves"][name]
    assert loaded["one -> one"] == reference


@pytest.mark.dist
@pytest.mark.slow
def test_an_axis_may_change_from_1_to_4_and_back(tmp_path: Path) -> None:
    _check_matrix(tmp_path, QUICK)


@pytest.mark.dist
@pytest.mark.slow
def test_every_layout_continues_the_curve_of_every_other(tmp_path: Path) -> None:
    _check_matrix(tmp_path, ALL)


ACCEPT = "checkpoint.accept=[train.precision,train.global_batch_size]"


def test_precision_may_change_and_masters_keep_every_bit(tmp_path: Path) -> None:
    with alone() as mesh:
        trainer = build(job_config(tmp_path / "fp32"), mesh)
        run_steps(trainer, BEFORE)
        origin = save(trainer)
        bf16 = build(job_config(tmp_path / "bf16", "train.precision=bf16", f"checkpoint.resume={origin}", ACCEPT), mesh)
        assert differing(origin, save(bf16)) == []
        stored = Checkpoint(origin)
        for tensor, parameter in bf16.towers.logical_parameters():
            assert parameter.equal(stored.read_whole(tensor.name).to(parameter.dtype))
        run_steps(bf16, 1)
        trained = save(bf16)
        back = build(job_config(tmp_path / "back", f"checkpoint.resume={trained}", ACCEPT), mesh)
        assert differing(trained, save(back)) == []
        assert back.position.step == BEFORE + 1


def test_the_batch_size_may_change_and_the_position_is_kept_in_samples(tmp_path: Path) -> None:
    with alone() as mesh:
        trainer = build(job_config(tmp_path / "a"), mesh)
        run_steps(trainer, 3)
        origin = save(trainer)
        other = build(
            job_config(tmp_path / "b", "train.global_batch_size=8", f"checkpoint.resume={origin}", ACCEPT), mesh
        )
        assert (other.position.step, other.position.samples_seen) == (3, 48)
        run_steps(other, 1)
        assert other.position.samples_seen == 56
