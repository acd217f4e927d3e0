"""Checkpoints as trainers and hubs write them: taken, or refused in one line that names file, entry and cure."""

import argparse
import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from engine.checkpoint.foreign import ForeignWeights
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.manifest import Manifest
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.state_dicts.files import open_state
from engine.checkpoint.write import PlannedPart, whole_tensors, write_checkpoint
from engine.config.read import resolve, to_dict
from models.formats.authors import AUTHORS
from models.formats.eva_names import LayoutMismatch
from tests.golden import FOLDER, load_tensors, logical, model_of
from tools.convert import __main__ as convert

FIXTURE, PATCHES = "tiny-18b", "embeddings.patch_embedding.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 36700000000\n"


def module_of(state: dict[str, Tensor]) -> nn.Module:
    """A module whose state dict is `state`, for the real wrappers to wrap."""
    root = nn.Module()
    for name, value in state.items():
        *path, leaf = name.split(".")
        place = root
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Module())
            place = dict(place.named_children())[part]
        place.register_parameter(leaf, nn.Parameter(value.clone()))
    return root


def weights() -> dict[str, Tensor]:
    return dict(load_tensors(f"{FIXTURE}/weights"))


def read_whole(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """All logical tensors of a file."""
    source = ForeignWeights(open_state(path, entry), AUTHORS, model_of(FIXTURE), str(path))
    return {name: source.read_whole(name) for name in source.logical}


def assert_whole(path: Path, entry: str | None = None) -> None:
    found, wanted = read_whole(path, entry), logical(FIXTURE, "weights")
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)


def refused(path: Path, entry: str | None = None) -> str:
    with pytest.raises((CheckpointError, LayoutMismatch)) as caught:
        read_whole(path, entry)
    said = str(caught.value)
    assert ("\n" not in said and str(path) in said) or path.name in said
    return said


# --- what trainers write ---------------------------------------------------------------------------------------------


def wrapped_in_places(module: nn.Module) -> nn.Module:
    """Activation checkpointing around each block and torch.compile around the image tower."""
    visual = module.get_submodule("visual")
    blocks = visual.get_submodule("blocks")
    for name, block in list(blocks.named_children()):
        setattr(blocks, name, checkpoint_wrapper(block))
    compiled: Any = torch.compile(visual)
    module.visual = compiled
    return module


def trainers_files() -> dict[str, object]:
    """What torch.save is given by common trainers."""
    state = weights()
    module = module_of(state)
    compiled: Any = torch.compile(module)
    both: Any = torch.compile(nn.DataParallel(module))
    settings_of_run = argparse.Namespace(lr=1e-3, model="eva", betas=(0.9, 0.98))
    return {
        "DataParallel": nn.DataParallel(module).state_dict(),
        "torch.compile": compiled.state_dict(),
        "DataParallel of torch.compile": nn.DataParallel(compiled).state_dict(),
        "torch.compile of DataParallel": both.state_dict(),
        "average": AveragedModel(module).state_dict(),
        "wrapped in places": wrapped_in_places(module_of(state)).state_dict(),
        "open_clip": {"epoch": 3, "name": "x", "state_dict": nn.DataParallel(module).state_dict(), "optimizer": {}},
        "EVA": {"model": state, "epoch": 3, "args": settings_of_run, "scaler": None},
        "DeepSpeed": {"module": state, "global_steps": 3, "lr_scheduler": None, "dp": np.int64(8)},
        "Lightning": {"state_dict": {f"net.{k}": v for k, v in state.items()}, "pytorch-lightning_version": "2.5"},
        "Lightning, compiled": {"state_dict": {f"model._orig_mod.{k}": v for k, v in state.items()}},
        "nested": {"model": {"module": state}},
        "an unusual entry": {"net": state, "best": np.float32(0.5), "best_at": np.float64(2)},
        "odd entries": state | {"visual._extra_state": None, "epoch": 3, "best": np.float64(0.5), "args": {"lr": 1}},
        "parameters": dict(module.named_parameters()),
        "FSDP": {f"_fsdp_wrapped_module.{k.replace('ks.', 'ks._fsdp_wrapped_module.')}": v for k, v in state.items()},
        "scale of shape [1]": state | {"logit_scale": state["logit_scale"].reshape(1)},
        "token of shape [H]": state | {"visual.cls_token": state["visual.cls_token"].flatten()},
    }  # fmt: skip


