"""Zero-shot and retrieval against brute force in plain Python: sort everything, look the answer up."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from engine.evaluation.ranking import best_ranks, score, share_within
from engine.evaluation.retrieval import mean_recall, predictions, recall
from engine.evaluation.zero_shot import class_weights


def embeddings(rows: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def integer_embeddings(rows: int, seed: int) -> torch.Tensor:
    """Few distinct exact values: scores tie all the time, and every sum is exact in any order."""
    return torch.randint(-1, 2, (rows, 4), generator=torch.Generator().manual_seed(seed)).float()


def of_labels(image: torch.Tensor, classes: torch.Tensor, labels: torch.Tensor, tile_rows: int = 512) -> torch.Tensor:
    """Ranks of the right classes, as zero-shot classification asks for them (engine/evaluation/scores.py)."""
    pairs = torch.stack([torch.arange(len(labels)), labels], dim=1)
    return best_ranks(image, classes, pairs, tile_rows=tile_rows)


def brute_rank(query: torch.Tensor, candidates: torch.Tensor, right: set[int]) -> int:
    """Wrong candidates that are at least as good as the best right one."""
    scores = (candidates.double() @ query.double()).float().tolist()
    best = max(scores[index] for index in right)
    return sum(value >= best for index, value in enumerate(scores) if index not in right)


def sorted_candidates(query: torch.Tensor, candidates: torch.Tensor) -> list[int]:
    """Candidate indices by falling score, lower index first: Python's sort is stable."""
    scores = (candidates.double() @ query.double()).float().tolist()
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def brute_recall(image, text, pairs, k):
    of_image = [{t for i, t in pairs if i == image_index} for image_index in range(len(image))]
    of_text = [{i for i, t in pairs if t == text_index} for text_index in range(len(text))]
    image_hits = [brute_rank(image[i], text, right) < k for i, right in enumerate(of_image)]
    text_hits = [brute_rank(text[t], image, right) < k for t, right in enumerate(of_text)]
    return sum(image_hits) / len(image), sum(text_hits) / len(text)


def test_class_weights_are_the_normalised_mean_of_normalised_prompts():
    prompts = torch.tensor([[3.0, 0.0], [0.0, 5.0], [1.0, 0.0], [2.0, 0.0]])
    weights = class_weights(prompts, templates_per_class=2)
    torch.testing.assert_close(weights, torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]]))
    assert class_weights(prompts.bfloat16(), 2).dtype == torch.float32


@pytest.mark.parametrize(("rows", "templates"), [(5, 2), (0, 1), (4, 0)])
def test_class_weights_refuse_uneven_prompts(rows, templates):
    with pytest.raises(ValueError, match="templates per class"):
        class_weights(torch.ones(rows, 3), templates)


def test_class_weights_refuse_cancelling_prompts():
    with pytest.raises(ValueError, match="cancel out"):
        class_weights(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 2)


@pytest.mark.parametrize("tile_rows", [1, 7, 1000])
@pytest.mark.parametrize("ties", [False, True])
def test_top_k_equals_brute_force(tile_rows, ties):
    image, classes = (
        (integer_embeddings(60, 1), integer_embeddings(11, 2)) if ties else (embeddings(60), embeddings(11, seed=1))
    )
    labels = torch.randint(0, 11, (60,), generator=torch.Generator().manual_seed(3))
    ranks = of_labels(image, classes, labels, tile_rows)
    for k in (1, 5, 11):
        expected = sum(brute_rank(image[i], classes, {int(labels[i])}) < k for i in range(60)) / 60
        assert share_within(ranks, k) == expected
    assert share_within(ranks, 11) == 1.0


@pytest.mark.parametrize("tile_rows", [1, 7, 1000])
@pytest.mark.parametrize("ties", [False, True])
def test_recall_equals_brute_force_with_several_captions(tile_rows, ties):
    image, text = (
        (integer_embeddings(20, 4), integer_embeddings(53, 5)) if ties else (embeddings(20), embeddings(53, seed=6))
    )
    # Uneven numbers of captions in shuffled order: each image has one to many, and a caption may belong to two.
    owners = torch.cat([torch.arange(20), torch.arange(33) % 9])
    pairs = torch.cat([torch.stack([owners, torch.arange(53)], dim=1), torch.tensor([[3, 0], [3, 40], [19, 7]])])
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(7))]
    got = recall(image, text, pairs, ks=(1, 5, 10), tile_rows=tile_rows)
    for k in (1, 5, 10):
        by_image, by_text = brute_recall(image, text, pairs.tolist(), k)
        assert got[f"image_to_text_recall_at_{k}"] == by_image
        assert got[f"text_to_image_recall_at_{k}"] == by_text


