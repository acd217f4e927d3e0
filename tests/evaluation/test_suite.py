"""tools.evaluate --suite on sets in the community's layouts: numbers, files, what is refused, going on after a kill."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data.errors import DataError
from data.pixels.decode.resize import cut
from data.pixels.transforms import Squash, normalise
from engine.checkpoint.reader import Checkpoint
from engine.evaluation.embedder import Embedder, inference_config, load_encoders
from engine.evaluation.session import Session
from engine.parallel.device import prepare
from tests.checkpoint.jobs import SIDE, alone, build, job_config, save, world_mesh
from tests.data.shard_factory import encode, picture
from tests.distributed import run_distributed
from tests.evaluation import sets
from tools.evaluate.__main__ import _parser, main
from tools.evaluate.suites import score_suite

pytestmark = sets.NEEDS_SKLEARN
pytest.importorskip("av")
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "one"]
SUITE = """
title: Small
sets:
  - {name: digits, classes: 10, samples: 60, reference: {squash: 20, crop: 30}}
  - {name: many, kind: multilabel, classes: 3, samples: 20}
  - {name: pairs, kind: retrieval, samples: 12}
  - {name: folders, classes: 2, samples: 6, metric: mean_per_class}
  - {name: list, classes: 2, metric: worst_group, groups: "csv:place"}
  - {name: moves, kind: video, classes: 2, samples: 4, reference: {"1": 10, "2": 20}}
  - {name: told, kind: video_retrieval, metric: mean_recall_at_1}
  - {name: elsewhere, classes: 7}
averages:
  - {name: Pictures, sets: [digits, folders], reference: 40}
  - {name: Gap, sets: [digits, folders], gap_to: digits}
  - {name: Nowhere, sets: [digits, elsewhere]}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with alone() as mesh:
        run = tmp_path_factory.mktemp("run")
        return save(build(job_config(run, "model.text.vocab_size=49408", "model.text.context_length=16"), mesh))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    sets.digits_set(root, names=NAMES)
    sets.multilabel_set(root)
    sets.retrieval_set(root)
    sets.folder_set(root)
    sets.list_set(root)
    sets.video_sets(root)
    (root / "suite.yaml").write_text(SUITE)
    return root


def evaluated(checkpoint: Path, data: Path, out: Path, *more: str, suite: str = "suite.yaml") -> int:
    return main([str(checkpoint), "--suite", str(data / suite), "--data", str(data), "--out", str(out), *more])


@pytest.fixture(scope="module")
def results(checkpoint: Path, data: Path) -> dict[str, Any]:
    out = data / "alone"
    assert evaluated(checkpoint, data, out, "--transform", "both", "--frames", "1", "2", "--micro-batch", "4") == 0
    return json.loads((out / "results.json").read_text())


def plain_accuracy(checkpoint: Path, count: int) -> float:
    """Top-1 computed from the towers, one picture and one prompt at a time."""
    from data.tokenizer import Tokenizer

    with alone() as mesh:
        opened = Checkpoint(checkpoint)
        config = inference_config(opened.manifest, [], world_size=1, micro_batch=1)
        encoders, _ = load_encoders(opened, config, mesh, torch.device("cpu"))
        embedder = Embedder(encoders, mesh, torch.device("cpu"), 1)
        prompts = [template.replace("{c}", name) for name in NAMES for template in sets.TEMPLATES]
        tokens = torch.from_numpy(Tokenizer(16).encode(prompts))
        texts = torch.cat([embedder.texts(row[None]) for row in tokens]).view(10, 2, -1).mean(dim=1)
        weights = torch.nn.functional.normalize(texts, dim=-1)
        right = 0
        for image, label in sets.digits(count):
            pixels = torch.from_numpy(cut(np.asarray(image), Squash(size=SIDE).window(0, image.width, image.height)))
            embedded = embedder.images(lambda rows, p=pixels: normalise(p[None][rows], torch.float32), 1)[0]
            right += NAMES[int((weights @ embedded).argmax())] == NAMES[label]
        return right / count


