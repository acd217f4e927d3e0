"""What one tool writes every other reads: each writer of checkpoints against each reader, runs against the report."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from engine.callbacks.checkpoint import CheckpointCallback
from engine.callbacks.metrics import MetricsFile
from engine.config.phases import first_phase
from engine.config.read import resolve, to_dict
from engine.config.schema import ParallelConfig
from engine.parallel.launch import job
from engine.trainer import Trainer
from tests.data.shard_factory import make_shards
from tests.evaluation import sets
from tools import inspect, reshard
from tools.convert import __main__ as convert
from tools.embed import __main__ as embed
from tools.evaluate import __main__ as evaluate
from tools.report import __main__ as report

pytestmark = sets.NEEDS_SKLEARN
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a set, and a run of three steps."""
    folder = tmp_path_factory.mktemp("pairs")
    make_shards(folder, [16, 9])
    sets.digits_set(folder, count=12)
    (folder / "suite.yaml").write_text("sets: [{name: digits, samples: 12}]\n")
    tree = {
        "run_dir": str(folder / "run"),
        "model": "tiny-18b",
        "data": {"shards": str(folder / "00000.tar"), "workers": 0},
        "train": {"steps": 3, "global_batch_size": 8, "micro_batch_size": 4},
        "optim": {"lr_vision": 0.01, "lr_text": 0.01, "warmup_steps": 1},
        "checkpoint": {"every_steps": 3},
    }
    config = resolve(tree, ["model.text.vocab_size=49408"])
    with job(ParallelConfig()) as (mesh, device):
        trainer = Trainer(first_phase(config), mesh, device)
        trainer.resume()
        trainer.fit([MetricsFile(), CheckpointCallback(trainer)])
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    return folder


def _resharded(run: Path, out: Path) -> Path:
    assert reshard.main([str(run), str(out), "--tensor", "2", "--pipeline", "2"]) == 0
    return out


def _through(layout: str) -> Callable[[Path, Path], Path]:
    """Out in another layout and in again."""

    def there_and_back(run: Path, out: Path) -> Path:
        suffix = "" if layout == "hf" else ".safetensors"
        file, config = out.with_name(f"{out.name}-there{suffix}"), out.with_name(f"{out.name}.json")
        described = [] if layout == "hf" else ["--config-out", str(config)]
        assert convert.main(["--to", layout, "--checkpoint", str(run), "--out", str(file), *described]) == 0
        given = [] if layout == "hf" else ["--config", str(config)]
        assert convert.main(["--from", layout, "--weights", str(file), "--out", str(out), *given]) == 0
        return out

    return there_and_back


WRITERS: dict[str, Callable[[Path, Path], Path]] = {
    "engine.train": lambda run, out: run,
    "tools.reshard": _resharded,
    "tools.convert eva": _through("eva"),
    "tools.convert hf": _through("hf"),
}


@pytest.fixture(scope="module", params=sorted(WRITERS))
def written(request: pytest.FixtureRequest, folder: Path) -> Path:
    return WRITERS[request.param](folder / "run", folder / f"from {request.param}".replace(" ", "-"))


def _embedded(checkpoint: Path, folder: Path, out: Path) -> dict[str, np.ndarray]:
    shards = ["--shards", str(folder / "00001.tar"), "--out", str(out)]
    assert embed.main(["--checkpoint", str(checkpoint), *shards]) == 0
    return dict(np.load(out))


def test_embed_reads_it(written: Path, folder: Path, tmp_path: Path) -> None:
    found, expected = (_embedded(path, folder, tmp_path / "out.npz") for path in (written, folder / "run"))
    for side in ("image_embeddings", "text_embeddings"):
        assert np.abs(found[side] - expected[side]).max() <= TOLERANCE


def test_evaluate_reads_it(written: Path, folder: Path, tmp_path: Path) -> None:
    options = ["--suite", str(folder / "suite.yaml"), "--data", str(folder), "--out", str(tmp_path / "suite")]
    assert evaluate.main([str(written), *options]) == 0
    assert json.loads((tmp_path / "suite" / "results.json").read_text())["sets"][0]["samples"] == 12


def test_inspect_reshard_and_convert_read_it(
    written: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect.main([str(written)]) == 0 and "vision" in capsys.readouterr().out
    again = _resharded(written, tmp_path / "resharded")
    weights = tmp_path / "out.safetensors"
    arguments = ["--to", "eva", "--checkpoint", str(again), "--out", str(weights)]
    assert convert.main([*arguments, "--config-out", str(tmp_path / "out.json")]) == 0 and weights.stat().st_size > 0


def test_the_report_reads_a_run_with_its_predictions(folder: Path) -> None:
    run = folder / "run"
    files = ["--out", str(run / "result.json"), "--predictions", str(run / "predictions.json"), "--pictures", "4"]
    assert evaluate.main([str(run), str(folder / "00001.tar"), *files]) == 0
    assert report.main([str(run)]) == 0
    assert "picture number" in (run / "report.html").read_text()