def test_files_of_trainers_are_taken(tmp_path: Path) -> None:
    for name, content in trainers_files().items():
        file = tmp_path / f"{name}.pt"
        torch.save(content, file)
        try:
            assert_whole(file)
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error


def test_a_file_before_torch_1_6_is_taken(tmp_path: Path) -> None:
    torch.save({"state_dict": weights()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_whole(tmp_path / "old.pth")


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "weights.safetensors")
    save_file(weights(), tmp_path / "weights.bin")
    assert_whole(tmp_path / "weights.safetensors")
    assert_whole(tmp_path / "weights.bin")


def test_what_stands_beside_the_weights_is_said(tmp_path: Path) -> None:
    torch.save(weights() | {"epoch": 3, "v._extra_state": torch.zeros(2)}, tmp_path / "w.pt")
    assert open_state(tmp_path / "w.pt").left_out == {
        "epoch": "it is an int, no weight",
        "v._extra_state": "no weight",
    }


NAMES = ("visual.cls_token", "visual.blocks.0.norm1.weight", "text.ln_final.bias", "logit_scale")
PREFIXES = ("module.", "_orig_mod.", "model.", "_forward_module.", "net.", "_fsdp_wrapped_module.", "student.")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(PREFIXES), max_size=4), st.lists(st.sampled_from(("model", "state_dict")), max_size=2))
def test_every_chain_of_prefixes_and_wrappers_is_taken(prefixes: list[str], wrappers: list[str]) -> None:
    state = {name: torch.full((2,), float(number)) for number, name in enumerate(NAMES)}
    content: object = {"".join(prefixes) + name: value for name, value in state.items()}
    for wrapper in wrappers:
        content = {wrapper: content, "epoch": 1}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(content, Path(folder) / "w.pt")
        found = open_state(Path(folder) / "w.pt")
        assert {name: found.read(name).tolist() for name in found.shapes} == {n: v.tolist() for n, v in state.items()}


# --- what is refused, and how ----------------------------------------------------------------------------------------


class _Settings:
    """A type of the trainer's own, as configs and paths in checkpoints are."""


