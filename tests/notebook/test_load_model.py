"""`load_model`: reference features of every family, whatever layout wrote the files, without any process group."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import engine
from data.errors import DataError
from data.pixels.transforms import normalise
from engine import load_model
from engine.checkpoint.format.errors import CheckpointError
from engine.config.read import ConfigError
from tests.checkpoint.jobs import alone, build, job_config, run_steps, save
from tests.data.shard_factory import encode, make_shards, picture
from tests.golden import ARCHITECTURES, FOLDER, load_io, load_tensors, pixels
from tools.convert import __main__ as convert
from tools.embed import __main__ as embed
from tools.reshard import main as reshard

TOLERANCE = 1e-5
PAGE = Path(__file__).resolve().parents[2] / "docs" / "notebook.md"
PUBLIC = {"open-clip-vit": "openclip", "transformers-clip": "hf", "transformers-siglip": "hf"}


def run(command: Any, *arguments: object) -> None:
    assert command([str(argument) for argument in arguments]) == 0


def convert_golden(name: str, out: Path) -> None:
    source = FOLDER / name
    files = ["--config", source / "config.json", "--weights", source / "weights.safetensors"]
    run(convert.main, "--from", "eva", *files, "--out", out)


def convert_public(name: str, folder: Path, out: Path) -> None:
    """From a folder as the hub has it."""
    source, hub = FOLDER / f"public-{name}", folder / "hub" / name
    hub.mkdir(parents=True)
    open_clip = PUBLIC[name] == "openclip"
    config = (source / "config.json").read_text()
    (hub / ("open_clip_config.json" if open_clip else "config.json")).write_text(
        f'{{"model_cfg": {config}}}' if open_clip else config
    )
    weights = hub / ("open_clip_model.safetensors" if open_clip else "model.safetensors")
    weights.write_bytes((source / "weights.safetensors").read_bytes())
    run(convert.main, "--from", PUBLIC[name], "--weights", hub, "--out", out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint, with an average."""
    with alone() as mesh:
        trainer = build(job_config(tmp_path_factory.mktemp("run"), "optim.ema_decay=0.5"), mesh)
        run_steps(trainer, 2)
        return save(trainer).parents[1]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_authors_features_from_files_of_another_layout(name: str, tmp_path: Path) -> None:
    convert_golden(name, tmp_path / "one")
    tensor = 1 if name in ("tiny-bigE", "tiny-eva02-B") else 2  # three heads
    run(reshard, tmp_path / "one", tmp_path / "cut", "--tensor", tensor, "--pipeline", 2, "--data", 2)
    model, io = load_model(tmp_path / "cut"), load_io(name)
    images, texts = model.embed_images(pixels(name), batch_size=3), model.embed_texts(io["text"], batch_size=3)
    assert (images - io["image_features_norm"]).abs().max() < TOLERANCE
    assert (texts - io["text_features_norm"]).abs().max() < TOLERANCE
    assert images.dtype == torch.float32 and not images.requires_grad
    assert not dist.is_initialized()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_towers_features_also_inside_somebodys_process_group(name: str, tmp_path: Path) -> None:
    convert_public(name, tmp_path, tmp_path / "ours")
    io = load_tensors(f"public-{name}/io")
    shown = normalise(io["images_u8"], torch.float32)
    before = load_model(tmp_path / "ours")
    with alone():
        world = dist.distributed_c10d._get_default_group()
        inside = load_model(tmp_path / "ours")
        for model in (before, inside):
            for found, key in ((model.embed_images(shown), "image"), (model.embed_texts(io["text"]), "text")):
                wanted = torch.nn.functional.normalize(io[f"{key}_features"], dim=-1)
                assert (found - wanted).abs().max() < TOLERANCE
        assert dist.distributed_c10d._get_default_group() is world
    assert before.embed_images(shown).equal(inside.embed_images(shown))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_gives_what_the_command_gives_and_leaves_the_process_alone(trained: Path, tmp_path: Path) -> None:
    """Every way to give a picture is the same picture."""
    shards = make_shards(tmp_path, [5])
    run(embed.main, "--checkpoint", trained, "--shards", *shards, "--out", tmp_path / "out.npz")
    wanted = np.load(tmp_path / "out.npz")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = load_model(trained)
    assert torch.get_rng_state().equal(state)
    encoded = [encode(picture(number)) for number in range(5)]
    (tmp_path / "a.png").write_bytes(encoded[0])
    ways: list[Any] = [tmp_path / "a.png", encoded[1], picture(2), np.asarray(picture(3))]
    ways.append(torch.from_numpy(np.array(picture(4))).permute(2, 0, 1))
    images = model.embed_images(ways, batch_size=2)
    assert np.abs(images.numpy() - wanted["image_embeddings"]).max() < TOLERANCE
    texts = model.embed_texts([f"picture number {number}" for number in range(5)])
    assert np.abs(texts.numpy() - wanted["text_embeddings"]).max() < TOLERANCE
    assert model.embed_images(str(tmp_path / "a.png")).shape == (1, model.embed_dim)
    assert model.embed_images([]).shape == (0, model.embed_dim)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_options_gradients_and_scores(trained: Path) -> None:
    model = load_model(trained)
    images, names = [picture(number) for number in range(3)], ["cat", "dog", "tree"]
    pixels_of = model.prepare(images)
    assert model.embed_images(pixels_of).equal(model.embed_images(images))
    logits = model(pixels_of, model.tokenize(names))
    assert torch.allclose(logits, model.logit_scale * model.similarity(images, names), atol=1e-4)
    shares = model.classify(images, names, ["a {}", "the {}"])
    assert shares.shape == (3, 3) and torch.allclose(shares.sum(dim=1), torch.ones(3))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    twin = copy.deepcopy(model)
    assert twin.embed_texts(names).equal(model.embed_texts(names))
    assert not load_model(trained, ema=True).embed_images(images).equal(model.embed_images(images))
    half = load_model(trained, dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    cosines = torch.nn.functional.cosine_similarity(half.embed_images(images), model.embed_images(images))
    assert cosines.min() > 0.99
    larger = load_model(trained, image_size=56)
    assert larger.prepare(images).shape == (3, 3, 56, 56) and larger.embed_images(images).shape == (3, model.embed_dim)


def test_random_weights_are_said() -> None:
    with pytest.warns(UserWarning, match="tiny-18b is a model without weights: they are random"):
        model = load_model("tiny-18b")
    assert str(model).splitlines()[1].strip().startswith("tiny-18b, random weights")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_used_is_one_line(trained: Path, tmp_path: Path) -> None:
    model = load_model(trained)
    (tmp_path / "weights.pt").write_bytes(b"")
    floats = np.random.default_rng(0).random((3, 28, 28), dtype=np.float32)
    cases: list[tuple[type[Exception], str, Any]] = [
        (ConfigError, "neither a folder with a checkpoint nor a model; model 'b17'", lambda: load_model("b17")),
        (ConfigError, "tools.convert", lambda: load_model(tmp_path / "weights.pt")),
        (CheckpointError, "neither a checkpoint", lambda: load_model(tmp_path)),
        (ConfigError, "dtype fp16 is not one of fp32, bf16", lambda: load_model(trained, dtype="fp16")),
        (ConfigError, "device moon cannot be used", lambda: load_model(trained, device="moon")),
        (ConfigError, "image_size 30 is not a multiple", lambda: load_model(trained, image_size=30)),
        (DataError, "transform 'centre' is unknown", lambda: load_model(trained, transform="centre")),
        (DataError, "image 1 .*no-such.png. cannot be read", lambda: model.embed_images([picture(0), "no-such.png"])),
        (DataError, "image 0 cannot be used: not_an_image", lambda: model.embed_images(b"text")),
        (DataError, "image 0: a float is not a path", lambda: model.embed_images([3.5])),
        (DataError, "a NoneType is not a path", lambda: model.embed_images(None)),
        (DataError, "not normalised: give the pixels as uint8", lambda: model.embed_images(floats)),
        (DataError, r"floats \[3, 9, 9\] must be \[3, 28, 28\]", lambda: model.embed_images(torch.randn(3, 9, 9))),
        (DataError, "pixels are int64", lambda: model.embed_images(np.zeros((9, 9, 3), dtype=np.int64))),
        (DataError, r"pixels \[9, 9, 5\] are not one picture", lambda: model.embed_images(torch.zeros(9, 9, 5).byte())),
        (DataError, "a int is not a text", lambda: model.embed_texts([3])),  # type: ignore[list-item]
        (DataError, "tokens span 0 to 64; the model has 64", lambda: model.embed_texts(torch.tensor([[0, 64]]))),
        (DataError, "has no {} for the name", lambda: model.classify(picture(0), ["cat"], ["a photo"])),
        (DataError, "lists of texts", lambda: model.classify(picture(0), "cat")),
        (DataError, "batch_size is 0", lambda: model.embed_images(picture(0), batch_size=0)),
    ]
    for kind, words, attempt in cases:
        with pytest.raises(kind, match=words) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_the_engine_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        engine.load_modle  # noqa: B018


def test_the_page_runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of docs/notebook.md, in one namespace, in a folder that has what the page names."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(trained)
    for number, name in enumerate(("cat.jpg", "dog.jpg")):
        picture(number).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    assert isinstance(names["images"], torch.Tensor) and Image.open("cat.jpg").size == (40, 30)
