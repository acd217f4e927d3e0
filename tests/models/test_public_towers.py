"""Towers of open_clip, timm and transformers: weights strict and bit-equal both ways, features and gradients as theirs.

tests/golden/make_public_towers.py wrote the fixtures with those packages; none of them is needed here. One launch a
number of ranks runs all families at its layouts.
"""

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint.foreign import ForeignWeights
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.state_dicts.files import open_state
from engine.config.phases import first_phase
from engine.config.read import Config, ConfigError, preset_model, resolve
from engine.objectives.contrastive.passes import LossResult
from engine.parallel.device import prepare
from engine.parallel.mesh import Mesh, build_mesh
from engine.trainer import Trainer
from models.config import ModelConfig, ModelConfigError, TextConfig, VisionConfig
from models.formats import family, layout_of
from models.formats.base import entries
from models.formats.eva_names import to_logical
from models.formats.image_tower_config import image_tower_from_model, model_from_image_tower
from models.formats.open_clip_config import model_from_open_clip, open_clip_from_model
from models.formats.transformers_config import model_from_transformers, transformers_from_model
from models.tensors.inventory import MIM_TENSORS, vision_shapes
from models.tensors.naming import logical_tensors
from models.towers.mim import StudentTower, teacher_features
from models.towers.vision import VisionTower, patchify
from tests.distributed import run_distributed, world
from tests.gather import backward_only, contrastive_step, gather_objects, whole_gradients
from tests.golden import FOLDER, deviation, load_json, load_tensors, load_weights, local_batch
from tools.convert import __main__ as convert

FORMAT = {
    "open-clip-vit": "openclip",
    "open-clip-mean": "openclip",
    "timm-siglip": "openclip",
    "transformers-clip": "hf",
    "transformers-siglip": "hf",
    "timm-eva01": "openclip",
    "timm-pe-l": "openclip",
    "timm-pe-g": "openclip",
    "transformers-dinov3": "hf",
    "transformers-internvit": "hf",
}
"""Fixture -> layout of its names."""
IMAGE_TOWERS = ("transformers-dinov3", "transformers-internvit")
"""Published without captions: what a job adds lies in files of its own, under the authors' names."""
FROM_TIMM = tuple(name for name in FORMAT if name.startswith("timm-"))
"""Toys that no config of open_clip names."""
LIMIT = 1e-5
"""Relative deviation of features, loss and gradients from the public implementation."""


TOY: dict[str, Any] = {
    "image_size": 28, "patch_size": 7, "depth": 2, "width": 32, "head_width": 8, "mlp_hidden": 96, "norm": "layer",
    "qkv_bias": True, "head_bias": True,
}  # fmt: skip
PE: dict[str, Any] = {
    "norm_eps": 1e-5, "embed_norm": True, "key_bias": True, "patch_bias": False, "rope": True, "rope_kind": "pe",
    "rope_grid": 5, "pool": "attention", "pool_heads": 2, "pool_mlp_hidden": 64,
}  # fmt: skip
TOY_TIMM = {"timm-eva01": {}, "timm-pe-l": PE, "timm-pe-g": PE | {"class_token": False}}
TOY_TEXT = TextConfig(context_length=16, vocab_size=64, width=32, depth=1, heads=4)


def model_of(name: str) -> ModelConfig:
    if name in TOY_TIMM:
        return ModelConfig(embed_dim=24, vision=VisionConfig(**(TOY | TOY_TIMM[name])), text=TOY_TEXT)
    if name in IMAGE_TOWERS:
        model = _as_recorded(model_from_image_tower(load_json(f"public-{name}/config.json")))
        return replace(model, embed_dim=24, vision=replace(model.vision, projection=True), text=TOY_TEXT)
    if name == "timm-siglip":  # timm has no toy by name; its towers are transformers' with exact GELU
        model = model_of("transformers-siglip")
        return replace(model, vision=replace(model.vision, mlp="gelu"), text=replace(model.text, mlp="gelu"))
    config = load_json(f"public-{name}/config.json")
    if FORMAT[name] == "openclip":
        return model_from_open_clip(config)
    return _as_recorded(model_from_transformers(config, name.removeprefix("transformers-")))


