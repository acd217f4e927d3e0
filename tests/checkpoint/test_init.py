"""Loads that are not a plain resume: strictness, exceptions by pattern, towers from elsewhere, other resolutions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.matching import Exceptions, match
from engine.checkpoint.reader import Checkpoint
from engine.config.phases import first_phase
from engine.config.read import Config, resolve
from engine.parallel.device import prepare
from engine.parallel.mesh import Mesh
from engine.trainer import Trainer
from models.formats.eva_names import from_logical
from models.towers.posembed import resize_patch_kernel, resize_pos_embed
from tests.checkpoint.jobs import alone, build, job_config, run_steps, save
from tests.golden import FOLDER
from tools.convert import __main__ as convert


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with alone() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def trained(module_path: Path, mesh: Mesh) -> Path:
    """A checkpoint of the small job, with a learned logit scale."""
    trainer = build(job_config(module_path / "trained"), mesh)
    run_steps(trainer, 2)
    return save(trainer)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Of a job of one rank: the logical tensors."""
    return {tensor.name: parameter.detach().clone() for tensor, parameter in trainer.towers.logical_parameters()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read_whole(name) for name in checkpoint.shapes()}


# --- strictness ------------------------------------------------------------------------------------------------------


def test_missing_extra_and_misshapen_tensors_are_listed() -> None:
    have = {"same": (2,), "bent": (2, 3), "extra": (1,)}
    want = {"same": (2,), "bent": (2, 4), "missing": (1,)}
    with pytest.raises(CheckpointError) as caught:
        match(have, want, Exceptions(), "FILE")
    said = str(caught.value)
    assert (
        "missing, 1 (name them in checkpoint.reinit" in said and "unexpected, 1 (name them in checkpoint.skip" in said
    )
    assert "bent: stored [2, 3], wanted [2, 4]" in said
    chosen = match(have, want, Exceptions(skip=["ext*"], reinit=["missing", "bent"]), "FILE")
    assert (chosen.load, chosen.reinit, chosen.skip) == (["same"], ["bent", "missing"], ["extra"])
    assert "extra" in "\n".join(chosen.lines()) and "missing" in "\n".join(chosen.lines())
    with pytest.raises(CheckpointError, match=r"reinit \['nothing\*'\] matches no tensor"):
        match(have, want, Exceptions(reinit=["nothing*"]), "FILE")


def test_a_resume_is_partial_only_where_the_config_says_so(tmp_path: Path, mesh: Mesh, trained: Path, capfd) -> None:
    accepted = "checkpoint.accept=[train.logit_scale]"
    fixed = f"checkpoint.resume={trained}", "train.logit_scale=100", accepted
    with pytest.raises(CheckpointError, match=r"unexpected, 1 .*\n +logit_scale\.log_scale"):
        build(job_config(tmp_path / "a", *fixed), mesh)
    again = build(job_config(tmp_path / "b", *fixed, "checkpoint.skip=[logit_scale.*]"), mesh)
    assert again.position.step == 2
    assert "left in the checkpoint, 1 tensors:\n    logit_scale.log_scale" in capfd.readouterr().err
    without_scale = save(again)
    with pytest.raises(CheckpointError, match=r"missing, 1 .*\n +logit_scale\.log_scale"):
        build(job_config(tmp_path / "c", f"checkpoint.resume={without_scale}", accepted), mesh)


