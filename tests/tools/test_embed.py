"""tools.embed: reference features at every layout, from .npz and from shards, in blocks, in input order."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.pixels.decode.resize import cut
from data.pixels.transforms import Squash, normalise
from data.shards.write import write_shard
from engine.checkpoint.reader import Checkpoint
from engine.config.read import ConfigError
from engine.evaluation.embedder import fitting_layout, inference_config, load_encoders
from engine.evaluation.session import Session
from engine.parallel.device import prepare
from tests.checkpoint.jobs import (
    CONTEXT,
    SIDE,
    VOCABULARY,
    alone,
    build,
    job_config,
    run_steps,
    save,
    world_mesh,
)
from tests.data.shard_factory import encode, make_shards, picture
from tests.distributed import MANY_CASES_S, run_distributed
from tests.golden import ARCHITECTURES, FOLDER, load_io, pixels
from tools.convert import __main__ as convert
from tools.embed import __main__ as embed
from tools.evaluate import __main__ as evaluate

TOLERANCE = 1e-5
LAYOUTS = {
    "PP 2": ["parallel.pipeline=2"],
    "PP 4": ["parallel.pipeline=4"],
    "TP 2 x PP 2": ["parallel.tensor=2", "parallel.pipeline=2"],
    "TP 4": ["parallel.tensor=4"],
}
THREE_HEADS = ("tiny-bigE", "tiny-eva02-B")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and an .npz of inputs of each golden architecture."""
    folder = tmp_path_factory.mktemp("converted")
    for fixture in ARCHITECTURES:
        source = FOLDER / fixture
        files = ["--config", str(source / "config.json"), "--weights", str(source / "weights.safetensors")]
        assert convert.main(["--from", "eva", *files, "--out", str(folder / fixture)]) == 0
        np.savez(folder / f"{fixture}.npz", images=pixels(fixture).numpy(), tokens=load_io(fixture)["text"].numpy())
    return folder


def worst_error(fixture: str, out: Path) -> float:
    """Largest difference to the reference embeddings."""
    io, found = load_io(fixture), np.load(out)
    image = np.abs(found["image_embeddings"] - io["image_features_norm"].numpy()).max()
    text = np.abs(found["text_embeddings"] - io["text_features_norm"].numpy()).max()
    return float(max(image, text))


def _embed_here(checkpoint: Path, npz: Path, out: Path, overrides: list[str], micro_batch: int) -> None:
    """What `main` does after the process group exists (in a test it exists already)."""
    opened = Checkpoint(checkpoint)
    config = inference_config(opened.manifest, overrides, world_size=4, micro_batch=micro_batch)
    session = Session(config, world_mesh(config), prepare().torch_device, opened)
    embed._embed(argparse.Namespace(npz=npz, shards=None, out=out, skip_hashes=False, ema=False), session)


def _at_every_layout(folder: Path, uneven: Path) -> None:
    for fixture in ARCHITECTURES:
        for name, overrides in LAYOUTS.items():
            if "TP" in name and fixture in THREE_HEADS:
                continue
            out = folder / f"{fixture} {name}.npz"
            _embed_here(folder / fixture, folder / f"{fixture}.npz", out, overrides, micro_batch=2)
    for name in ("PP 2", "PP 4"):
        _embed_here(uneven, folder / "uneven.npz", folder / f"uneven {name}.npz", LAYOUTS[name], micro_batch=3)


@pytest.mark.dist
def test_reference_features_at_every_layout(converted: Path, tmp_path: Path) -> None:
    """Also where stages are unequal: five blocks on two and four stages against one rank."""
    with alone() as mesh:
        trainer = build(job_config(tmp_path / "run"), mesh)
        run_steps(trainer, 2)
        uneven = save(trainer)
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, VOCABULARY, (11, CONTEXT), generator=draw)
    np.savez(
        converted / "uneven.npz", images=torch.randn(13, 3, SIDE, SIDE, generator=draw).numpy(), tokens=tokens.numpy()
    )
    run_distributed(_at_every_layout, 4, folder=converted, uneven=uneven, timeout_s=MANY_CASES_S)
    found = {
        f"{fixture} {name}": worst_error(fixture, file)
        for fixture in ARCHITECTURES
        for name in LAYOUTS
        if (file := converted / f"{fixture} {name}.npz").exists()
    }
    assert len(found) == 4 * 4 - 2 * 2
    assert all(error <= TOLERANCE for error in found.values()), found
    one = tmp_path / "one.npz"
    assert embed.main(["--checkpoint", str(uneven), "--npz", str(converted / "uneven.npz"), "--out", str(one)]) == 0
    reference = np.load(one)
    assert reference["image_embeddings"].shape == (13, 16) and reference["text_embeddings"].shape == (11, 16)
    for name in ("PP 2", "PP 4"):
        other = np.load(converted / f"uneven {name}.npz")
        for column in ("image_embeddings", "text_embeddings"):
            assert np.abs(other[column] - reference[column]).max() <= TOLERANCE