def _as_recorded(model: ModelConfig) -> ModelConfig:
    """The fixtures' pictures were normalised as CLIP's, whatever the family."""
    return replace(model, vision=replace(model.vision, pixel_norm="clip"))


def source_of(name: str, file: str = "weights") -> ForeignWeights:
    model = model_of(name)
    path = FOLDER / f"public-{name}" / f"{file}.safetensors"
    return ForeignWeights(open_state(path), layout_of(FORMAT[name], model), model, str(path))


def logical(name: str, file: str) -> dict[str, Tensor]:
    if name in IMAGE_TOWERS and file == "grads":  # no gradient for the mask token
        entries_here = entries(
            layout_of("hf", model_of(name)), model_of(name), vision_shapes(model_of(name), head=False)
        )
        found = load_tensors(f"public-{name}/grads")
        tower = {entry.ours: entry.to_ours([found[key] for key in entry.theirs]) for entry in entries_here}
    else:
        source = source_of(name, file)
        tower = {ours: source.read_whole(ours) for ours in source.logical if ours not in MIM_TENSORS}
    rest = load_tensors(f"public-{name}/rest_{file}") if name in IMAGE_TOWERS else {}
    return tower | to_logical(rest, model_of(name))


@pytest.mark.parametrize("name", FORMAT)
def test_weights_go_in_and_out_to_the_bit(name: str) -> None:
    source, theirs = source_of(name), load_tensors(f"public-{name}/weights")
    back: dict[str, Tensor] = {}
    for ours, entry in source.entries.items():
        back |= dict(zip(entry.theirs, entry.to_theirs(source.read_whole(ours)), strict=True))
    derived = {key for key in theirs if key.endswith("position_ids")}
    assert back.keys() == theirs.keys() - derived
    for key, value in back.items():
        assert value.shape == theirs[key].shape and value.equal(theirs[key]), key


def test_perception_encoder_under_its_own_names() -> None:
    """timm's conversion reads the one fixture as the other (tests/golden/make_public_towers.py)."""
    model = model_of("timm-pe-g")
    model = replace(model, vision=replace(model.vision, head_bias=False))
    path = FOLDER / "public-own-pe/weights.safetensors"
    source, theirs = (
        ForeignWeights(open_state(path), layout_of("original", model), model, str(path)),
        load_tensors("public-own-pe/weights"),
    )
    wanted = logical("timm-pe-g", "weights")
    del wanted["vision.head.projection.bias"]
    assert source.logical.keys() == wanted.keys()
    assert all(source.read_whole(ours).equal(value) for ours, value in wanted.items())
    back: dict[str, Tensor] = {}
    for ours, entry in source.entries.items():
        back |= dict(zip(entry.theirs, entry.to_theirs(source.read_whole(ours)), strict=True))
    assert back.keys() == theirs.keys() and all(back[key].equal(theirs[key]) for key in theirs)
    added = layout_of("openclip", model).derived(model)
    assert [(name, int(value.count_nonzero())) for name, value in added.items()] == [("visual.trunk.head.bias", 0)]


@pytest.mark.parametrize("name", [name for name in FORMAT if name not in FROM_TIMM])
def test_the_config_goes_in_and_out(name: str) -> None:
    model = model_of(name)
    if name in IMAGE_TOWERS:
        back = image_tower_from_model(model, family(model))
        assert model_from_image_tower(back) == model_from_image_tower(load_json(f"public-{name}/config.json"))
    elif FORMAT[name] == "openclip":
        assert open_clip_from_model(model) == load_json(f"public-{name}/config.json")
    else:
        back = transformers_from_model(model, family(model), 2.0)
        assert _as_recorded(model_from_transformers(back, family(model))) == model


def run(*arguments: object) -> int:
    return convert.main([str(argument) for argument in arguments])


