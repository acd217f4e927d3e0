"""A bit that is flipped in one copy of a weight is found before the next update, by rank and tensor."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from engine.parallel.mesh import build_mesh
from engine.resilience.judge import UnhealthyStep
from engine.trainer import Trainer
from tests.checkpoint.jobs import build, job_config, run_steps, save
from tests.distributed import run_distributed, world


def flip(trainer: Trainer, name: str, *, owned: bool) -> None:
    """The lowest exponent bit of one element of this rank's copy: of its own shard, or of another rank's."""
    for part in trainer.towers.parts:
        for local, parameter in part.ddp.module.named_parameters():
            if part.logical[local].name == name:
                flat = parameter.data.view(-1)
                word = flat.view(torch.int32 if flat.element_size() == 4 else torch.int16)
                word[0 if owned else -1] ^= 1 << (23 if flat.element_size() == 4 else 7)


def flip_owned(trainer: Trainer) -> None:
    """The same of the first element that this rank owns, in the weight and not in its fp32 master."""
    shard = trainer.optimizer.towers[0].shards.shards[0]
    shard.weight.view(torch.int16)[0] ^= 1 << 7


def flip_moment(trainer: Trainer) -> None:
    """The same of a moment, which has no copy."""
    trainer.optimizer.towers[0].moments["moment2"][0].view(torch.int32)[0] ^= 1 << 20


def flip_during_a_step(trainer: Trainer, flipped: Callable[[], None]) -> None:
    """After the forward passes: before them the weights of another rank's shard are gathered anew."""
    update = trainer.training_step.update
    reduce = update.reduce

    def flipping() -> None:
        reduce()
        flipped()
        update.reduce = reduce  # type: ignore[method-assign]

    update.reduce = flipping  # type: ignore[method-assign]


def names_of(trainer: Trainer) -> dict[str, bool]:
    return {t.name: t.split_dim is None for t, _ in trainer.towers.logical_parameters()}


def step_of_all(trainer: Trainer) -> str:
    try:
        run_steps(trainer, 1)
        return ""
    except UnhealthyStep as error:
        return str(error)


SMALL = ("train.global_batch_size=24", "train.micro_batch_size=8", "model.vision.depth=1", "model.text.depth=1")
OWNED = "bf16, its owner's"
MOMENT = "adamw, a moment"
LAYOUTS = {
    "dp3": (),
    "bf16": ("train.precision=bf16",),
    OWNED: ("train.precision=bf16",),
    MOMENT: ("optim.name=adamw",),
}
FLIPS: dict[str, Callable[[Trainer], None]] = {OWNED: flip_owned, MOMENT: flip_moment}


def audited(folder: str) -> dict[str, Any]:
    """On three replicas: what is found after a flip on rank 1, by policy."""
    mesh, found = build_mesh(1, 1, world()), {}
    for layout, overrides in LAYOUTS.items():
        for policy in ("repair",) if layout == OWNED else ("stop", "repair", "rewind"):
            options = (f"health.on_divergence={policy}", "health.audit_every_steps=1", *SMALL)
            trainer = build(job_config(f"{folder}/{layout}-{policy}", *options, *overrides), mesh)
            run_steps(trainer, 1)
            save(trainer)
            quiet = step_of_all(trainer)
            if mesh.world.rank == 1:
                name = next(n for n in names_of(trainer) if n.startswith("text.") and n.endswith("weight"))
                own = FLIPS.get(layout, partial(flip, name=name, owned=False))
                flip_during_a_step(trainer, partial(own, trainer))
            said = step_of_all(trainer)
            after = step_of_all(trainer) if policy != "stop" else ""
            position = trainer.position
            found[f"{layout}-{policy}"] = [
                quiet,
                said,
                after,
                position.skipped_steps,
                position.rewinds,
                trainer.audit(),
            ]
            if trainer.lock is not None:
                trainer.lock.release()
    return found


