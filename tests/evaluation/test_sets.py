"""Sets as they lie on disk, listed without a model: odd files, groups, associations, and prompts of the package."""

import json
import shutil
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import DataError
from engine.evaluation.sets.listing import Listing, list_set
from engine.evaluation.sets.spec import SetSpec, load_suite
from engine.evaluation.suite.features import Features
from engine.evaluation.suite.score import Captions, score_associations
from tests.data.shard_factory import encode, picture
from tests.evaluation import sets


def listed(root: Path, **spec: object) -> Listing:
    found = list_set(root, SetSpec(**{"name": "digits", **spec}), train=True, any_size=False)  # type: ignore[arg-type]
    assert found is not None
    return found


def npy(values: list[int]) -> bytes:
    stream = BytesIO()
    np.save(stream, np.array(values))
    return stream.getvalue()


def test_equal_names_are_classes_of_their_own_number(tmp_path: Path) -> None:
    names = ["crane", "kite", "crane", *sets.NAMES[3:]]
    sets.digits_set(tmp_path, count=20, names=names)
    digits = listed(tmp_path, classes=10)
    assert digits.classes == names and digits.test.labels is not None
    assert sorted(set(digits.test.labels.tolist())) == list(range(10))


def test_folders_as_datacomp_downloads_them(tmp_path: Path) -> None:
    sets.digits_set(tmp_path, count=4).rename(tmp_path / "wds_digits_test")
    assert listed(tmp_path).folder.endswith("wds_digits_test")


def test_a_group_is_a_column_of_the_npy(tmp_path: Path) -> None:
    folder = sets.digits_set(tmp_path, count=3)
    shutil.rmtree(folder / "test")
    rows = [[5, 2010], [0, 2011], [5, 2012]]
    tar = [(f"s{n}", {"png": encode(picture(n)), "cls": b"1", "npy": npy(row)}) for n, row in enumerate(rows)]
    sets.tars(folder / "test", tar)
    assert listed(tmp_path, metric="worst_group", groups="npy:0").test.groups == ["5", "0", "5"]
    with pytest.raises(DataError, match="'s0' has no npy:2 beside it"):
        listed(tmp_path, metric="worst_group", groups="npy:2")
    with pytest.raises(DataError, match="needs the group of every sample, there is no csv:place"):
        listed(tmp_path, metric="worst_group", groups="csv:place")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classnames.txt", "zero\none\n\ntwo\n", "line 3 is empty, and labels count lines"),
        ("classnames.txt", "zero\n", "the labels go from 0 to"),
        ("test/nshards.txt", "two\n", "nshards.txt says two shards"),
        ("zeroshot_classification_templates.txt", "\n\n", "is empty: prompts"),
    ],
)
def test_files_that_are_not_right(tmp_path: Path, name: str, content: str, message: str) -> None:
    (sets.digits_set(tmp_path, count=12) / name).write_text(content)
    with pytest.raises(DataError, match=message):
        listed(tmp_path)


def test_parts_of_a_set_are_no_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "digits" / split / "cat").mkdir(parents=True)
        picture(0).save(tmp_path / "digits" / split / "cat" / "0.png")
    with pytest.raises(DataError, match="has no test/, but val/: rename it"):
        listed(tmp_path)
    assert listed(tmp_path, split="val", templates=["a {c}"]).classes == ["cat"]
    (tmp_path / "digits" / "train" / "dog").mkdir()
    picture(0).save(tmp_path / "digits" / "train" / "dog" / "0.png")
    with pytest.raises(DataError, match="train and val hold different classes"):
        listed(tmp_path, split="val", templates=["a {c}"])


def test_a_measure_that_says_nothing_is_refused(tmp_path: Path) -> None:
    sets.folder_set(tmp_path)
    with pytest.raises(DataError, match="mean_top1_top5 of 2 classes says nothing"):
        listed(tmp_path, name="folders", metric="mean_top1_top5")


def test_captions_one_a_line(tmp_path: Path) -> None:
    folder = sets.retrieval_set(tmp_path, count=1)
    shutil.rmtree(folder / "test")
    text = "\ufeffa cat\r\n  a dog \n\na form\x0cfeed\n".encode()
    sets.tars(folder / "test", [("p", {"png": encode(picture(0)), "txt": text})], shards=1)
    assert listed(tmp_path, name="pairs", kind="retrieval").test.captions == [["a cat", "a dog", "a form\x0cfeed"]]
    (folder / "test.csv").write_text('path,caption\np.png,"two\nof them"\np.png,third\n')
    shutil.rmtree(folder / "test")
    picture(0).save(folder / "p.png")
    assert listed(tmp_path, name="pairs", kind="retrieval").test.captions == [["two", "of them", "third"]]