def test_a_model_by_open_clips_config(tmp_path: Path) -> None:
    file, hub = FOLDER / "public-open-clip-vit/config.json", tmp_path / "open_clip_config.json"
    hub.write_text(json.dumps({"model_cfg": json.loads(file.read_text()), "preprocess_cfg": {}}))
    theirs = model_of("open-clip-vit")
    named = [{"model": f"open_clip:{place}"} for place in (file, hub, tmp_path)] + [{"model": str(file)}]
    for given in named:
        model = resolve({**given, "data": {"shards": ["-"]}}, []).model
        assert (model.preset, model.vision, model.text) == (None, theirs.vision, theirs.text)
    mixed = {"preset": "b16", "vision": {"from": f"open_clip:{file}", "image_size": 56}}
    model = resolve({"model": mixed, "data": {"shards": ["-"]}}, []).model
    assert model.vision == replace(theirs.vision, image_size=56) and model.text == preset_model("b16").text
    model = resolve({"model": "b16", "data": {"shards": ["-"]}}, [f"model.text.from=open_clip:{file}"]).model
    assert model.text == theirs.text and model.vision == preset_model("b16").vision
    eva = tmp_path / "eva.json"
    eva.write_text(json.dumps({"embed_dim": 512, "vision_cfg": {"timm_model_name": "eva02_base_patch16_clip_224"}}))
    assert preset_model(f"open_clip:{eva}").vision == preset_model("b16").vision
    for source, message in (
        ("open_clip:no.json", r"no\.json is no open_clip model config: .*No such file"),
        (f"hf:{file}", "it takes open_clip:FILE.json"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve({"model": {"vision": {"from": source}}, "data": {"shards": ["-"]}}, [])


@pytest.mark.parametrize("name", ["open-clip-vit", "transformers-clip", "transformers-siglip", *IMAGE_TOWERS])
def test_the_command_converts_there_and_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder as the hub has it -> checkpoint -> file or folder of the same project, and of the other one."""
    layout, hub = FORMAT[name], tmp_path / "hub"
    hub.mkdir()
    files = {
        "openclip": ("open_clip_model.safetensors", "open_clip_config.json"),
        "hf": ("model.safetensors", "config.json"),
    }[layout]
    shutil.copy(FOLDER / f"public-{name}/weights.safetensors", hub / files[0])
    config = load_json(f"public-{name}/config.json")
    (hub / files[1]).write_text(json.dumps({"model_cfg": config} if layout == "openclip" else config))
    assert run("--from", layout, "--weights", hub, "--out", tmp_path / "ours") == 0
    out = tmp_path / ("back.safetensors" if layout == "openclip" else "back")
    more = ["--config-out", tmp_path / "back.json"] if layout == "openclip" else []
    assert run("--to", layout, "--checkpoint", tmp_path / "ours", "--out", out, *more) == 0
    theirs, back = load_tensors(f"public-{name}/weights"), open_state(out)
    assert back.shapes.keys() == {key for key in theirs if not key.endswith("position_ids")}
    assert all(back.read(key).equal(theirs[key]) for key in back.shapes)
    assert run("--to", "eva", "--checkpoint", tmp_path / "ours", "--out", tmp_path / "no.safetensors") == 1
    assert "the eva layout has no place for a" in capsys.readouterr().err
    if layout == "openclip":
        assert json.loads((tmp_path / "back.json").read_text()) == config
        assert run("--to", "hf", "--checkpoint", tmp_path / "ours", "--out", tmp_path / "other") == 0
        assert json.loads((tmp_path / "other/config.json").read_text())["architectures"] == ["CLIPModel"]
        assert run("--from", "hf", "--weights", tmp_path / "other", "--out", tmp_path / "again") == 0
        ours, again = Checkpoint(tmp_path / "ours"), Checkpoint(tmp_path / "again")
        assert again.manifest.config["model"] == ours.manifest.config["model"]
        assert all(again.read_whole(key).equal(ours.read_whole(key)) for key in ours.shapes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"ls_init_value": 0.1}}, "vision_cfg.ls_init_value is 0.1"),
        ({"vision_cfg": {"pool_type": "none"}}, "vision_cfg.pool_type is 'none'"),
        ({"vision_cfg": {"swish": True}}, "does not know: swish"),
        (
            {"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "avg"}},
            "SigLIP's (map, none)",
        ),
        ({"text_cfg": {"hf_model_name": "bert"}}, "text_cfg.hf_model_name is 'bert'"),
        ({"text_cfg": {"pool_type": "eos"}}, "text_cfg.pool_type is 'eos'"),
        ({"multimodal_cfg": {}}, "not an open_clip model config: multimodal_cfg"),
    ],
)
def test_switches_of_open_clip_that_are_not_built(change: dict, message: str) -> None:
    config = load_json("public-open-clip-vit/config.json")
    for key, value in change.items():
        config[key] = config.get(key, {}) | value
    with pytest.raises(ModelConfigError, match=re.escape(message)):
        model_from_open_clip(config)


# --- as student and teacher of the MIM stage --------------------------------------------------------------------------


def filled(tower: VisionTower, name: str) -> VisionTower:
    """A tower with the fixture's weights; what the fixture has not is zero."""
    weights, names = logical(name, "weights"), logical_tensors(tower, "vision", 0, 1)
    with torch.no_grad():
        for local, parameter in tower.named_parameters():
            parameter.copy_(weights.get(names[local].name, torch.zeros_like(parameter)))
    return tower


@pytest.mark.parametrize(
    "name", ["transformers-clip", "transformers-siglip", "open-clip-mean", "timm-pe-l", *IMAGE_TOWERS]
)
def test_student_and_teacher_of_the_mim_stage(name: str, mesh: Mesh) -> None:
    """All patches of a plain picture are alike: a mask token that is one of them changes nothing behind it."""
    model = model_of(name)
    v, samples = model.vision, 2
    teacher = filled(VisionTower(model, groups=mesh.vision_groups()), name)
    student = filled(StudentTower(model, target_dim=v.width, groups=mesh.vision_groups()), name)
    embed: Any = student.embed
    projected: Any = teacher.get_submodule("head").projected
    images = torch.full((samples, 3, v.image_size, v.image_size), 0.7)
    masked = torch.zeros(samples, v.patches, dtype=torch.bool)
    masked[0, 3], masked[1, 5:7] = True, True
    with torch.no_grad():
        patch = patchify(images, v.patch_size)[0, 0] @ embed.weight.T
        embed.mask_token.copy_(patch if embed.bias is None else patch + embed.bias)
        student.get_parameter("head.prediction.weight").copy_(torch.eye(v.width))
        predicted = student(images, masked, samples=samples)
        features = teacher_features(teacher, images)
    assert features.shape == (samples, v.patches, model.embed_dim)
    assert deviation(projected(predicted), features[masked]) < LIMIT


@pytest.mark.parametrize("name", ["timm-pe-l", *IMAGE_TOWERS])
def test_fused_blocks_have_the_new_parts(name: str, mesh: Mesh) -> None:
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    found: list[dict[str, Tensor]] = []
    with torch.compiler.set_stance("force_eager"):
        for kernels in ("torch", "fused"):
            model = replace(model_of(name), block_kernels=kernels)
            tower = filled(VisionTower(model, groups=mesh.vision_groups()), name)
            features = tower(images, samples=2)
            features.square().sum().backward()
            found.append(
                {"features": features, **{n: p.grad for n, p in tower.named_parameters() if p.grad is not None}}
            )
    plain, fused = found
    assert plain.keys() == fused.keys()
    scale = float(torch.cat([value.flatten() for value in plain.values()]).norm())
    assert all(deviation(fused[key], plain[key], floor=1e-2 * scale) < LIMIT for key in plain)


# --- through the engine ----------------------------------------------------------------------------------------------


def config_of(name: str, tensor: int, pipeline: int, sequence: bool, micro_batch: int) -> Config:
    model = asdict(model_of(name))
    loss = "sigmoid" if "siglip" in name else "softmax"
    train: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": micro_batch, "patch_dropout": 0.0}
    train |= {"logit_scale": None, "loss": loss}
    parallel = {"tensor": tensor, "pipeline": pipeline, "sequence": sequence}
    return resolve({"model": model, "data": {"shards": ["-"]}, "train": train, "parallel": parallel}, [])


def one_pass(name: str, layout: tuple[int, int, bool, int], mesh: Mesh) -> dict[str, Any]:
    """Features' directions, loss and whole gradients on rank 0."""
    trainer = Trainer(first_phase(config_of(name, *layout)), mesh, prepare())
    load_weights(trainer.towers, logical(name, "weights"))
    step, io = contrastive_step(trainer), load_tensors(f"public-{name}/io")
    rows: list[tuple[Tensor, Tensor]] = []

    def loss(images: Tensor, text: Tensor) -> LossResult:
        rows.append((images, text))
        return step.loss(images, text)

    result = backward_only(step, local_batch(io["images_u8"], io["text"], mesh), loss)
    out = {"loss": result.loss, "gradients": whole_gradients(trainer)}
    everyone = gather_objects((mesh.data.rank, mesh.replica.rank, *rows[0]), mesh.world)
    everyone.sort(key=lambda entry: entry[:2])
    if everyone:
        out |= {"image": torch.cat([e[2] for e in everyone]), "text": torch.cat([e[3] for e in everyone])}
    return out


@pytest.mark.parametrize(("name", "is_bounded"), [("transformers-siglip", False), ("transformers-clip", True)])
def test_the_scale_is_bounded_where_theirs_is(name: str, is_bounded: bool, mesh: Mesh) -> None:
    trainer = Trainer(first_phase(config_of(name, 1, 1, True, 8)), mesh, prepare())
    load_weights(trainer.towers, logical(name, "weights"))
    trainer.optimizer.clamp("logit_scale.log_scale", 4.77, 4.77)  # where SigLIP's published ones lie
    io = load_tensors(f"public-{name}/io")
    trainer.step(local_batch(io["images_u8"], io["text"], mesh))
    trainer.towers.wait_for_weights()
    scale = next(float(p) for tensor, p in trainer.towers.logical_parameters() if tensor.name.startswith("logit_scale"))
    assert (scale <= math.log(100) + 1e-6) == is_bounded, scale  # in fp32


LAUNCHES = {
    "1": (1, [(1, 1, True, 4)]),
    "4": (4, [(2, 2, True, 4)]),
    "2": (2, [(2, 1, True, 4), (2, 1, False, 2), (1, 2, True, 4), (1, 1, True, 4)]),
    "4 more": (4, [(4, 1, True, 4), (1, 2, True, 4), (2, 1, True, 2), (2, 1, False, 4), (1, 1, True, 2)]),
}
"""Name -> ranks, and layouts (tensor, pipeline, sequence, micro-batch)."""


def _cases(launch: str, names: Sequence[str]) -> list[tuple[str, tuple[int, int, bool, int]]]:
    return [(name, layout) for name in names for layout in LAUNCHES[launch][1]]


def run_cases(launch: str, names: Sequence[str]) -> list[dict[str, Any]]:
    mesh = cache(lambda tensor, pipeline: build_mesh(tensor, pipeline, world()))
    return [one_pass(name, layout, mesh(layout[0], layout[1])) for name, layout in _cases(launch, names)]


def check(name: str, found: dict[str, Any]) -> None:
    io, wanted = load_tensors(f"public-{name}/io"), logical(name, "grads")
    for tower in ("image", "text"):
        reference = torch.nn.functional.normalize(io[f"{tower}_features"], dim=-1)
        assert deviation(found[tower], reference) < LIMIT, tower
    assert deviation(torch.as_tensor(found["loss"]), io["loss"]) < LIMIT
    assert found["gradients"].keys() == wanted.keys()
    whole = torch.cat([value.flatten() for value in wanted.values()]).norm()
    for key, value in wanted.items():
        # The gradient of a k bias is zero but for rounding: what is small beside all of them is measured beside them.
        assert deviation(found["gradients"][key], value, floor=1e-2 * float(whole)) < LIMIT, key


@pytest.mark.dist
@pytest.mark.parametrize(
    "launch", ["4", *(pytest.param(launch, marks=pytest.mark.slow) for launch in LAUNCHES if launch != "4")]
)
def test_features_loss_and_gradients_are_theirs(launch: str) -> None:
    results = run_distributed(run_cases, LAUNCHES[launch][0], launch=launch, names=list(FORMAT))[0]
    for (name, layout), found in zip(_cases(launch, list(FORMAT)), results, strict=True):
        try:
            check(name, found)
        except AssertionError as error:
            raise AssertionError(f"{name} at {layout}: {error}") from error
