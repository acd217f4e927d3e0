"""tools.embed and tools.evaluate on shards with odd samples: nothing is replaced, repeated or lost uncounted."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.shards.write import write_shard
from tests.checkpoint.jobs import alone, build, job_config, save
from tests.data.shard_factory import encode, picture
from tests.tools.test_embed import TOLERANCE
from tools.embed import __main__ as embed
from tools.evaluate import __main__ as evaluate

KINDS = ("good", "no caption", "no picture", "blank caption", "broken picture", "latin caption", "two captions")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with alone() as mesh:
        run = tmp_path_factory.mktemp("run")
        return save(build(job_config(run, "model.text.vocab_size=49408", "model.text.context_length=16"), mesh))


def sample(number: int, kind: str) -> tuple[str, dict[str, bytes]]:
    members = {"png": encode(picture(number)), "txt": f"picture number {number}".encode()}
    if kind == "no caption":
        del members["txt"]
    if kind == "no picture":
        del members["png"]
    members |= {
        "blank caption": {"txt": b" \n"},
        "broken picture": {"png": b"\x89PNG\r\n\x1a\n and no more"},
        "latin caption": {"txt": b"caf\xe9"},
        "two captions": {"txt": f"one {number}\ntwo {number}\n".encode()},
    }.get(kind, {})
    return f"k{number}", members


def shard(folder: Path, kinds: list[str]) -> Path:
    write_shard(str(folder / "0.tar"), [sample(number, kind) for number, kind in enumerate(kinds)])
    (folder / "0.tar.index.npz").unlink(missing_ok=True)
    return folder / "0.tar"


def embedded(checkpoint: Path, path: Path, *more: str) -> dict[str, np.ndarray]:
    out = path.with_name("out.npz")
    arguments = ["--checkpoint", str(checkpoint), "--shards", str(path), "--out", str(out), "--skip-hashes"]
    assert embed.main([*arguments, "--micro-batch", "1", *more]) == 0
    return dict(np.load(out))


HAS_IMAGE = {kind: kind not in ("no picture", "broken picture") for kind in KINDS}
HAS_TEXT = {kind: kind not in ("no caption", "blank caption", "latin caption") for kind in KINDS}
UNREADABLE = ("broken picture", "latin caption")


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=9).map(lambda kinds: ["good", *kinds]))
def test_rows_and_reports_are_the_members_there(checkpoint: Path, tmp_path: Path, kinds: list[str]) -> None:
    path = shard(tmp_path, kinds)
    kept = [number for number, kind in enumerate(kinds) if kind not in UNREADABLE]
    found = embedded(checkpoint, path)
    assert found["keys"].tolist() == [f"k{number}" for number in kept]
    assert found["image_valid"].tolist() == [HAS_IMAGE[kinds[number]] for number in kept]
    assert found["text_valid"].tolist() == [HAS_TEXT[kinds[number]] for number in kept]
    for side in ("image", "text"):
        lengths = np.linalg.norm(found[f"{side}_embeddings"], axis=1)
        assert np.abs(lengths[found[f"{side}_valid"]] - 1).max() < TOLERANCE
        assert np.isnan(lengths[~found[f"{side}_valid"]]).all()
    listed = tmp_path / "out.npz.left_out.jsonl"
    reports = [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []
    assert sorted(found["keys"].tolist() + [report["key"] for report in reports]) == sorted(
        f"k{number}" for number in range(len(kinds))
    )


def test_kept_as_nan_on_request_and_equal_to_the_sample_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["good", "broken picture", "latin caption", "good", "no picture"]
    found = embedded(checkpoint, shard(tmp_path, kinds), "--unreadable", "nan")
    assert "2 of 5 samples were kept as NaN (" in capsys.readouterr().err
    assert found["keys"].tolist() == [f"k{number}" for number in range(5)]
    assert found["image_valid"].tolist() == [True, False, True, True, False]
    assert found["text_valid"].tolist() == [True, True, False, True, True]
    by_sample = []
    for number in (0, 3):
        (tmp_path / str(number)).mkdir()
        write_shard(str(tmp_path / str(number) / "0.tar"), [sample(number, "good")])
        by_sample.append(embedded(checkpoint, tmp_path / str(number) / "0.tar"))
    for side in ("image_embeddings", "text_embeddings"):
        one_by_one = np.concatenate([arrays[side] for arrays in by_sample])
        assert np.abs(one_by_one - found[side][[0, 3]]).max() <= TOLERANCE


def test_pictures_alone_and_captions_alone(checkpoint: Path, tmp_path: Path) -> None:
    pictures = embedded(checkpoint, shard(tmp_path, ["no caption"] * 3))
    assert set(pictures) == {"image_embeddings", "image_valid", "keys"} and pictures["image_valid"].all()
    captions = embedded(checkpoint, shard(tmp_path, ["no picture"] * 3))
    assert set(captions) == {"text_embeddings", "text_valid", "keys"} and captions["text_valid"].all()
    assert not (tmp_path / "out.npz.left_out.jsonl").exists()


def test_scores_count_what_was_scored_and_say_what_was_not(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shard(tmp_path, ["good", *KINDS, "good"])
    arguments = [str(checkpoint), str(path), "--out", str(tmp_path / "scores.json"), "--skip-hashes"]
    assert evaluate.main([*arguments, "--predictions", str(tmp_path / "shown.json"), "--pictures", "9"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["samples"], scores["left_out"], scores["pictures"], scores["captions"]) == (9, 5, 4, 5)
    assert scores["chance"] == pytest.approx(5 / 4 / 5)
    said = capsys.readouterr().err
    assert "WARNING: 5 of 9 samples were left out" in said and "caption_not_utf8 1" in said and "k2 in" in said
    shown = json.loads((tmp_path / "shown.json").read_text())["samples"]
    assert [entry["key"] for entry in shown] == ["k0", "k1", "k7", "k8"]
    shard(tmp_path, ["no caption"] * 2)
    assert evaluate.main(arguments) == 1
    assert "no sample has a caption" in capsys.readouterr().err
    assert evaluate.main([*arguments, "--predictions", str(tmp_path)]) == 1
    assert "is a folder" in capsys.readouterr().err
