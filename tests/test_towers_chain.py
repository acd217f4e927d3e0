"""A public ViT goes on here and back: open_clip's file -> 20 steps at TP 2 x PP 2 -> a file that it loads strictly.

Where open_clip is installed, it makes the first file and reads the last one; its features are then ours. Without it the
first file is noise under open_clip's names, and the last one must have every name and shape of it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import load_model
from models.formats import layout_of
from models.formats.base import entries
from models.formats.open_clip_config import model_from_open_clip
from models.tensors.inventory import clip_shapes
from tests.data.shard_factory import make_shards
from tests.golden import deviation

ROOT = Path(__file__).parents[1]
CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 4, "width": 32, "head_width": 8, "patch_size": 7},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
OPEN_CLIP = importlib.util.find_spec("open_clip") is not None


def _theirs(state: dict[str, Tensor] | None = None) -> Any:
    """open_clip's model, with a state dict loaded strictly."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.model.CLIP(**CONFIG).eval()
    if state is not None:
        model.load_state_dict(state, strict=True)
    return model


def _first_file(path: Path) -> None:
    if OPEN_CLIP:
        state = _theirs().state_dict()
    else:
        model, generator = model_from_open_clip(CONFIG), torch.Generator().manual_seed(0)
        shapes = clip_shapes(model)
        table = entries(layout_of("openclip", model), model, shapes)
        every = {name: shape for entry in table for name, shape in entry.their_shapes(shapes[entry.ours]).items()}
        state = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in every.items()}
    save_file({name: value.contiguous() for name, value in state.items() if name != "attn_mask"}, path)


def _run(*command: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.dist
def test_an_open_clip_vit_goes_on_and_back(tmp_path: Path) -> None:
    first, last, config = tmp_path / "first.safetensors", tmp_path / "last.safetensors", tmp_path / "model.json"
    start, run = tmp_path / "start", tmp_path / "run"
    config.write_text(json.dumps(CONFIG))
    _first_file(first)
    (tmp_path / "shards").mkdir()
    shards = make_shards(tmp_path / "shards", [16, 16])
    _run("tools.convert", "--from", "openclip", "--config", config, "--weights", first, "--out", start)
    job = tmp_path / "job.yaml"
    settings = {
        "model": f"open_clip:{config}",
        "data": {"shards": shards, "workers": 0},
        "init": {"vision": str(start), "text": str(start), "logit_scale": str(start)},
        "train": {
            "steps": 20,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "logit_scale": None,
            "patch_dropout": 0.5,
        },
        "parallel": {"tensor": 2, "pipeline": 2},
        "checkpoint": {"every_steps": 20},
        "run_dir": str(run),
    }
    job.write_text(json.dumps(settings))
    launch = ("torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", 4)
    _run(*launch, "-m", "engine.train", job)
    _run(
        "tools.convert", "--to", "openclip", "--checkpoint", run, "--out", last, "--config-out", tmp_path / "back.json"
    )

    assert json.loads((tmp_path / "back.json").read_text()) == CONFIG
    before, after = load_file(first), load_file(last)
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert not after["visual.conv1.weight"].equal(before["visual.conv1.weight"]), "nothing was trained"
    again = tmp_path / "again"
    _run("tools.convert", "--from", "openclip", "--config", config, "--weights", last, "--out", again)
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    ours, ids = load_model(str(run)), load_model(str(run)).tokenize(["a red fox", "two boats", "rain"])
    with torch.no_grad():
        image, text = ours.encode_image(images), ours.encode_text(ids)
        assert load_model(str(again)).encode_image(images).equal(image)
        if OPEN_CLIP:
            theirs = _theirs(after)
            assert deviation(theirs.encode_image(images, normalize=True), image) < 1e-5
            assert deviation(theirs.encode_text(ids, normalize=True), text) < 1e-5
