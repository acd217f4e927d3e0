"""data.features: embeddings of a locked image tower, computed once, train as its pixels do, or are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data.errors import DataError
from data.pixels.features import FeatureOrigin
from data.shards.write import write_shard
from engine.config.errors import ConfigError
from engine.config.read import Config
from tests.checkpoint.jobs import alone, build, job_config, run_steps, save, world_mesh
from tests.data.shard_factory import encode, good_sample, picture
from tests.distributed import run_distributed
from tools.embed import __main__ as embed

MODEL = ("model.text.vocab_size=49408", "model.text.context_length=16", "model.vision.depth=4")
LOCKED = (
    *MODEL, "train.freeze=[vision.*]", "train.patch_dropout=0", "data.crop_scale=[1,1]", "data.workers=0",
    "data.max_bad_fraction=0.5", "optim.eps=1e-4", "optim.lr_text=5e-3",
)  # fmt: skip
STEPS = 3


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, two shards, one of their pictures broken, and the features of all samples."""
    folder = tmp_path_factory.mktemp("embedded")
    samples = [sample(number) for number in range(34)]
    samples[7][1]["png"] = b"no picture"
    write_shard(str(folder / "0.tar"), samples[:20])
    write_shard(str(folder / "1.tar"), samples[20:])
    with alone() as mesh:
        trainer = build(job_config(folder / "run", *MODEL), mesh)
        run_steps(trainer, 1)
        save(trainer)
    arguments = ["--checkpoint", str(folder / "run"), "--unreadable", "nan", "--out", str(folder / "features.npz")]
    assert embed.main([*arguments, "--shards", str(folder / "0.tar"), str(folder / "1.tar")]) == 0
    return folder


def sample(number: int) -> tuple[str, dict[str, bytes]]:
    """A sample with a square picture: a crop of its whole area is the whole picture."""
    key, members = good_sample(number)
    return key, members | {"png": encode(picture(number, 40, 40))}


def job(folder: Path, *overrides: str, shards: str = "{1,0}.tar") -> Config:
    """Locked to the checkpoint's image tower; the shards in another order than they were embedded in."""
    return job_config(
        folder / "another", *LOCKED, f"data.shards={folder}/{shards}", f"init.vision={folder}/run", *overrides
    )


def curve(config: Config) -> list[float]:
    """Losses of the first steps on the shards, in the mesh of the test."""
    trainer = build(config, world_mesh(config))
    feed = trainer._open_feed()
    losses = []
    for _ in range(STEPS):
        assert feed.read() is None
        losses.append(float(trainer.step(feed.share()).loss))
    feed.close()
    return losses


def refused(config: Config) -> str:
    with alone(), pytest.raises(DataError) as error:
        curve(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_features_train_as_their_pixels_do(embedded: Path) -> None:
    with alone():
        pixels = curve(job(embedded))
    with alone():
        features = curve(job(embedded, f"data.features={embedded}/features.npz"))
    assert features == pytest.approx(pixels, rel=1e-5)
    assert abs(pixels[-1] - pixels[0]) > 1e-3 * pixels[0], "nothing was learned"


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 2), (1, 2)])
def test_no_layout_shows(embedded: Path, tensor: int, pipeline: int) -> None:
    layout = (f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", "train.micro_batch_size=2")
    with alone():
        one = curve(job(embedded, f"data.features={embedded}/features.npz"))
    elsewhere = f"run_dir={embedded}/{tensor}-{pipeline}"
    several = job(embedded, f"data.features={embedded}/features.npz", elsewhere, *layout)
    for losses in run_distributed(curve, 4, config=several):
        assert losses == pytest.approx(one, rel=1e-5)


def test_features_of_something_else_are_refused_in_one_line(embedded: Path, tmp_path: Path) -> None:
    features = f"data.features={embedded}/features.npz"
    assert "are of another image tower" in refused(job(embedded, features, "init.vision=null"))
    assert "of 28 pixels, model.vision.image_size is 42" in refused(
        job(embedded, features, "model.vision.image_size=42", "init.vision=null")
    )
    assert "have 16 numbers, model.embed_dim is 24" in refused(
        job(embedded, features, "model.embed_dim=24", "init.vision=null")
    )
    write_shard(str(embedded / "2.tar"), [good_sample(number) for number in range(50, 54)])
    assert "no rows of 1 of 3 shards" in refused(job(embedded, features, shards="{0..2}.tar"))

    copy = shutil.copy(embedded / "features.npz", tmp_path / "f.npz")
    copied = job(embedded, f"data.features={copy}")
    assert "write both by python -m tools.embed --shards … --unreadable nan" in refused(copied)
    origin = FeatureOrigin.read(embedded / "features.npz")
    replace(origin, samples=[20, 15], digests=[*origin.digests[:1], 7]).write(Path(copy))
    assert "its .features.json says [35, 16]" in refused(
        replace(copied, data=replace(copied.data, shards=[f"{embedded}/0.tar"]))
    )
    (tmp_path / "f.npz.features.json").write_text(json.dumps({"version": 0}))
    assert "cannot be read" in refused(copied)


REFUSED: dict[str, tuple[str, ...]] = {
    r"freeze it \(train\.freeze=\[vision\.\*\]\)": ("train.freeze=[text.*]",),
    r"augmentation is off with them": ("data.crop_scale=[0.9,1]",),
    r"augmentation is off with them, set": ("data.flip=true",),
    r"patch_dropout is 0\.5: data\.features are of whole pictures": ("train.patch_dropout=0.5",),
    r"mask_false_negatives=both tells pictures by their files": ("train.mask_false_negatives=both",),
    r"data\.frames 2: data\.features are of still pictures": ("data.frames=2",),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_features_cannot_stand_for_is_refused(says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        job(tmp_path, "data.features=x.npz", *REFUSED[says])


def test_unreadable_samples_are_counted_as_such(embedded: Path) -> None:
    config = job(embedded, f"data.features={embedded}/features.npz", shards="0.tar")
    with alone():
        feed = build(config, world_mesh(config))._open_feed()
        bad = [sample for _ in range(2) for sample in next(feed).bad]
        feed.close()
    assert [(sample.reason, sample.shard) for sample in bad[:1]] == [("no_features", str(embedded / "0.tar"))]
