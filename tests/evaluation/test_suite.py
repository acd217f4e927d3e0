"""tools.evaluate --suite on sets in the community's layouts: numbers, files, what is refused, going on after a kill."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.pixels.decode.resize import cut
from data.pixels.transforms import Squash, normalise
from engine.checkpoint.reader import Checkpoint
from engine.evaluation.embedder import Embedder, inference_config, load_encoders
from engine.evaluation.suite import texts
from engine.evaluation.suite.features import Features
from tests.checkpoint.jobs import SIDE, alone
from tests.data.shard_factory import encode
from tests.evaluation import sets
from tests.evaluation.commands import NAMES, evaluated, row

pytestmark = sets.NEEDS_SKLEARN
pytest.importorskip("av")


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
            embedded = embedder.images(normalise(pixels[None], torch.float32).__getitem__, 1)[0]
            right += NAMES[int((weights @ embedded).argmax())] == NAMES[label]
        return right / count


def test_digits_are_a_plain_computation_and_equal_names_are_one_class(
    checkpoint: Path, results: dict[str, Any]
) -> None:
    digits = row(results, "digits")
    assert digits["top1"] == plain_accuracy(checkpoint, 60)
    assert digits["chance"] == pytest.approx(1 / 9) and digits["samples"] == 60 and digits["left_out"] == 0


def test_every_layout_of_data_is_scored(results: dict[str, Any]) -> None:
    assert len(results["sets"]) == 6 * 2 + 2 * 2 * 2
    assert row(results, "winogavil")["questions"] == 3 and row(results, "winogavil")["samples"] == 3
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
    for frames, name in ((1, "Clips, 1 frame"), (2, "Clips, 2 frames")):
        best = max(row(results, "moves", transform, frames)["top1"] for transform in ("squash", "crop"))
        assert averages[name]["score"] == pytest.approx(100 * best)
    assert (averages["Clips, 1 frame"]["reference"], averages["Clips, 2 frames"]["reference"]) == (None, 20)
    with (data / "alone" / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 20 and float(table[0]["top1"]) == squash
    assert "| **digits** |" in (data / "alone" / "results.md").read_text()
    page = (data / "alone" / "index.html").read_text()
    assert "<script" not in page and "digits" in page and "no folder wds_elsewhere" in page


def test_a_killed_run_goes_on_set_by_set_and_within_a_set(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: dict[str, Any]
) -> None:
    encode = Embedder.encode
    seen: list[int] = []

    def counted(self: Embedder, pixels: Any, count: int, read: Any) -> dict[str, torch.Tensor]:
        seen.append(count)
        if len(seen) == limit:
            raise KeyboardInterrupt
        return encode(self, pixels, count, read)

    monkeypatch.setattr(Embedder, "encode", counted)
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


def test_captions_are_taken_up_within_a_set(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: dict[str, Any]
) -> None:
    sets.retrieval_set(tmp_path)
    (tmp_path / "suite.yaml").write_text("sets: [{name: pairs, kind: retrieval}]")
    texts_of, seen, limit = Embedder.texts, [], 3

    def counted(self: Embedder, tokens: torch.Tensor) -> torch.Tensor:
        seen.append(len(tokens))
        if len(seen) == limit:
            raise KeyboardInterrupt
        return texts_of(self, tokens)

    monkeypatch.setattr(texts, "_PROMPTS_AT_ONCE", 25)
    monkeypatch.setattr(Embedder, "texts", counted)
    assert evaluated(checkpoint, tmp_path, tmp_path / "out") != 0
    partial = next((tmp_path / "out" / "texts").glob("*.partial"))
    with partial.open("ab") as file:
        file.write(b"half a row")
    seen.clear()
    limit = 10
    assert evaluated(checkpoint, tmp_path, tmp_path / "out") == 0 and seen == [10]
    again = row(json.loads((tmp_path / "out" / "results.json").read_text()), "pairs")
    assert again == row(results, "pairs")


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


def test_probes_and_saved_features(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sets.digits_set(tmp_path, count=40, train=120)
    sets.folder_set(tmp_path)
    (tmp_path / "suite.yaml").write_text("sets: [{name: digits, classes: 10, samples: 40}, {name: folders}]")
    probes = ("--probe", "linear", "sgd", "knn", "attentive")
    assert evaluated(checkpoint, tmp_path, tmp_path / "out", *probes, "--save-features") == 0
    tree = json.loads((tmp_path / "out" / "results.json").read_text())
    digits = row(tree, "digits")
    shares = {name: digits[f"probe_{name}_top1"] for name in probes[1:]}
    assert min(shares.values()) > 0.3, shares
    assert row(tree, "folders")["remark"] == "Not probed: there is no train part."
    saved = tmp_path / "out" / "features" / "digits.test.squash.1.parquet"
    table = pytest.importorskip("pyarrow.parquet").read_table(saved)
    assert set(table.column_names) == {"keys", "label", "image_valid", "image_embeddings", "cosines"}
    cosines = np.array(table["cosines"].to_pylist())
    right = cosines.argmax(axis=1) == np.array(table["label"].to_pylist())
    assert right.mean() == pytest.approx(digits["top1"])
    files = [path.name for path in (tmp_path / "out" / "features").iterdir()]
    assert sorted(files) == [f"{name}.test.squash.1.parquet" for name in ("digits", "folders")]
    monkeypatch.setattr(Embedder, "encode", lambda *_: pytest.fail("what is saved was computed again"))
    assert evaluated(checkpoint, tmp_path, tmp_path / "out", *probes, "--save-features") == 0
    (tmp_path / "suite.yaml").write_text("sets: [{name: folders}]")
    assert evaluated(checkpoint, tmp_path, tmp_path / "other", "--probe", "knn") == 1
    assert "--probe is fitted on the train part of a set of classes: no set" in capsys.readouterr().err


def test_a_disk_without_room_is_said_before_any_token(tmp_path: Path) -> None:
    features = Features(folder=tmp_path, fingerprint="x", shapes={"tokens": (256, 5120)})
    assert features.take_up(10) is None
    assert "no room for 26,214,400.0 GB" in (features.take_up(10**10) or "")


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
