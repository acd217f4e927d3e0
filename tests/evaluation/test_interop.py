"""clip_benchmark's own measures on the same embeddings; installed by hand (docs/results/evaluation.md)."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from engine.evaluation.ranking import score
from engine.evaluation.retrieval import recall
from engine.evaluation.suite.metrics import average_precisions, classification, ranks_and_predictions

theirs_retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
theirs_classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
TOLERANCE = 1e-6


def draw(rows: int, width: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("seed", range(3))
def test_classification(seed: int) -> None:
    image, weights = draw(300, 16, seed), draw(20, 16, seed + 10)
    labels = torch.randint(0, 20, (300,), generator=torch.Generator().manual_seed(seed))
    ranks, predicted = ranks_and_predictions(image, torch.arange(300), weights, labels)
    ours = classification(ranks, predicted, labels, 20)
    logits = 100 * image @ weights.T
    top1, top5 = theirs_classification.accuracy(logits, labels, topk=(1, 5))
    assert [ours["top1"], ours["top5"]] == pytest.approx([top1, top5], abs=TOLERANCE)
    balanced = theirs_classification.balanced_accuracy_score(labels, logits.argmax(dim=1))
    assert ours["mean_per_class"] == pytest.approx(balanced, abs=TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision(seed: int) -> None:
    scores = score(draw(200, 16, seed), draw(12, 16, seed + 10))
    truth = torch.randint(0, 2, (200, 12), generator=torch.Generator().manual_seed(seed))
    theirs = theirs_classification.average_precision_per_class(scores, truth).mean().item()
    assert average_precisions(scores, truth)["average_precision"] == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize("captions", [1, 5])
def test_retrieval_with_several_captions(captions: int) -> None:
    image, text = draw(60, 16, 1), draw(60 * captions, 16, 2)
    owners = torch.arange(60 * captions) // captions
    ours = recall(image, text, torch.stack([owners, torch.arange(len(text))], dim=1))
    scores = text @ image.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), owners] = True
    for k in (1, 5, 10):
        for name, pairs in {"text_to_image": (scores, positive), "image_to_text": (scores.T, positive.T)}.items():
            hits = theirs_retrieval.batchify(theirs_retrieval.recall_at_k, *pairs, 64, "cpu", k=k) > 0
            assert ours[f"{name}_recall_at_{k}"] == pytest.approx(float(np.mean(hits.numpy())), abs=TOLERANCE)