class _Draws(TorchDispatchMode):
    """Counts what takes random numbers."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_initial_value_is_drawn_for_what_a_checkpoint_fills(
    tmp_path: Path, mesh: Mesh, trained: Path, precision: str
) -> None:
    config = job_config(tmp_path, f"train.precision={precision}", "checkpoint.accept=[train.precision]")
    draws, in_files = {}, stored(trained)
    for reinit in ((), ("text.token_embedding",)):
        checkpoint = Checkpoint(trained, Exceptions(reinit=list(reinit)))
        with _Draws() as counted:
            trainer = Trainer(first_phase(config), mesh, prepare(), checkpoint=checkpoint)
            draws[reinit] = counted.count
        assert sum(bool(value.isnan().all()) for value in weights(trainer).values()) == len(in_files) - len(reinit)
        trainer.begin(checkpoint, None)
        for name, value in weights(trainer).items():
            assert torch.equal(value, in_files[name].to(value.dtype)) != (name in reinit), name
        run_steps(trainer, 1)
    # torch fills its linears when they are made: the weights of two projections and a bias.
    assert draws == {(): 3, ("text.token_embedding",): 4}


def test_another_model_or_seed_is_no_resume(tmp_path: Path, mesh: Mesh, trained: Path) -> None:
    resume = f"checkpoint.resume={trained}"
    with pytest.raises(CheckpointError, match=r"model\.vision\.post_norm: checkpoint False, config True"):
        build(job_config(tmp_path, resume, "model.vision.post_norm=true"), mesh)
    with pytest.raises(CheckpointError, match=r"train\.seed 0, this job has 1"):
        build(job_config(tmp_path, resume, "train.seed=1"), mesh)


def test_a_run_goes_on_with_other_kernels(tmp_path: Path, mesh: Mesh, trained: Path) -> None:
    kernels = ("model.attention=matmul", "model.norm_kernel=torch", "model.block_kernels=torch")
    trainer = build(job_config(tmp_path, f"checkpoint.resume={trained}", *kernels), mesh)
    assert trainer.position.step == 2
    in_files = stored(trained)
    assert all(torch.equal(value, in_files[name]) for name, value in weights(trainer).items())


# --- initial weights -------------------------------------------------------------------------------------------------


def test_towers_start_from_another_run_and_the_rest_afresh(tmp_path: Path, mesh: Mesh, trained: Path, capfd) -> None:
    run = build(job_config(tmp_path, f"init.vision={trained}", f"init.logit_scale={trained}", "train.seed=5"), mesh)
    fresh = weights(Trainer(first_phase(job_config(tmp_path, "train.seed=5")), mesh, run.device))
    found, old = weights(run), stored(trained)
    for name, value in found.items():
        assert value.equal((fresh if name.startswith("text.") else old)[name]), name
    assert run.position.step == 0 and all(
        not m.any() for tower in run.optimizer.towers for m in tower.moments["moment2"]
    )
    assert "init.vision from" in capfd.readouterr().err
    # Its own checkpoint goes before the initial weights.
    run_steps(run, 1)
    save(run)
    again = build(job_config(tmp_path, f"init.vision={trained}", "train.seed=5"), mesh)
    assert again.position.step == 1 and "init.vision" not in capfd.readouterr().err


def test_positions_are_interpolated_to_another_resolution(tmp_path: Path, mesh: Mesh, trained: Path, capfd) -> None:
    run = build(job_config(tmp_path, f"init.vision={trained}", "model.vision.image_size=56"), mesh)
    name = "vision.embed.pos_embed"
    assert weights(run)[name].equal(resize_pos_embed(stored(trained)[name], 4)) and weights(run)[name].shape == (17, 32)
    assert "interpolated vision.embed.pos_embed from [5, 32] to [17, 32] (bicubic)" in capfd.readouterr().err
    run_steps_of_that_size(run)


def run_steps_of_that_size(run: Trainer) -> None:
    """The first stage trains on what was loaded."""
    side = run.config.model.vision.image_size
    assert run.towers.vision[0](torch.zeros(2, 3, side, side), samples=2).shape == (2, 16)


def test_another_patch_size_is_refused_unless_asked_for(tmp_path: Path, mesh: Mesh, trained: Path) -> None:
    other = f"init.vision={trained}", "model.vision.patch_size=7"
    with pytest.raises(CheckpointError, match=r"patch size 14 .* is not the model's 7: set init\.resize_patch=true"):
        build(job_config(tmp_path / "a", *other), mesh)
    run = build(job_config(tmp_path / "b", *other, "init.resize_patch=true"), mesh)
    kernel = stored(trained)["vision.embed.weight"].view(-1, 3, 14, 14)
    assert weights(run)["vision.embed.weight"].equal(resize_patch_kernel(kernel, 7).flatten(1))
    assert weights(run)["vision.embed.pos_embed"].shape == (17, 32)


def test_the_text_tower_of_a_clip_with_another_embedding_width(tmp_path: Path, mesh: Mesh, trained: Path) -> None:
    other = f"init.text={trained}", "model.embed_dim=24"
    with pytest.raises(CheckpointError, match=r"text\.projection\.weight: stored \[16, 16\], wanted \[24, 16\]"):
        build(job_config(tmp_path / "a", *other), mesh)
    run = build(job_config(tmp_path / "b", *other, "init.reinit=[text.projection.weight]"), mesh)
    assert weights(run)["text.token_embedding"].equal(stored(trained)["text.token_embedding"])
    fresh = weights(Trainer(first_phase(job_config(tmp_path, "model.embed_dim=24")), mesh, run.device))
    assert weights(run)["text.projection.weight"].equal(fresh["text.projection.weight"])


def test_switches_that_leave_no_trace_in_tensors_are_compared(tmp_path: Path, mesh: Mesh, trained: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.vision\.head_width: checkpoint 8, config 16"):
        build(job_config(tmp_path, f"init.vision={trained}", "model.vision.head_width=16"), mesh)


def test_patterns_that_match_nothing_are_refused(tmp_path: Path, mesh: Mesh, trained: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\['vision\.haed\.\*'\] matches no tensor of what init loads"):
        build(job_config(tmp_path, f"init.vision={trained}", "init.reinit=[vision.haed.*]"), mesh)


# --- files of the authors --------------------------------------------------------------------------------------------


def golden_config(preset: str, run_dir: Path, *overrides: str) -> Config:
    train = {"global_batch_size": 8, "micro_batch_size": 8}
    tree = {"model": preset, "data": {"shards": ["-"]}, "train": train, "run_dir": str(run_dir)}
    return resolve(tree, list(overrides))


def test_both_towers_from_an_authors_file(tmp_path: Path, mesh: Mesh) -> None:
    file = FOLDER / "tiny-18b/weights.safetensors"
    run = build(golden_config("tiny-18b", tmp_path, f"init.vision={file}", f"init.text={file}"), mesh)
    theirs = load_file(file)
    back = from_logical(weights(run), run.config.model)
    assert all(back[name].equal(theirs[name]) for name in back) and len(back) == len(theirs) - 1  # the scale is fixed


@pytest.mark.parametrize("converted", [False, True])
def test_a_mim_student_becomes_the_clip_vision_tower(converted: bool, tmp_path: Path, mesh: Mesh, capfd) -> None:
    """From the authors' file, which has no `visual.`, or from a checkpoint: the CLIP projection starts afresh, and mask
    token and prediction head stay behind.
    """
    theirs = {
        name.removeprefix("style18b."): value
        for name, value in load_file(FOLDER / "g8-mim/weights.safetensors").items()
        if name.startswith("style18b.")
    }
    file = tmp_path / "student.safetensors"
    save_file(theirs, file)
    depth = 1 + max(int(name.split(".")[1]) for name in theirs if name.startswith("blocks."))
    width, hidden = theirs["norm.weight"].shape[0], theirs["blocks.0.mlp.fc1.bias"].shape[0]
    source = _converted(file, depth, width, tmp_path) if converted else file
    model = (
        f"model.vision.depth={depth}", f"model.vision.width={width}", f"model.vision.mlp_hidden={hidden}",
        "model.vision.head_width=8", f"init.vision={source}",
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"missing, 1 .*\n +vision\.head\.projection\.weight"):
        build(golden_config("tiny-18b", tmp_path / "a", *model), mesh)
    run = build(golden_config("tiny-18b", tmp_path / "b", *model, "init.reinit=[vision.head.projection.*]"), mesh)
    back = from_logical({n: v for n, v in weights(run).items() if n.startswith("vision.")}, run.config.model)
    for name, value in theirs.items():
        if name not in ("mask_token", "lm_head.weight", "lm_head.bias"):
            assert back[f"visual.{name}"].equal(value), name
    said = capfd.readouterr().err
    assert "fresh values for 1 tensors:\n    vision.head.projection.weight" in said
    behind = said.partition("left in the checkpoint, 3 tensors:")[2]
    for name in ("vision.embed.mask_token", "vision.head.prediction.weight", "vision.head.prediction.bias"):
        assert name in behind


def _converted(file: Path, depth: int, width: int, folder: Path) -> Path:
    """The student as a checkpoint of this project."""
    vision = {
        "image_size": 56, "patch_size": 14, "layers": depth, "width": width, "head_width": 8, "mlp_ratio": 5,
        "qkv_bias": False, "use_rms_norm": True, "postnorm": True,
    }  # fmt: skip
    config = folder / "student.json"
    config.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision}))
    arguments = ["--from", "eva", "--config", str(config), "--weights", str(file), "--out", str(folder / "student")]
    assert convert.main(arguments) == 0
    return folder / "student"
