"""tools.convert: there and back to the bit in every layout, a report of every key, and what does not fit is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.reader import Checkpoint
from models.config import ModelConfig
from models.formats.authors import AUTHORS
from models.formats.base import entries
from models.formats.eva_config import eva_from_model, model_from_eva
from models.tensors.inventory import clip_shapes
from tests.golden import ARCHITECTURES, FOLDER, load_json, load_tensors, model_of
from tools.convert import __main__ as convert


def run(*arguments: object) -> int:
    return convert.main([str(argument) for argument in arguments])


def from_eva(fixture: str, out: Path, weights: Path | None = None) -> Path:
    folder = FOLDER / fixture
    file = weights or folder / "weights.safetensors"
    assert run("--from", "eva", "--config", folder / "config.json", "--weights", file, "--out", out) == 0
    return out


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and value.shape == other[name].shape and value.equal(other[name]), name


@pytest.mark.parametrize("fixture", ARCHITECTURES)
def test_eva_to_ours_to_eva(fixture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = from_eva(fixture, tmp_path / "ours")
    assert len(capsys.readouterr().out.splitlines()) <= 4  # the table is in a file
    report = (tmp_path / "ours.tensors.txt").read_text().splitlines()
    theirs = load_tensors(f"{fixture}/weights")
    assert {line.split(" -> ")[0] for line in report if " -> " in line} == theirs.keys()
    assert Checkpoint(checkpoint).manifest.config["model"]["vision"] == vars(model_of(fixture).vision)
    out, config = tmp_path / "back.safetensors", tmp_path / "back.json"
    assert run("--to", "eva", "--checkpoint", checkpoint, "--out", out, "--config-out", config) == 0
    same(load_file(out), theirs)  # the rope tables as well
    assert model_from_eva(json.loads(config.read_text()))[0] == model_from_eva(load_json(f"{fixture}/config.json"))[0]


@pytest.mark.parametrize("fixture", ARCHITECTURES)
@pytest.mark.parametrize("layout", ["hf", "openclip"])
def test_through_another_layout(fixture: str, layout: str, tmp_path: Path) -> None:
    checkpoint = from_eva(fixture, tmp_path / "ours")
    there = tmp_path / ("folder" if layout == "hf" else "file.safetensors")
    assert run("--to", layout, "--checkpoint", checkpoint, "--out", there) == 0
    model = [] if layout == "hf" else ["--config", FOLDER / fixture / "config.json"]
    assert run("--from", layout, "--weights", there, *model, "--out", tmp_path / "again") == 0
    assert Checkpoint(tmp_path / "again").manifest.config["model"] == Checkpoint(checkpoint).manifest.config["model"]
    assert run("--to", "eva", "--checkpoint", tmp_path / "again", "--out", tmp_path / "back.safetensors") == 0
    same(load_file(tmp_path / "back.safetensors"), load_tensors(f"{fixture}/weights"))


def test_names_of_the_other_layouts(tmp_path: Path) -> None:
    """Spot checks against the tables of docs/foreign_layouts.md; a round trip alone would accept any bijection."""
    checkpoint = from_eva("tiny-eva02-B", tmp_path / "ours")
    theirs = load_tensors("tiny-eva02-B/weights")
    run("--to", "hf", "--checkpoint", checkpoint, "--out", tmp_path / "hf")
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())["weight_map"]
    hf = {name: value for file in set(index.values()) for name, value in load_file(tmp_path / "hf" / file).items()}
    assert hf.keys() == index.keys()
    assert hf["text_projection.weight"].equal(theirs["text.text_projection"].T)
    assert hf["vision_model.encoder.layers.3.mlp.fc3.weight"].equal(theirs["visual.blocks.3.mlp.w3.weight"])
    assert hf["vision_model.encoder.layers.0.self_attn.v_proj.bias"].equal(theirs["visual.blocks.0.attn.v_bias"])
    key = theirs["text.transformer.resblocks.1.attn.in_proj_weight"][32:64]
    assert hf["text_model.encoder.layers.1.self_attn.k_proj.weight"].equal(key)
    assert hf["vision_model.embeddings.class_embedding"].equal(theirs["visual.cls_token"][0, 0])
    run("--to", "openclip", "--checkpoint", checkpoint, "--out", tmp_path / "oc.safetensors")
    oc = load_file(tmp_path / "oc.safetensors")
    assert oc["visual.trunk.blocks.2.mlp.fc1_g.weight"].equal(theirs["visual.blocks.2.mlp.w1.weight"])
    assert oc["visual.trunk.blocks.2.attn.norm.bias"].equal(theirs["visual.blocks.2.attn.inner_attn_ln.bias"])
    assert oc["visual.trunk.blocks.2.attn.q_proj.bias"].equal(theirs["visual.blocks.2.attn.q_bias"])
    assert oc["text.positional_embedding"].equal(theirs["text.positional_embedding"])


def test_every_tensor_of_the_real_18b_has_its_place() -> None:
    model = ModelConfig(
        embed_dim=1536,
        vision=model_from_eva(REAL_18B)[0].vision,
        text=model_from_eva(REAL_18B)[0].text,
    )
    shapes = clip_shapes(model)
    found = {n: s for e in entries(AUTHORS, model, shapes) for n, s in e.their_shapes(shapes[e.ours]).items()}
    real = {name: tuple(shape) for name, shape in load_json("real-tables/EVA-CLIP-18B.json")["shapes"].items()}
    assert found == real


REAL_18B = {
    "embed_dim": 1536,
    "vision_cfg": {
        "image_size": 224, "layers": 48, "width": 5120, "head_width": 128, "mlp_ratio": 5, "patch_size": 14,
        "eva_model_name": "eva-clip-18b-14-x", "drop_path_rate": 0, "qkv_bias": False, "xattn": True, "postnorm": True,
        "fusedLN": False, "use_rms_norm": True,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1280, "heads": 20, "layers": 32, "fusedLN": False},
}  # fmt: skip


# --- variants of the authors' files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_pt_files_flat_or_wrapped(wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    theirs = load_tensors("tiny-18b/weights")
    state: dict = {f"{prefix}{name}": value for name, value in theirs.items()}
    file = tmp_path / "weights.pt"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, file)
    checkpoint = from_eva("tiny-18b", tmp_path / "ours", file)
    assert run("--to", "eva", "--checkpoint", checkpoint, "--out", tmp_path / "back.safetensors") == 0
    same(load_file(tmp_path / "back.safetensors"), theirs)


def test_text_tower_at_the_top_level(tmp_path: Path) -> None:
    theirs = load_tensors("tiny-8b/weights")
    save_file({name.removeprefix("text."): value for name, value in theirs.items()}, tmp_path / "f.safetensors")
    checkpoint = from_eva("tiny-8b", tmp_path / "ours", tmp_path / "f.safetensors")
    run("--to", "eva", "--checkpoint", checkpoint, "--out", tmp_path / "back.safetensors")
    same(load_file(tmp_path / "back.safetensors"), theirs)


def test_a_bare_image_tower_in_half_precision(tmp_path: Path) -> None:
    theirs = load_tensors("tiny-bigE/weights")
    vision = {n.removeprefix("visual."): v.half() for n, v in theirs.items() if n.startswith("visual.")}
    save_file(vision, tmp_path / "f.safetensors")
    checkpoint = from_eva("tiny-bigE", tmp_path / "ours", tmp_path / "f.safetensors")
    run("--to", "eva", "--checkpoint", checkpoint, "--out", tmp_path / "back.safetensors")
    same(load_file(tmp_path / "back.safetensors"), {f"visual.{name}": value for name, value in vision.items()})


@pytest.mark.parametrize("student", ["style18b", "style8b", "eva02B"])
def test_mim_students_with_mask_token_and_prediction_head(student: str, tmp_path: Path) -> None:
    theirs = {
        name.removeprefix(f"{student}."): value
        for name, value in load_tensors("g8-mim/weights").items()
        if name.startswith(f"{student}.")
    }
    save_file(theirs, tmp_path / "f.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_of_student(student, theirs)))
    arguments = ("--config", tmp_path / "config.json", "--weights", tmp_path / "f.safetensors")
    assert run("--from", "eva", *arguments, "--out", tmp_path / "ours") == 0
    assert run("--to", "eva", "--checkpoint", tmp_path / "ours", "--out", tmp_path / "back.safetensors") == 0
    back = load_file(tmp_path / "back.safetensors")
    learned = {name: value for name, value in theirs.items() if "rope." not in name}
    same({name: value for name, value in back.items() if "rope." not in name}, learned)
    assert back.keys() == theirs.keys()


def config_of_student(student: str, state: dict[str, torch.Tensor]) -> dict:
    width = state["norm.weight"].shape[0]
    hidden = state["blocks.0.mlp.w1.bias" if student == "eva02B" else "blocks.0.mlp.fc1.bias"].shape[0]
    vision = {
        "image_size": 56, "patch_size": 14, "width": width, "head_width": 8, "mlp_ratio": (hidden + 0.5) / width,
        "layers": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
    }  # fmt: skip
    if student == "eva02B":
        vision |= {"rope": True, "intp_freq": True, "naiveswiglu": True, "subln": True}
    else:
        vision |= {"qkv_bias": False, "use_rms_norm": True, "postnorm": student == "style18b"}
    return {"embed_dim": 32, "vision_cfg": vision}


def test_one_tower_as_plain_safetensors_and_a_cast(tmp_path: Path) -> None:
    checkpoint = from_eva("tiny-18b", tmp_path / "ours")
    out = tmp_path / "vision.safetensors"
    assert run("--to", "tower", "--tower", "vision", "--dtype", "bf16", "--checkpoint", checkpoint, "--out", out) == 0
    ours = Checkpoint(checkpoint)
    names = {name for name in ours.shapes() if name.startswith("vision.")}
    tower = load_file(out)
    assert tower.keys() == names
    assert all(tower[name].equal(ours.read_whole(name).bfloat16()) for name in names)


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 1
    return capsys.readouterr().err


def test_what_does_not_fit_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = dict(load_tensors("tiny-18b/weights"))
    del state["visual.norm.weight"]
    state["visual.blocks.0.gamma_1"] = torch.ones(1)
    state["visual.head.weight"] = torch.ones(3, 64)
    save_file(state, tmp_path / "f.safetensors")
    config = FOLDER / "tiny-18b/config.json"
    arguments = ("--from", "eva", "--config", config, "--weights", tmp_path / "f.safetensors", "--out", tmp_path / "x")
    said = refusal(capsys, *arguments)
    assert "1 missing: visual.norm.weight" in said and "1 unexpected: visual.blocks.0.gamma_1 [1]" in said
    assert "visual.head.weight is [3, 64], the model has [32, 64]" in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quick_gelu": True}, "quick_gelu is true"),
        ({"vision_cfg": {"global_average_pool": True}}, "vision_cfg.global_average_pool is True"),
        ({"vision_cfg": {"ls_init_value": 0.1}}, "vision_cfg.ls_init_value is 0.1"),
        ({"vision_cfg": {"swishglu": True}}, "does not know: swishglu"),
        ({"vision_cfg": {"rope": True, "head_width": 16}}, "rope without intp_freq"),
        ({"text_cfg": {"hf_model_name": "bert"}}, "text_cfg.hf_model_name is 'bert'"),
    ],
)
def test_switches_that_cannot_be_expressed_are_refused(
    change: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_json("tiny-18b/config.json")
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (tmp_path / "c.json").write_text(json.dumps(config))
    weights = FOLDER / "tiny-18b/weights.safetensors"
    arguments = ("--from", "eva", "--config", tmp_path / "c.json", "--weights", weights, "--out", tmp_path / "x")
    assert message in refusal(capsys, *arguments)


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil-was-here"),))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"visual.cls_token": _Evil()}, tmp_path / "f.pt")
    config = FOLDER / "tiny-18b/config.json"
    arguments = ("--from", "eva", "--config", config, "--weights", tmp_path / "f.pt", "--out", tmp_path / "x")
    assert "cannot be read with weights_only" in refusal(capsys, *arguments)
    assert not Path("evil-was-here").exists()


def test_an_output_that_exists_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = from_eva("tiny-18b", tmp_path / "ours")
    folder = FOLDER / "tiny-18b"
    arguments = ("--config", folder / "config.json", "--weights", folder / "weights.safetensors", "--out", checkpoint)
    assert "exists: name" in refusal(capsys, "--from", "eva", *arguments)
    Checkpoint(checkpoint).verify()


def test_an_index_that_points_outside_its_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"weight_map": {"logit_scale": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    arguments = ("--from", "hf", "--model", "tiny-18b", "--weights", tmp_path, "--out", tmp_path / "x")
    assert "points outside its folder" in refusal(capsys, *arguments)


def test_a_config_that_the_authors_cannot_express_has_no_json() -> None:
    model = model_of("tiny-18b")
    assert eva_from_model(model)["vision_cfg"]["postnorm"] is True
    with pytest.raises(Exception, match="head_bias to qkv_bias"):
        eva_from_model(replace(model, vision=replace(model.vision, head_bias=True)))