def row(results: dict[str, Any], name: str, transform: str = "squash", frames: int = 1) -> dict[str, Any]:
    found = [r for r in results["sets"] if (r["name"], r["transform"], r["frames"]) == (name, transform, frames)]
    assert len(found) == 1
    return found[0]


def test_digits_are_a_plain_computation_and_equal_names_are_one_class(
    checkpoint: Path, results: dict[str, Any]
) -> None:
    digits = row(results, "digits")
    assert digits["top1"] == plain_accuracy(checkpoint, 60)
    assert digits["chance"] == pytest.approx(1 / 9) and digits["samples"] == 60 and digits["left_out"] == 0


def test_every_layout_of_data_is_scored(results: dict[str, Any]) -> None:
    assert len(results["sets"]) == 5 * 2 + 2 * 2 * 2
    assert {"average_precision", "average_precision_11"} <= set(row(results, "many"))
    pairs = row(results, "pairs")
    assert (pairs["pictures"], pairs["captions"]) == (12, 60) and pairs["chance"] == pytest.approx(1 / 12)
    assert {"worst_group", "mean_per_class"} <= set(row(results, "list"))
    assert row(results, "moves", frames=2)["samples"] == 4
    assert row(results, "told")["captions"] == 6
    assert results["missing"]["elsewhere"].startswith("no folder wds_elsewhere")