def packaged(root: Path) -> None:
    """A stand-in for the files that the package clip-benchmark brings."""
    datasets = root / "site" / "clip_benchmark" / "datasets"
    datasets.mkdir(parents=True)
    (datasets.parent / "__init__.py").write_text("raise ImportError('it is read, not imported')")
    (datasets / "en_zeroshot_classification_templates.json").write_text(json.dumps({"scans": ["one {c}"]}))
    (datasets / "en_classnames.json").write_text(json.dumps({"scans": [*"abcdefghij"]}))
    (root / "site" / "clip_benchmark-1.6.2.dist-info").mkdir()
    (root / "site" / "clip_benchmark-1.6.2.dist-info" / "METADATA").write_text("Name: clip-benchmark\nVersion: 1.6.2\n")


def test_prompts_and_names_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sets.digits_set(tmp_path, count=12)
    packaged(tmp_path)
    for module in [name for name in sys.modules if name.startswith("clip_benchmark")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert listed(tmp_path, prompts="scans").templates == sets.TEMPLATES  # the folder's own come first
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (folder / name).unlink()
    found = listed(tmp_path, prompts="scans")
    assert (found.templates, found.classes[9]) == (["one {c}"], "j")
    assert found.remark == "Class names: clip-benchmark 1.6.2. Prompts: clip-benchmark 1.6.2."
    with pytest.raises(DataError, match="pip install --no-deps clip-benchmark"):
        listed(tmp_path)


def test_associations(tmp_path: Path) -> None:
    sets.association_set(tmp_path)
    found = listed(tmp_path, name="winogavil", kind="association", metric="jaccard", samples=[3])
    assert (found.test.count, found.test.size) == (5, 3)
    questions = found.test.questions
    assert [question.prompt for question in questions] == ["A full moon", "An owl", "A forest"]
    images = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0.8, 0.6], [0.6, 0.8], [0, 1], [0, 1]]), dim=1)
    text = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    captions = Captions([], "", np.array([[0, 0], [1, 1], [2, 2]]))
    seen = Features(folder=tmp_path, fingerprint="", shapes={"images": (2,)}, done=5)
    (tmp_path / "images.f32").write_bytes(images.numpy().tobytes())
    scores = score_associations(questions, seen, captions, text)
    # Both right; one of two (1/3); a tie between the right and the wrong picture, so none.
    assert scores["jaccard"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    # 2 of 5 drawn at random: 1/10 both, 6/10 one of them; 1 of 2: 1/2.
    assert scores["chance"] == pytest.approx((2 * (0.1 + 0.6 / 3) + 0.5) / 3)
    assert scores["questions"] == 3 and "jaccard_10_12" not in scores
    with pytest.raises(DataError, match="no question has 10 to 12 pictures"):
        listed(tmp_path, name="winogavil", kind="association", metric="jaccard_10_12")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('x,"[""a""]","[""b""]"', "'b' is no candidate"),
        ('x,"[""a""]","[""a""]"', "some of the candidates but not all"),
        ('x,"a","[""a""]"', "candidates is no JSON list of different names"),
        ('x,"[""a"", ""gone""]","[""a""]"', "the picture 'gone' is not in"),
    ],
)
def test_associations_that_are_no_question(tmp_path: Path, row: str, message: str) -> None:
    folder = sets.association_set(tmp_path)
    (folder / "test.csv").write_text(f"cue,candidates,associations\n{row}\n")
    with pytest.raises(DataError, match=message):
        listed(tmp_path, name="winogavil", kind="association", metric="jaccard")


def test_what_the_registry_says_of_datacomp() -> None:
    specs = {spec.name: spec for spec in load_suite("datacomp").sets}
    assert len(specs) == 38 and specs["winogavil"].metric == "jaccard_10_12"
    assert {name: spec.groups for name, spec in specs.items() if spec.groups} == {
        "fmow": "npy:0",
        "dollar_street": "npy:0",
        "geode": "npy:0",
    }
    assert specs["imagenet-a"].prompts == "imagenet1k" and specs["iwildcam"].metric == "macro_f1_present"
