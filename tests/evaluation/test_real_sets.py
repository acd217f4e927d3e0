"""Real pictures in the community's layouts against other people's measures; clips by stream copy and by re-encoding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.evaluation.inputs import picture_identity
from engine.evaluation.sets.pictures import FileSamples
from tests.evaluation import sets
from tests.evaluation.commands import evaluated, row

pytestmark = sets.NEEDS_SKLEARN


def test_groups_of_drawings_and_five_captions_a_picture(checkpoint: Path, tmp_path: Path) -> None:
    """The measures of a run are those of scikit-learn, and of recall by hand, on the embeddings that it saves."""
    from sklearn import metrics

    parquet = pytest.importorskip("pyarrow.parquet")
    sets.emoji_groups_set(tmp_path, per_class=6)
    sets.emoji_captions_set(tmp_path, count=12)
    (tmp_path / "suite.yaml").write_text(
        "sets: [{name: openmoji, classes: 4, metric: mean_per_class}, {name: told, kind: retrieval, samples: 12}]"
    )
    assert evaluated(checkpoint, tmp_path, tmp_path / "out", "--save-features") == 0
    tree = json.loads((tmp_path / "out" / "results.json").read_text())
    saved = parquet.read_table(tmp_path / "out" / "features" / "openmoji.test.squash.1.parquet")
    cosines, labels = np.array(saved["cosines"].to_pylist()), np.array(saved["label"].to_pylist())
    predicted, groups = cosines.argmax(axis=1), row(tree, "openmoji")
    assert len(labels) == 24
    assert groups["top1"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert groups["mean_per_class"] == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    assert groups["macro_f1"] == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))

    told = row(tree, "told")
    assert (told["pictures"], told["captions"]) == (12, 12 * 4 + 6)  # a caption that two share is one
    told_table = parquet.read_table(tmp_path / "out" / "features" / "told.test.squash.1.parquet")
    image = told_table["image_embeddings"]
    embeddings = next((tmp_path / "out" / "texts").glob("captions_*.f32"))
    text = np.fromfile(embeddings, np.float32).reshape(54, -1).astype(np.float64)
    scores = np.array(image.to_pylist()).astype(np.float64) @ text.T
    numbers = iter(range(54))
    known: dict[str, int] = {}
    own = [[known.setdefault(f"{n}.{c}" if c != 1 else f"shared {n // 2}", -1) for c in range(5)] for n in range(12)]
    for n in range(12):  # captions are numbered in the order of their first appearance
        for c in range(5):
            name = f"{n}.{c}" if c != 1 else f"shared {n // 2}"
            if known[name] < 0:
                known[name] = next(numbers)
            own[n][c] = known[name]
    captions = parquet.read_table(tmp_path / "out" / "features" / "told.test.squash.1.captions.parquet").to_pylist()
    saved_text = np.array([row["text_embeddings"] for row in captions])
    assert [row["keys"] for row in captions] == [key for key in told_table["keys"].to_pylist() for _ in range(5)]
    assert np.array_equal(saved_text, text[np.array(own).ravel()].astype(saved_text.dtype))
    best = scores.argsort(axis=1)[:, ::-1]
    for k in (1, 5, 10):
        right = [bool(set(best[n, :k]) & set(own[n])) for n in range(12)]
        assert told[f"image_to_text_recall_at_{k}"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("frames", [1, 2, 8])
def test_a_stream_copy_is_the_same_clip_and_a_re_encoded_one_is_not(tmp_path: Path, frames: int) -> None:
    pytest.importorskip("av")
    clip = sets.clip_bytes(3, frames=6)
    contents = {"a.mp4": clip, "copy.mkv": sets.remuxed(clip, "matroska"), "again.mp4": sets.reencoded(clip)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    samples = FileSamples(
        [str(tmp_path / name) for name in contents],
        image_size=28, transform="squash", frames=frames, max_pixels=10**8,
    )  # fmt: skip
    seen = samples.read_each(np.arange(3))
    assert seen.has_image.all() and seen.images.shape[:-3] == ((3, frames) if frames > 1 else (3,))
    original, copy, again = seen.images.float()
    assert torch.equal(original, copy) and not torch.equal(original, again)
    assert (original - again).abs().mean() < 12  # of 255: the same pictures through another codec
    same, other = (picture_identity(images) for images in seen.images[1:])
    assert picture_identity(seen.images[0]) == same != other