def test_a_type_of_the_trainers_own_is_named_with_its_entry(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save({"state_dict": weights(), "hyper_parameters": {"a": 1, "deep": {"b": 2, "config": _Settings()}}}, file)
    said = refused(file)
    assert "entry 'hyper_parameters.deep.config' is of type tests.real_files.test_checkpoints._Settings" in said
    assert "torch.save(model.state_dict(), 'weights.pt')" in said


def test_two_state_dicts_want_a_choice(tmp_path: Path) -> None:
    file, other = tmp_path / "w.pt", {name: value + 1 for name, value in weights().items()}
    torch.save({"student": weights(), "teacher": other}, file)
    assert "--entry student or --entry teacher" in refused(file)
    assert_whole(file, "student")
    assert "has no entry 'ema'; it holds a mapping of 2: 'student' (a mapping of" in refused(file, "ema")
    save_file(weights(), tmp_path / "w.safetensors")
    assert "a safetensors file has one state dict only" in refused(tmp_path / "w.safetensors", "student")


def test_two_names_for_one_tensor_are_refused(tmp_path: Path) -> None:
    both = weights() | {f"module.{name}": value for name, value in weights().items()}
    torch.save(both, tmp_path / "w.pt")
    assert "are both" in refused(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "git-lfs pointer .*36,700,000,000 bytes.*git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "web page"),
        (b"", "is empty"),
        (b"PK\x03\x04 and then nothing", "not a whole one"),
        (b"\x80\x02}q\x00.", "no file of torch.save|holds no state dict"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_weights(content: bytes, message: str, tmp_path: Path) -> None:
    for name in ("w.pt", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
        assert re.search(message, refused(tmp_path / name)), refused(tmp_path / name)


def test_stand_ins_for_config_and_index(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(POINTER)
    assert "git-lfs pointer" in refused(tmp_path)


def cut_file(tmp_path: Path) -> Path:
    torch.save(weights(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-2000])
    return tmp_path / "cut.pt"


def saved(tmp_path: Path, content: object) -> Path:
    torch.save(content, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def script(tmp_path: Path) -> Path:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "w.pt"))
    return tmp_path / "w.pt"


def dcp(tmp_path: Path) -> Path:
    import torch.distributed.checkpoint as writer

    writer.save({"model": weights()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    return tmp_path / "dcp"


REFUSED = {
    "cut short": (cut_file, "copy or download it again"),
    "TorchScript": (script, "torch.jit.load('w.pt', 'cpu').state_dict()"),
    "torch.distributed.checkpoint": (dcp, "format_utils dcp_to_torch"),
    "whole module": (lambda t: saved(t, nn.Linear(2, 2)), "torch.save(model.state_dict()"),
    "a tensor": (lambda t: saved(t, torch.ones(2)), "holds no state dict"),
    "a list": (lambda t: saved(t, [torch.ones(2)]), "holds no state dict"),
    "nothing in it": (lambda t: saved(t, {"epoch": 3}), "'epoch' (an int)"),
    "on meta": (lambda t: saved(t, weights() | {"x": torch.ones(2, device="meta")}), "'x' is on the meta device"),
    "sparse": (lambda t: saved(t, weights() | {"x": torch.eye(3).to_sparse()}), "'x' is quantised or sparse"),
    "int8": (lambda t: saved(t, weights() | {"visual.cls_token": torch.ones(64).char()}), "visual.cls_token is int8"),
    "ZeRO-3": (lambda t: saved(t, {"module": {k: torch.empty(0) for k in weights()}}), "zero_to_fp32.py"),
    "flat FSDP": (lambda t: saved(t, {"_fsdp_wrapped_module._flat_param": torch.ones(2)}), "FULL_STATE_DICT"),
    "another layout": (lambda t: saved(t, {f"vision_model.{PATCHES}": torch.ones(2)}), "--from hf"),
    "another model": (lambda t: saved(t, {"fc.weight": torch.ones(2), "fc.bias": torch.ones(2)}), "it holds"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    assert message in refused(make(tmp_path))


def test_a_dtype_of_safetensors_that_is_not_read_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "w.safetensors")
    assert "x is F8_E4M3" in refused(tmp_path / "w.safetensors")


# --- folders of hubs -------------------------------------------------------------------------------------------------


def in_two_files(folder: Path, suffix: str, stale: bool) -> Path:
    """A folder as transformers writes it; stale: the second file holds an older tensor of the first file, too."""
    state, save = weights(), save_file if suffix == "safetensors" else torch.save
    names = sorted(state)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    halves = {f"{stem}-00001-of-00002.{suffix}": names[::2], f"{stem}-00002-of-00002.{suffix}": names[1::2]}
    folder.mkdir()
    for file, held in halves.items():
        content = {name: state[name] for name in held}
        if stale and file.startswith(f"{stem}-00002"):
            content |= {names[0]: torch.zeros(2), "left.over": torch.zeros(2)}
        save(content, folder / file)
    index = {name: file for file, held in halves.items() for name in held}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_index_decides(suffix: str, tmp_path: Path) -> None:
    assert_whole(in_two_files(tmp_path / "whole", suffix, stale=False))
    folder = in_two_files(tmp_path / "stale", suffix, stale=True)
    assert_whole(folder)
    left = open_state(folder).left_out
    assert len(left) == 2 and set(left.values()) == {"the index does not name it there"}
    index = next(folder.glob("*.index.json"))
    content = json.loads(index.read_text())
    content["weight_map"]["left.over"] = sorted(content["weight_map"].values())[0]
    index.write_text(json.dumps(content))
    assert "left.over" in refused(folder)
    next(folder.glob("*00002-of*")).unlink()
    assert "00002-of-00002" in refused(folder) and "not beside it" in refused(folder)


def test_the_same_tensor_twice_without_an_index(tmp_path: Path) -> None:
    next(in_two_files(tmp_path / "stale", "safetensors", stale=True).glob("*.index.json")).unlink()
    assert "keep one of the files, or the index" in refused(tmp_path / "stale")


def test_a_hub_folder_with_several_formats(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    torch.save({"other": torch.ones(2)}, tmp_path / "training_args.bin")
    torch.save(weights(), tmp_path / "pytorch_model.bin")
    assert_whole(tmp_path)


def test_a_checkpoint_of_this_project_is_no_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert "--to" in refused(tmp_path)


# --- the temperature, and what goes out ------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return convert.main([str(argument) for argument in arguments])


def fixed_temperature(folder: Path, scale: float) -> Path:
    """A checkpoint of a run whose temperature was fixed, as the recipes have it: no logit_scale tensor."""
    whole = {name: value for name, value in logical(FIXTURE, "weights").items() if name != "logit_scale.log_scale"}
    config = resolve({"model": FIXTURE, "data": {"shards": ["-"]}, "train": {"logit_scale": scale}}, [])
    layout = {"tensor": 1, "pipeline": 1, "data": 1}
    manifest = Manifest(content="weights", config=to_dict(config), layout=layout, tensors={}, files={}, source="a run")

    def read(part: PlannedPart) -> Tensor:
        return whole[part.key.removeprefix("weight/")]

    tensors = [(f"weight/{name}", value.dtype, tuple(value.shape)) for name, value in whole.items()]
    write_checkpoint(folder, whole_tensors(tensors), read, manifest)
    return folder


def test_a_fixed_temperature_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = fixed_temperature(tmp_path / "run", 20.0)
    for layout, name in (("eva", "eva.safetensors"), ("openclip", "oc.pt"), ("hf", "hf")):
        for cast in ([], ["--dtype", "bf16"]):
            out = tmp_path / "_".join([*cast, name])
            assert run("--to", layout, "--checkpoint", checkpoint, *cast, "--out", out) == 0
            state = open_state(out)
            assert state.shapes["logit_scale"] == () and state.dtypes["logit_scale"] == torch.float32
            assert float(state.read("logit_scale")) == pytest.approx(math.log(20), abs=1e-7)  # 2.9957
            assert "2.9957 is ln of train.logit_scale=20" in capsys.readouterr().out
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["logit_scale_init_value"] == pytest.approx(2.9957, abs=1e-4)
    assert run("--from", "hf", "--weights", tmp_path / "hf", "--out", tmp_path / "again") == 0
    again = Checkpoint(tmp_path / "again")
    assert float(again.read_whole("logit_scale.log_scale")) == pytest.approx(math.log(20), abs=1e-7)
    assert again.manifest.config["train"]["logit_scale"] is None  # it is a tensor now


def test_config_json_says_the_learned_temperature(tmp_path: Path) -> None:
    file = FOLDER / FIXTURE / "weights.safetensors"
    assert run("--from", "eva", "--model", FIXTURE, "--weights", file, "--out", tmp_path / "ours") == 0
    assert run("--to", "hf", "--checkpoint", tmp_path / "ours", "--out", tmp_path / "hf") == 0
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["logit_scale_init_value"] == float(weights()["logit_scale"])


def test_a_file_without_temperature_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {name: value for name, value in weights().items() if name != "logit_scale"}
    save_file(state, tmp_path / "w.safetensors")
    out = tmp_path / "ours"
    assert run("--from", "eva", "--model", FIXTURE, "--weights", tmp_path / "w.safetensors", "--out", out) == 0
    assert "no logit_scale in the file" in capsys.readouterr().out
    assert run("--to", "tower", "--tower", "text", "--checkpoint", out, "--out", tmp_path / "text.safetensors") == 0


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.safetensors"])
def test_a_file_is_what_its_name_says(name: str, tmp_path: Path) -> None:
    file = FOLDER / FIXTURE / "weights.safetensors"
    assert run("--from", "eva", "--model", FIXTURE, "--weights", file, "--out", tmp_path / "ours") == 0
    assert run("--to", "eva", "--dtype", "bf16", "--checkpoint", tmp_path / "ours", "--out", tmp_path / name) == 0
    read = load_file if name.endswith("safetensors") else lambda path: torch.load(path, weights_only=True)
    state = read(tmp_path / name)
    assert state.keys() == weights().keys()
    assert all(state[n].equal(v.bfloat16()) for n, v in weights().items() if n != "logit_scale")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["ours", "ours.tensors.txt", name, f"{name}.tensors.txt"]
    )


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("w.ckpt", "end the name in .safetensors"),
        ("missing/w.pt", "there is no folder"),
        ("w.safetensors/", "exists: name another"),
        ("../proc/w.safetensors", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_is_found_before_the_work(
    out: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(self: Checkpoint) -> None:
        raise AssertionError("the work has begun")

    checkpoint = fixed_temperature(tmp_path / "run", 20.0)
    monkeypatch.setattr(Checkpoint, "verify", too_late)
    place = Path("/proc/w.safetensors") if "proc" in out else tmp_path / out
    if out.endswith("/"):
        place.mkdir()
    table = tmp_path / "table.txt"
    assert run("--to", "eva", "--checkpoint", checkpoint, "--out", place, "--table", table) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and str(place).rstrip("/") in said


def test_fp16_that_would_overflow_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = weights()
    state["visual.cls_token"] = torch.full_like(state["visual.cls_token"], 1e5)
    save_file(state, tmp_path / "w.safetensors")
    arguments = ("--from", "eva", "--model", FIXTURE, "--weights", tmp_path / "w.safetensors")
    assert run(*arguments, "--dtype", "fp16", "--out", tmp_path / "x") == 1
    assert "vision.embed.cls_token: 64 of 64 values are beyond fp16's" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_error_type_for_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_state(tmp_path / "absent.pt")


# --- open_clip's hub folder ------------------------------------------------------------------------------------------


def test_an_open_clip_folder_as_it_is_on_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = fixed_temperature(tmp_path / "run", 20.0)
    folder = tmp_path / "hub"
    folder.mkdir()
    file = folder / "open_clip_model.safetensors"
    assert run("--to", "openclip", "--checkpoint", checkpoint, "--out", file) == 0
    config = json.loads((FOLDER / FIXTURE / "config.json").read_text())
    for mean, said, kind in (
        ([0.5, 0.5, 0.5], "", "half"),
        ([0.4, 0.5, 0.5], "which no model.vision.pixel_norm", "clip"),
    ):
        preprocess = {"mean": mean, "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
        assert run("--from", "openclip", "--weights", folder, "--out", tmp_path / kind) == 0
        out = capsys.readouterr().out
        assert said in out and ("preprocess_cfg" in out) == bool(said)
        assert Checkpoint(tmp_path / kind).manifest.config["model"]["vision"]["pixel_norm"] == kind
    ours, again = Checkpoint(checkpoint), Checkpoint(tmp_path / "half")
    assert all(again.read_whole(name).equal(ours.read_whole(name)) for name in ours.shapes())
    arguments = ("--config", folder / "open_clip_config.json", "--weights", file)
    assert run("--from", "openclip", *arguments, "--out", tmp_path / "by_file") == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "a JSON list"), ("{", "is not JSON"), ('{"embed_dim": 1, "vision_cfg": {"layers": "many"}}', "malformed")],
)
def test_a_config_that_is_none(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.json").write_text(content)
    file = FOLDER / FIXTURE / "weights.safetensors"
    arguments = ("--from", "eva", "--config", tmp_path / "c.json", "--weights", file, "--out", tmp_path / "x")
    assert run(*arguments) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
