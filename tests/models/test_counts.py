"""Every preset has the number of parameters and tensors of the real model, to the unit; nothing is allocated."""

from dataclasses import asdict, replace
from math import prod

import pytest
import torch

from engine.checkpoint.load import model_differences
from engine.config.read import PRESETS, ConfigError, preset_model
from engine.parallel.mesh import Mesh
from models.config import completed
from models.formats.eva_names import from_logical
from models.names import preset_of, public_names
from models.tensors.inventory import text_shapes, vision_shapes
from models.tensors.naming import LogicalTensor, logical_tensors
from models.towers.text import TextTower
from models.towers.vision import VisionTower
from tests.golden import load_json

# Vision and text, parameters and tensors. Counted from the authors' own modules; the paper prints rounded numbers
# (Table 4: 17.5 B and 0.7 B for the 18B), which the released files contradict.
REAL = {
    "18b": (17_630_494_720, 694_987_520, 438, 389),
    "8b": (7_526_088_704, 694_659_840, 294, 389),
    "8b-448": (7_529_234_432, 694_659_840, 294, 389),
    "e14-plus": (4_350_556_928, 694_332_160, 840, 389),
    "e14": (4_350_556_928, 354_032_640, 840, 293),
    "l14": (304_105_152, 123_650_304, 512, 149),
    "l14-336": (304_432_832, 123_650_304, 512, 149),
    "b16": (86_263_040, 63_428_096, 260, 149),
    # The tensors of timm's eva_giant_patch14_224 with a head of 1024, and open_clip's text tower.
    "eva01-g14": (1_012_588_928, 123_846_912, 528, 149),
    "eva01-g14-plus": (1_012_588_928, 354_032_640, 528, 293),
    # Not published; the 18B with the position table of 24 x 24 patches.
    "18b-336": (17_630_494_720 + (576 - 256) * 5120, 694_987_520, 438, 389),
}
# Counted from open_clip 3.3.0's models, built from its own configs; vision and text, without the scalars of the loss.
PUBLIC = {
    "vit-b32": (87_849_216, 63_428_096),
    "vit-b16": (86_192_640, 63_428_096),
    "vit-l14": (303_966_208, 123_650_304),
    "vit-l14-336": (304_293_888, 123_650_304),
    "vit-h14": (632_076_800, 354_032_640),
    "vit-g14": (1_012_645_632, 354_032_640),
    "vit-bigg14": (1_844_907_264, 694_659_840),
    "siglip2-b16": (92_884_224, 282_303_744),
    "siglip2-l16": (315_956_224, 565_570_560),
    "siglip2-so400m": (427_680_704, 707_782_896),
    "siglip2-g16": (1_163_168_256, 708_225_648),
    # Less the bias of timm's projection, which the published weights have not.
    "pe-core-l14": (317_152_256 - 1_024, 353_986_560),
    "pe-core-g14": (1_882_033_920 - 1_280, 537_233_920),
}
# Counted from timm 1.0.31 (vit_7b_patch16_dinov3) and transformers 5.24.0 (InternVLVisionModel): towers without
# captions, behind which a projection to 1,280 is this project's.
IMAGE_TOWERS = {"dinov3-7b": 6_716_030_976, "internvit-6b": 5_902_793_600}
AUTHORS_CONFIG = {
    "18b": "EVA-CLIP-18B",
    "8b": "EVA-CLIP-8B",
    "8b-448": "EVA-CLIP-8B-plus",
    "e14-plus": "EVA02-CLIP-bigE-14-plus",
    "b16": "EVA02-CLIP-B-16",
}


def logical_of(preset: str, mesh: Mesh) -> tuple[list[LogicalTensor], list[LogicalTensor]]:
    """Logical tensors of both towers of a preset, built on the meta device."""
    model = preset_model(preset)
    with torch.device("meta"):
        vision = VisionTower(model, groups=mesh.vision_groups())
        text = TextTower(model, groups=mesh.text_groups())
    assert all(p.is_meta for tower in (vision, text) for p in tower.parameters())
    return (
        list(logical_tensors(vision, "vision", 0, 1).values()),
        list(logical_tensors(text, "text", 0, 1).values()),
    )


