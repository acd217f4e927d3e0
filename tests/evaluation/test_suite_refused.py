"""What tools.evaluate --suite refuses: one line, before any forward."""

from pathlib import Path

import pytest

from engine.evaluation.embedder import Embedder
from tests.checkpoint.children import child, hear, hold_lock
from tests.data.shard_factory import encode, picture
from tests.evaluation import sets
from tests.evaluation.commands import NAMES, evaluated
from tools.evaluate.__main__ import main

pytestmark = sets.NEEDS_SKLEARN


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
    if kind == "cut off":
        (test / "1.tar").write_bytes((test / "1.tar").read_bytes()[:6000])
        return "1.tar cannot be read to its end (unexpected end of data): complete the download"
    if kind == "no shard":
        for shard in test.glob("*.tar"):
            shard.unlink()
        return "no test/*.tar, no folders of classes and no test.csv in it"
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
    [
        "classes",
        "class count",
        "samples",
        "shard",
        "cut off",
        "no shard",
        "templates",
        "template",
        "latin",
        "label",
        "no label",
        "pictures",
    ],
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
        (
            "sets: [{name: digits}]",
            "a folder wds_NAME or NAME there (docs/evaluation_sets.md), with NAME one of digits",
        ),
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
    quick = ("--suite", "quick", "--data", str(tmp_path), "--out", str(tmp_path / "o"))
    cases = {
        (): "give SHARDS to score, or --suite",
        ("--suite", "quick"): "--suite needs --data ROOT",
        ("--suite", "nothing", "--data", str(tmp_path), "--out", str(tmp_path / "o")): "choose one of datacomp, paper",
        ("x.tar", "--probe", "knn"): "--probe has no effect without --suite",
        ("x.tar", "--frames", "8"): "--frames has no effect without --suite",
        ("x.tar", "--transform", "crop"): "--transform has no effect without --suite",
        (*quick, "--probe-features", "embeddings"): "--probe-features is about --probe linear, sgd and knn",
    }
    for options, message in cases.items():
        assert main([str(checkpoint), *options]) == 1
        assert message in capsys.readouterr().err


def test_a_second_evaluation_into_the_same_folder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a launcher that was killed: its ranks live on."""
    sets.digits_set(tmp_path, count=10)
    (tmp_path / "suite.yaml").write_text("sets: [{name: digits}]")
    with child(hold_lock, tmp_path / "out") as (process, pipe):
        assert hear(pipe) == "locked"
        assert evaluated(checkpoint, tmp_path, tmp_path / "out") == 1
        said = capsys.readouterr().err
        assert f"--out {tmp_path / 'out'} is in use by process {process.pid}" in said and said.count("\n") == 1
        process.kill()
        process.join()
        assert evaluated(checkpoint, tmp_path, tmp_path / "out") == 0