@pytest.mark.parametrize("columns", [("images",), ("tokens",), ("images", "tokens")])
@pytest.mark.parametrize("compressed", [False, True])
def test_either_input_alone_and_in_blocks(
    converted: Path, tmp_path: Path, columns: tuple[str, ...], compressed: bool
) -> None:
    source = np.load(converted / "tiny-8b.npz")
    (np.savez_compressed if compressed else np.savez)(tmp_path / "in.npz", **{name: source[name] for name in columns})
    out = tmp_path / "out.npz"
    arguments = ["--checkpoint", str(converted / "tiny-8b"), "--npz", str(tmp_path / "in.npz"), "--out", str(out)]
    assert embed.main([*arguments, "--micro-batch", "1"]) == 0  # two blocks of four
    found, io = np.load(out), load_io("tiny-8b")
    assert set(found) == {{"images": "image_embeddings", "tokens": "text_embeddings"}[name] for name in columns}
    if "images" in columns:
        assert np.abs(found["image_embeddings"] - io["image_features_norm"].numpy()).max() <= TOLERANCE
    assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert embed.main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err


def test_inputs_that_do_not_fit_are_refused(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(checkpoint: Path = converted / "tiny-8b", *extra: str, **arrays: Any) -> str:
        np.savez(tmp_path / "in.npz", **arrays)
        out = tmp_path / "out.npz"
        return refusal(capsys, "--checkpoint", checkpoint, "--npz", tmp_path / "in.npz", "--out", out, *extra)

    assert "neither `images` nor `tokens`" in said(pixels=np.zeros(3))
    assert "the model wants [N, 3, 56, 56]" in said(images=np.zeros((2, 3, 28, 28), np.float32))
    assert "must be normalised floats" in said(images=np.zeros((2, 3, 56, 56), np.uint8))
    assert "the vocabulary has 320 ids" in said(tokens=np.full((1, 16), 320))
    assert "the model reads [N, 16]" in said(tokens=np.zeros((1, 17), np.int64))
    assert "neither a checkpoint" in said(tmp_path, tokens=np.zeros((1, 16), np.int64))
    assert "Object arrays" in said(tokens=np.array([{}])) or "Python objects" in said(tokens=np.array([{}]))
    assert "optim.lr_vision=1 has no effect here" in said(
        converted / "tiny-8b", "optim.lr_vision=1", tokens=np.zeros((1, 16), np.int64)
    )
    out = ("--checkpoint", converted / "tiny-8b", "--npz", tmp_path / "in.npz", "--out", tmp_path / "out.csv")
    assert "must end in .npz or .parquet" in refusal(capsys, *out)


def test_a_damaged_checkpoint_is_refused(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = shutil.copytree(converted / "tiny-18b", tmp_path / "broken")
    file = next(broken.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 64
    file.write_bytes(content)
    arguments = ("--checkpoint", broken, "--npz", converted / "tiny-18b.npz", "--out", tmp_path / "out.npz")
    assert f"{file.name} has another sha256" in refusal(capsys, *arguments)


def test_another_resolution_is_interpolated_and_said(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "in.npz", images=np.zeros((2, 3, 84, 84), np.float32))
    arguments = ["--checkpoint", str(converted / "tiny-18b"), "--npz", str(tmp_path / "in.npz")]
    out = tmp_path / "out.npz"
    assert embed.main([*arguments, "--out", str(out), "model.vision.image_size=84"]) == 0
    assert "interpolated vision.embed.pos_embed from [17, 64] to [37, 64]" in capsys.readouterr().err
    assert np.load(out)["image_embeddings"].shape == (2, 32)


def test_a_layout_that_the_ranks_do_not_admit_is_refused(converted: Path) -> None:
    manifest = Checkpoint(converted / "tiny-18b").manifest
    with pytest.raises(ConfigError, match="cannot be cut into replicas of"):
        inference_config(manifest, ["parallel.tensor=4"], world_size=2, micro_batch=8)
    with pytest.raises(ConfigError, match="does not divide the 4 attention heads"):
        inference_config(manifest, ["parallel.tensor=3"], world_size=3, micro_batch=8)


@pytest.fixture(scope="module")
def caption_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose vocabulary is that of the captions."""
    with alone() as mesh:
        config = job_config(
            tmp_path_factory.mktemp("run"), "model.text.vocab_size=49408", "model.text.context_length=16"
        )
        return save(build(config, mesh))


def test_shards_keep_their_order_and_keys(caption_run: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [5, 4])
    out = tmp_path / "out.npz"
    arguments = ["--checkpoint", str(caption_run), "--shards", *shards, "--out", str(out), "--micro-batch", "1"]
    assert embed.main(arguments) == 0
    found = np.load(out)
    assert found["keys"].tolist() == [f"good{number}" for number in range(9)]
    assert found["image_embeddings"].shape == found["text_embeddings"].shape == (9, 16)
    whole = tmp_path / "whole.npz"
    assert embed.main([*arguments[:-4], "--out", str(whole)]) == 0
    assert np.abs(np.load(whole)["image_embeddings"] - found["image_embeddings"]).max() <= TOLERANCE


def test_a_clip_is_the_mean_of_its_frames_features(caption_run: Path, tmp_path: Path) -> None:
    frames, clips = 2, 5
    pictures = [[picture(frames * clip + frame) for frame in range(frames)] for clip in range(clips)]
    write_shard(
        str(tmp_path / "0.tar"),
        [
            (f"clip{clip}", {f"{i:03d}.png": encode(image) for i, image in enumerate(shown)} | {"txt": b"a clip"})
            for clip, shown in enumerate(pictures)
        ],
    )
    arguments = ["--checkpoint", str(caption_run), "--shards", str(tmp_path / "0.tar"), f"data.frames={frames}"]
    found = []
    for micro_batch in ("3", "64"):  # two clips at a time, the last one alone; all at once
        out = tmp_path / f"{micro_batch}.npz"
        assert embed.main([*arguments, "--out", str(out), "--micro-batch", micro_batch]) == 0
        found.append(np.load(out)["image_embeddings"])
    images = torch.stack([_squashed(image) for shown in pictures for image in shown])
    with alone() as mesh:
        opened = Checkpoint(caption_run)
        config = inference_config(opened.manifest, [], world_size=1, micro_batch=1)
        encoders, _ = load_encoders(opened, config, mesh, torch.device("cpu"), texts=False)
        with torch.no_grad():
            features = encoders.vision[0](normalise(images, torch.float32), samples=len(images))
    expected = torch.nn.functional.normalize(features.view(clips, frames, -1).mean(dim=1), dim=-1).numpy()
    for embeddings in found:
        assert np.abs(embeddings - expected).max() <= TOLERANCE


def _squashed(image: Image.Image) -> torch.Tensor:
    """uint8 [3, SIDE, SIDE], as evaluation resizes."""
    return torch.from_numpy(cut(np.asarray(image), Squash(size=SIDE).window(0, image.width, image.height)))


def test_parquet_has_the_same_rows(caption_run: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    shards = make_shards(tmp_path, [6])
    for out in ("out.npz", "out.parquet"):
        arguments = ["--checkpoint", str(caption_run), "--shards", *shards, "--out", str(tmp_path / out)]
        assert embed.main([*arguments, "--micro-batch", "1"]) == 0
    table, arrays = parquet.read_table(tmp_path / "out.parquet"), np.load(tmp_path / "out.npz")
    assert table["keys"].to_pylist() == arrays["keys"].tolist()
    assert np.array(table["image_embeddings"].to_pylist(), np.float32).tolist() == arrays["image_embeddings"].tolist()


def test_evaluate_runs_on_a_checkpoint_folder(caption_run: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [7])
    scores, shown = tmp_path / "scores.json", tmp_path / "shown.json"
    files = ["--out", str(scores), "--predictions", str(shown), "--pictures", "3"]
    assert evaluate.main([str(caption_run), *shards, *files, "--micro-batch", "1", "train.precision=bf16"]) == 0
    result = json.loads(scores.read_text())
    assert result["chance"] == 1 / 7 and 0 <= result["zero_shot_top1"] <= 1 and result["layout"] == "TP 1 × PP 1 × DP 1"
    samples = json.loads(shown.read_text())["samples"]
    assert [sample["key"] for sample in samples] == ["good0", "good3", "good6"]
    assert all(len(sample["top"]) == 3 for sample in samples)


@pytest.mark.parametrize(
    ("stored", "given", "ranks", "fits"),
    [
        ((2, 4), (0, 0), 8, (2, 4)),
        ((2, 4), (0, 0), 16, (2, 4)),
        ((2, 4), (0, 0), 1, (1, 1)),
        ((2, 4), (0, 0), 2, (2, 1)),
        ((8, 1), (0, 0), 6, (2, 1)),
        ((1, 4), (0, 0), 6, (1, 2)),
        ((2, 4), (1, 0), 4, (1, 4)),
        ((2, 4), (0, 4), 4, (1, 4)),
        ((2, 4), (4, 2), 1, (4, 2)),  # refused later, as given
    ],
)
def test_a_stored_layout_is_cut_to_the_ranks_there_are(stored, given, ranks, fits) -> None:
    sizes = [dict(zip(("tensor", "pipeline"), pair, strict=True)) for pair in (stored, given, fits)]
    assert fitting_layout(sizes[0], sizes[1], ranks) == sizes[2]