def elements(tensors: list[LogicalTensor]) -> int:
    """Parameters in all."""
    return sum(prod(tensor.shape) for tensor in tensors)


def test_every_preset_of_a_real_size_is_counted_here() -> None:
    presets = {path.stem for path in PRESETS.glob("*.yaml")}
    assert {
        name for name in presets if not name.startswith("tiny-")
    } == REAL.keys() | PUBLIC.keys() | IMAGE_TOWERS.keys()


@pytest.mark.parametrize("preset", IMAGE_TOWERS)
def test_parameters_of_image_towers(preset: str, mesh: Mesh) -> None:
    vision, _ = logical_of(preset, mesh)
    model = preset_model(preset)
    assert elements(vision) == IMAGE_TOWERS[preset] + 1_280 * model.vision.width
    assert {tensor.name: tensor.shape for tensor in vision} == vision_shapes(model)


@pytest.mark.parametrize("preset", PUBLIC)
def test_parameters_of_public_towers(preset: str, mesh: Mesh) -> None:
    vision, text = logical_of(preset, mesh)
    assert (elements(vision), elements(text)) == PUBLIC[preset]
    model = preset_model(preset)
    assert {tensor.name: tensor.shape for tensor in (*vision, *text)} == vision_shapes(model) | text_shapes(model)


@pytest.mark.parametrize("name", [name for names in public_names().values() for name in names])
def test_public_names_are_presets(name: str) -> None:
    preset, changes = preset_of(name) or ("", {})
    model, plain = preset_model(name.upper()), preset_model(preset)
    assert model.vision == replace(plain.vision, **changes.get("vision", {}))
    assert model.vision.mlp == ("quick_gelu" if "quickgelu" in name or "clip-vit" in name else plain.vision.mlp)


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(ConfigError, match="'EVA03-B' is not a preset"):
        preset_model("EVA03-B")


@pytest.mark.parametrize("preset", REAL)
def test_parameters_and_tensors(preset: str, mesh: Mesh) -> None:
    vision, text = logical_of(preset, mesh)
    assert (elements(vision), elements(text), len(vision), len(text)) == REAL[preset]


@pytest.mark.parametrize("preset", AUTHORS_CONFIG)
def test_the_authors_own_count(preset: str, mesh: Mesh) -> None:
    theirs = load_json("real-tables/param_counts.json")[AUTHORS_CONFIG[preset]]
    vision, text = logical_of(preset, mesh)
    logit_scale = 1
    assert elements(vision) == theirs["visual"]
    assert elements(text) == theirs["text"]
    assert elements(vision) + elements(text) + logit_scale == theirs["total"]
    assert len(vision) + len(text) + logit_scale == theirs["n_tensors"]
    assert preset_model(preset).vision.mlp_hidden == theirs["vision_mlp_hidden"]


def test_every_shape_of_the_18b(mesh: Mesh) -> None:
    """Also the order of dimensions, which a count does not see (through the authors' layout, on meta tensors)."""
    vision, text = logical_of("18b", mesh)
    tensors = {t.name: torch.empty(t.shape, device="meta") for t in (*vision, *text)}
    tensors["logit_scale.log_scale"] = torch.empty(1, device="meta")
    theirs = from_logical(tensors, preset_model("18b"))
    expected = load_json("real-tables/EVA-CLIP-18B.json")["shapes"]
    assert {name: list(value.shape) for name, value in theirs.items()} == expected


def test_a_stored_model_without_later_switches_is_the_same_model() -> None:
    now = asdict(preset_model("tiny-18b"))
    later = (
        "class_token", "pool", "projection", "embed_norm", "key_bias", "patch_bias", "rope_kind", "qk_norm",
        "layer_scale", "registers", "pos_embed", "pool_heads", "pool_mlp_hidden", "final_norm",
    )  # fmt: skip
    then = now | {"vision": {key: value for key, value in now["vision"].items() if key not in later}}
    text = ("context_length", "vocab_size", "width", "depth", "heads", "norm_eps")
    then["text"] = {key: now["text"][key] for key in text}
    assert model_differences(completed(then), now) == []
    assert model_differences(completed(then), now | {"vision": now["vision"] | {"pool": "mean"}}) != []