@pytest.mark.dist
def test_the_rank_is_named_and_the_policy_followed(tmp_path) -> None:
    ranks = run_distributed(audited, 3, folder=str(tmp_path))
    assert ranks[0] == ranks[1] == ranks[2]
    said = ranks[0].pop(f"{MOMENT}-stop")[1]
    assert "state has changed between two updates: moment2 of rank 1 on " in said and "copies" not in said
    for policy in ("repair", "rewind"):  # no owner can mend it
        assert ranks[0].pop(f"{MOMENT}-{policy}") == ["", "", "", 0, 1, ""]
    for layout in LAYOUTS.keys() - {MOMENT}:
        assert ranks[0][f"{layout}-repair"] == ["", "", "", 1, 0, ""]
        if layout == OWNED:  # its master is right
            continue
        quiet, said, _, skipped, rewinds, _ = ranks[0][f"{layout}-stop"]
        assert quiet == "" and (skipped, rewinds) == (0, 0)
        assert "copies of weights are not equal: text." in said and "of rank 1 on " in said
        assert "differs from 2 other copies" in said and "take the host out" in said
        assert ranks[0][f"{layout}-rewind"] == ["", "", "", 0, 1, ""]


def tensor_copies(folder: str) -> list[str]:
    """A weight that both tensor ranks hold whole, flipped on one of them: no all-gather would ever mend it."""
    mesh = build_mesh(2, 1, world())
    options = ("parallel.tensor=2", "health.on_divergence=repair", "health.audit_every_steps=2")
    trainer = build(job_config(folder, *options), mesh)
    run_steps(trainer, 1)
    save(trainer)
    whole = next(n for n, whole in names_of(trainer).items() if whole and n.startswith("vision."))
    if mesh.world.rank == 1:
        flip(trainer, whole, owned=True)
    said = [trainer.audit(), step_of_all(trainer)]
    return [whole, *said, trainer.audit(), str(trainer.position.rewinds)]


def slices_of_others(folder: str) -> list[str]:
    """Replicas that hold their weights whole for themselves; a slice that another one owns, flipped on one of them."""
    mesh = build_mesh(1, 1, world())
    sharded = ("parallel.shard=weights", "parallel.shard_ranks=1", "train.freeze=[text.*]", "train.logit_scale=20")
    trainer = build(job_config(folder, *sharded, "health.on_divergence=repair", "health.audit_every_steps=1"), mesh)
    run_steps(trainer, 1)
    if mesh.world.rank == 1:
        sharded_text = trainer.towers.parts[-1].sharded
        assert sharded_text is not None  # frozen: no update would ever send it again
        sharded_text.copies[0].view(torch.int32)[0] ^= 1 << 23
    said = [trainer.audit(), step_of_all(trainer)]
    return [*said, trainer.audit(), str(trainer.position.skipped_steps)]


def on_two_ranks(folder: str) -> list[list[str]]:
    """Both, in one launch."""
    return [tensor_copies(f"{folder}/tensors"), slices_of_others(f"{folder}/slices")]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    ranks = run_distributed(on_two_ranks, 2, folder=str(tmp_path_factory.mktemp("two")))
    assert ranks[0] == ranks[1]
    return ranks[0]


@pytest.mark.dist
def test_a_tensor_that_every_tensor_rank_holds_whole(two_ranks: list[list[str]]) -> None:
    whole, said, raised, after, rewinds = two_ranks[0]
    assert said.startswith("state has changed between two updates: weight of rank 1 on ")
    assert f"copies of weights are not equal: {whole} differs between rank 0 on " in said and "and rank 1 on" in said
    assert (raised, after, rewinds) == ("", "", "1")  # the owner's own is wrong: back to the checkpoint


@pytest.mark.dist
def test_what_groups_of_neighbours_gather_their_weights_from(two_ranks: list[list[str]]) -> None:
    said, raised, after, skipped = two_ranks[1]
    assert said.startswith("copies of weights are not equal: gathered slices of text tower differs between rank 0 on ")
    assert (raised, after, skipped) == ("", "", "1")  # the owner has sent it again