def test_tables_beside_the_reference(data: Path, results: dict[str, Any]) -> None:
    squash, crop = (row(results, "digits", transform)["top1"] for transform in ("squash", "crop"))
    entries = [entry for entry in results["best"] if entry["set"] == "digits"]
    assert sum(entry["best"] for entry in entries) == 1
    differences = {entry["transform"]: entry["difference"] for entry in entries}
    assert differences == pytest.approx({"squash": 100 * squash - 20, "crop": 100 * crop - 30})
    averages = {average["name"]: average for average in results["averages"]}
    folders = max(row(results, "folders", transform)["mean_per_class"] for transform in ("squash", "crop"))
    expected = 100 * (max(squash, crop) + folders) / 2
    assert averages["Pictures"]["score"] == pytest.approx(expected)
    assert averages["Pictures"]["difference"] == pytest.approx(expected - 40)
    assert averages["Gap"]["score"] == pytest.approx(100 * max(squash, crop) - expected)
    assert averages["Nowhere"]["score"] is None
    with (data / "alone" / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 18 and float(table[0]["top1"]) == squash
    assert "| **digits** |" in (data / "alone" / "results.md").read_text()
    page = (data / "alone" / "index.html").read_text()
    assert "<script" not in page and "digits" in page and "no folder wds_elsewhere" in page


LAYOUTS = {"tp2": ["parallel.tensor=2"], "pp2": ["parallel.pipeline=2"], "dp2": []}


def _at_layouts(checkpoint: str, data: str) -> None:
    """What `main` does after the process group exists (in a test it exists already)."""
    for name, overrides in LAYOUTS.items():
        options = ["--suite", f"{data}/suite.yaml", "--data", data, "--out", f"{data}/{name}", "--frames", "1", "2"]
        opened = Checkpoint(Path(checkpoint))
        config = inference_config(opened.manifest, overrides, world_size=2, micro_batch=6)
        session = Session(config, world_mesh(config), prepare().torch_device, opened)
        score_suite(_parser().parse_args([checkpoint, *options]), session)
        dist.barrier(group=dist.group.WORLD)


@pytest.mark.dist
def test_the_same_numbers_at_every_layout(checkpoint: Path, data: Path, results: dict[str, Any]) -> None:
    run_distributed(_at_layouts, 2, checkpoint=str(checkpoint), data=str(data))
    expected = [entry for entry in results["sets"] if entry["transform"] == "squash"]
    for name in LAYOUTS:
        assert json.loads((data / name / "results.json").read_text())["sets"] == expected, name


def test_a_killed_run_goes_on_set_by_set_and_within_a_set(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: dict[str, Any]
) -> None:
    images = Embedder.images
    seen: list[int] = []

    def counted(self: Embedder, pixels: Any, count: int) -> torch.Tensor:
        seen.append(count)
        if len(seen) == limit:
            raise KeyboardInterrupt
        return images(self, pixels, count)

    monkeypatch.setattr(Embedder, "images", counted)
    limit = 3
    assert evaluated(checkpoint, data, tmp_path, "--micro-batch", "4") != 0
    assert seen == [16, 16, 16] and json.loads(next(tmp_path.rglob("state.json")).read_text())["done"] == 32
    seen.clear()
    limit = 6  # in the second set, after the other half of the first
    assert evaluated(checkpoint, data, tmp_path, "--micro-batch", "4") != 0
    assert seen[:3] == [16, 12, 16] and (tmp_path / "sets" / "digits.squash.1.json").is_file()
    seen.clear()
    limit = 10**6
    assert evaluated(checkpoint, data, tmp_path, "--micro-batch", "4") == 0
    again = json.loads((tmp_path / "results.json").read_text())["sets"]
    assert again == [entry for entry in results["sets"] if entry["transform"] == "squash" and entry["frames"] == 1]
    seen.clear()
    assert evaluated(checkpoint, data, tmp_path, "--micro-batch", "4") == 0 and seen == []
    assert not list((tmp_path / "features").glob("*"))


def test_unreadable_pictures_are_left_out_and_said(checkpoint: Path, tmp_path: Path) -> None:
    folder = sets.digits_set(tmp_path, count=20)
    members = [(f"s{n}", {"png": encode(p), "cls": b"%d" % label}) for n, (p, label) in enumerate(sets.digits(20))]
    for number in (3, 9):
        members[number][1]["png"] = b"broken"
    shutil.rmtree(folder / "test")
    sets.tars(folder / "test", members)
    (tmp_path / "suite.yaml").write_text("sets: [{name: digits, samples: 20}]")
    assert evaluated(checkpoint, tmp_path, tmp_path / "out") == 0
    digits = row(json.loads((tmp_path / "out" / "results.json").read_text()), "digits")
    assert digits["left_out"] == 2 and digits["reasons"] == {"not_an_image": 2} and digits["samples"] == 20
    assert digits["top1"] * 18 == pytest.approx(round(digits["top1"] * 18))


def broken(root: Path, kind: str) -> str:
    """A digits set with one thing wrong, and the line that says so."""
    folder = sets.digits_set(root, count=10)
    test = folder / "test"
    if kind == "classes":
        sets.class_files(folder, NAMES[:9])
        return "the labels go from 0 to 9, but classnames.txt has 9 names (0 to 8)"
    if kind == "class count":
        sets.class_files(folder, [*NAMES, "ten"])
        return "11 classes, the suite asks for 10"
    if kind == "samples":
        (root / "suite.yaml").write_text("sets: [{name: digits, classes: 10, samples: 11}]")
        return "10 samples, the suite asks for 11: complete the set, or say --any-size"
    if kind == "shard":
        (test / "1.tar").unlink()
        return "nshards.txt says 2 shards, but 1.tar is missing"
    if kind == "templates":
        (folder / "zeroshot_classification_templates.txt").unlink()
        return "zeroshot_classification_templates.txt does not exist"
    if kind == "template":
        (folder / "zeroshot_classification_templates.txt").write_text("a photo\n")
        return "'a photo' has no {c} in the place of the class name"
    if kind == "latin":
        (folder / "classnames.txt").write_bytes(b"caf\xe9\n")
        return "classnames.txt is not UTF-8 (byte 0xe9 in line 1)"
    broken_members = {"label": {"png": encode(picture(0)), "cls": b"five"}, "pictures": {"png": b"no", "cls": b"5"}}
    if kind == "no label":
        broken_members["no label"] = {"png": encode(picture(0))}
    sets.tars(test, [(f"s{n}", broken_members[kind]) for n in range(10)])
    return {
        "label": "the label b'five' of a .cls is no class number",
        "no label": "sample 's0' has no .cls beside it",
        "pictures": "none of the 10 pictures looked at can be read (s0: not_an_image)",
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["classes", "class count", "samples", "shard", "templates", "template", "latin", "label", "no label", "pictures"],
)
def test_wrong_data_is_one_line_before_any_forward(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "suite.yaml").write_text("sets: [{name: digits, classes: 10, samples: 10}]")
    message = broken(tmp_path, kind)
    monkeypatch.setattr(Embedder, "__init__", lambda *_: pytest.fail("the towers were loaded"))
    assert evaluated(checkpoint, tmp_path, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sets: []", "a suite is a mapping with a list `sets:`"),
        ("sets: [{name: a, metrik: top1}]", "set 'a' has 'metrik', which is none of"),
        ("sets: [{name: a, metric: ap}]", "metric 'ap' of a classification set is none of top1"),
        ("sets: [{name: a, kind: video3d}]", "kind 'video3d' is none of"),
        ("sets: [{name: a}, {name: a}]", "the set 'a' stands there twice"),
        ("sets: [{name: a, metric: worst_group}]", "worst_group needs groups"),
        ("sets: [{name: a}]\naverages: [{name: m, sets: [b]}]", "names ['b'], which the suite does not have"),
        ("sets: [", "is no YAML"),
        ("sets: [{name: digits}]", "holds none of the 1 sets"),
    ],
)
def test_a_suite_that_is_not_understood(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "suite.yaml").write_text(text)
    assert evaluated(checkpoint, tmp_path, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_options_that_do_not_go_together(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        (): "give SHARDS to score, or --suite",
        ("--suite", "quick"): "--suite needs --data ROOT",
        ("--suite", "nothing", "--data", str(tmp_path), "--out", str(tmp_path / "o")): "choose one of datacomp, paper",
        ("x.tar", "--probe", "knn"): "--probe has no effect without --suite",
    }
    for options, message in cases.items():
        assert main([str(checkpoint), *options]) == 1
        assert message in capsys.readouterr().err


def test_probes_and_saved_features(checkpoint: Path, tmp_path: Path) -> None:
    sets.digits_set(tmp_path, count=40, train=120)
    (tmp_path / "suite.yaml").write_text("sets: [{name: digits, classes: 10, samples: 40}]")
    assert evaluated(checkpoint, tmp_path, tmp_path / "out", "--probe", "linear", "sgd", "knn", "--save-features") == 0
    digits = row(json.loads((tmp_path / "out" / "results.json").read_text()), "digits")
    assert digits["probe_linear_top1"] > 0.3 and digits["probe_sgd_top1"] > 0.3 and digits["probe_knn_top1"] > 0.2
    saved = tmp_path / "out" / "features" / "digits.test.squash.1.parquet"
    table = pytest.importorskip("pyarrow.parquet").read_table(saved)
    assert set(table.column_names) == {"keys", "label", "image_valid", "image_embeddings", "cosines"}
    cosines = np.array(table["cosines"].to_pylist())
    right = cosines.argmax(axis=1) == np.array(table["label"].to_pylist())
    assert right.mean() == pytest.approx(digits["top1"])


def test_an_error_of_a_reader_is_raised_at_its_turn() -> None:
    from engine.evaluation.prefetch import ahead

    def read(number: int) -> int:
        if number == 5:
            raise DataError("gone")
        return number

    found = []
    with pytest.raises(DataError, match="gone"):
        for value in ahead(read, range(9), threads=2, depth=3):
            found.append(value)
    assert found == [0, 1, 2, 3, 4]