def test_any_caption_counts_for_an_image_and_any_image_for_a_caption():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    got = recall(image, text, torch.tensor([[0, 0], [0, 1], [1, 2]]), ks=(1,))
    # Captions 1 and 2 tie for image 1, and caption 1 is wrong there: a tie counts against the model.
    assert got == {"image_to_text_recall_at_1": 0.5, "text_to_image_recall_at_1": 2 / 3}
    shared = recall(image, text, torch.tensor([[0, 0], [0, 1], [1, 1], [1, 2]]), ks=(1,))
    assert shared == {"image_to_text_recall_at_1": 1.0, "text_to_image_recall_at_1": 1.0}


@pytest.mark.parametrize("tile_columns", [1, 3, 1000])
def test_candidates_in_tiles_give_the_same_ranks(tile_columns):
    image, text = integer_embeddings(20, 4), integer_embeddings(53, 5)
    pairs = torch.stack([torch.arange(53) % 20, torch.arange(53)], dim=1)
    whole = best_ranks(image, text, pairs)
    assert torch.equal(best_ranks(image, text, pairs, tile_rows=6, tile_columns=tile_columns), whole)


def test_mean_recall_is_the_mean_over_data_sets_and_directions():
    assert mean_recall({"a": 1.0, "b": 0.5}, {"a": 0.0, "b": 0.5}) == 0.5
    with pytest.raises(ValueError, match="at least one"):
        mean_recall()


@pytest.mark.parametrize("tile_rows", [1, 4, 100])
def test_predictions_are_the_best_captions_in_order(tile_rows):
    image, text = integer_embeddings(9, 8), integer_embeddings(12, 9)
    captions = [f"caption {index}" for index in range(12)]
    got = predictions(image, text, captions, k=3, tile_rows=tile_rows)
    for row, embedding in zip(got, image, strict=True):
        expected = sorted_candidates(embedding, text)[:3]
        assert [entry["caption"] for entry in row] == [captions[index] for index in expected]
        assert [entry["score"] for entry in row] == [float(text[index] @ embedding) for index in expected]


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_scores_are_the_exact_sums_rounded_once(rows):
    """math.fsum has no rounding error; a float32 matrix product differs from it in most places."""
    image, text = embeddings(12, width=512), embeddings(9, width=512, seed=1)
    scores = torch.cat([score(image[start : start + rows], text) for start in range(0, 12, rows)])
    exact = [[math.fsum((query.double() * candidate.double()).tolist()) for candidate in text] for query in image]
    assert torch.equal(scores, torch.tensor(exact, dtype=torch.float64).float())


def test_equal_embeddings_tie_whatever_the_width_and_a_tie_is_no_hit():
    """A long dot product rounds differently in different BLAS kernels; the float64 sums must hide that."""
    image = embeddings(40, width=1027)
    classes = embeddings(1, width=1027, seed=1).repeat(33, 1)
    for label in (0, 32):
        ranks = best_ranks(image, classes, torch.stack([torch.arange(40), torch.full((40,), label)], dim=1))
        assert ranks.tolist() == [32] * 40


def test_not_finite_embeddings_are_an_error_not_a_perfect_score():
    image = embeddings(4)
    image[2, 3] = float("nan")
    with pytest.raises(ValueError, match="1 of 4 query embeddings are not finite"):
        of_labels(image, embeddings(5), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="1 of 4 query embeddings"):
        predictions(image, embeddings(5), list("abcde"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: of_labels(embeddings(4), embeddings(6), torch.full((4,), 6)), r"right answers must lie in \[0, 6\)"),
        (lambda: of_labels(embeddings(4), embeddings(6), torch.zeros(3).long()), "1 of 4 queries have no right answer"),
        (
            lambda: best_ranks(embeddings(4), embeddings(6), torch.zeros(4, 2).int()),
            r"queries of the right answers must be int64 \[4\]",
        ),
        (
            lambda: of_labels(embeddings(4), embeddings(6, width=8), torch.zeros(4).long()),
            r"of one D, got \[4, 16\] and \[6, 8\]",
        ),
        (
            lambda: recall(embeddings(3), embeddings(3), torch.tensor([[0, 0], [1, 1], [2, 2]]), ks=(1, 5)),
            "ks .* images and captions, which is 3",
        ),
        (
            lambda: recall(embeddings(3), embeddings(3), torch.tensor([[0, 0], [0, 1], [2, 2]]), ks=(1,)),
            "1 of 3 queries have no partner",
        ),
        (
            lambda: recall(embeddings(3), embeddings(3), torch.tensor([[0, 0], [1, 1], [-1, 2]]), ks=(1,)),
            "queries of the right answers must lie",
        ),
        (lambda: predictions(embeddings(3), embeddings(4), ["a"]), "1 captions for 4"),
        (lambda: of_labels(embeddings(0), embeddings(6), torch.zeros(0).long()), "nothing to rank: 0 queries"),
    ],
)
def test_input_that_cannot_be_ranked_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
