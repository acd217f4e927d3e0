"""The losses over several ranks equal one process with the whole batch, whatever the split and variant."""

import itertools
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from engine.objectives.contrastive.exchange import RowExchange, Variant
from engine.objectives.contrastive.matryoshka import nested_loss
from engine.objectives.contrastive.sigmoid import sigmoid_loss
from engine.objectives.contrastive.softmax import contrastive_loss
from tests.distributed import run_distributed
from tests.engine.distill_reference import TEACHERS, distilled_reference, result_of, taught_by
from tests.engine.loss_reference import (
    contrastive_reference,
    nested_reference,
    pairs,
    sigmoid_reference,
    worst_error,
)

pytestmark = pytest.mark.dist

GOLDEN = Path(__file__).parents[1] / "golden" / "g9-loss-ranks" / "ranks.safetensors"
VARIANTS: tuple[Variant, ...] = ("gather", "ring")
SPLITS = {
    2: [[6, 6], [9, 4], [0, 11], [7, 0]],
    3: [[5, 5, 5], [7, 1, 9], [0, 8, 3], [0, 0, 6]],
    4: [[4, 4, 4, 4], [5, 0, 9, 2], [0, 7, 0, 0], [1, 1, 1, 1]],
}


def _own_rows(counts: list[int]) -> slice:
    start = sum(counts[: dist.get_rank()])
    return slice(start, start + counts[dist.get_rank()])


@cache
def _whole(kind: str, rows: int) -> Any:
    """What the full matrix of `rows` pairs gives; no split, variant or tile changes it."""
    image, text = _pairs(rows)
    ids, widths, teachers = _copies(rows), [5, 24], TEACHERS["all of two"]
    softmax, sigmoid = partial(contrastive_reference, copies=ids), partial(sigmoid_reference, copies=ids)
    results = {
        "contrastive": lambda: contrastive_reference(image, text, 12.0),
        "sigmoid": lambda: sigmoid_reference(image, text, 10.0, -5.0),
        "contrastive with copies": lambda: nested_reference(softmax, image, text, 12.0, widths=widths),
        "sigmoid with copies": lambda: nested_reference(sigmoid, image, text, 10.0, -5.0, widths=widths),
    }
    if kind in results:
        return results[kind]()
    taught = taught_by(teachers, rows, image.shape[1], slice(None))
    return distilled_reference(kind.removeprefix("distilled "), image, text, taught, ids)


def _pairs(rows: int) -> tuple[Tensor, Tensor]:
    return pairs(rows, noise=1.0)  # a tiny loss would have few digits in the reference


def _copies(rows: int) -> Tensor:
    """Some pairs are no negatives of each other, within a rank and across ranks."""
    number = torch.arange(rows)
    return torch.stack([number % 4, number // 2], dim=1)


def _compare_splits(splits: list[list[int]], every: bool) -> dict[str, float]:
    """Worst error of this rank for every case, or for tiles of 3 of all splits and every second pair of the rest; with
    teachers then two splits.
    """
    errors = {}
    for number, (counts, variant, tile) in enumerate(itertools.product(splits, VARIANTS, (3, 1, 64))):
        if not every and tile != 3 and number % 2:
            continue
        own, rows, case = _own_rows(counts), sum(counts), f"{counts} {variant} tile {tile}"
        image, text = _pairs(rows)
        common: dict[str, Any] = {"group": dist.group.WORLD, "tile": tile, "variant": variant}
        for keep_bytes in (0, 2**20):
            result = contrastive_loss(image[own], text[own], 12.0, **common, keep_bytes=keep_bytes)
            errors[f"contrastive {case} keep {keep_bytes}"] = worst_error(result, _whole("contrastive", rows), own)
        sigmoid = sigmoid_loss(image[own], text[own], 10.0, -5.0, **common, row_counts=counts)
        errors[f"sigmoid {case}"] = worst_error(sigmoid, _whole("sigmoid", rows), own)
        split = splits.index(counts)
        if tile == 3 and (every or number % 2 == split % 2):
            errors |= _compare_copies(rows, own, case, common)
            if every or split in (1, 2):  # uneven ones, of each variant one
                errors |= _compare_distilled(rows, own, case, common | {"row_counts": counts})
    return errors


def _compare_copies(rows: int, own: slice, case: str, common: dict[str, Any]) -> dict[str, float]:
    """The same where some pairs are no negatives of each other, for nested widths."""
    (image, text), ids = _pairs(rows), _copies(rows)
    errors = {}
    for keep_bytes in (0, 2**20):
        softmax = partial(contrastive_loss, logit_scale=12.0, **common, copies=ids[own], keep_bytes=keep_bytes)
        result = nested_loss(softmax, image[own], text[own], [5, 24])
        expected = _whole("contrastive with copies", rows)
        errors[f"contrastive with copies {case} keep {keep_bytes}"] = worst_error(result, expected, own)
    sigmoid = partial(sigmoid_loss, logit_scale=10.0, logit_bias=-5.0, **common, copies=ids[own])
    of_sigmoid = nested_loss(sigmoid, image[own], text[own], [5, 24])
    errors[f"sigmoid with copies {case}"] = worst_error(of_sigmoid, _whole("sigmoid with copies", rows), own)
    return errors


def _compare_distilled(rows: int, own: slice, case: str, common: dict[str, Any]) -> dict[str, float]:
    """The same with what two teachers add, and some pairs that are no negatives of each other."""
    (image, text), ids = _pairs(rows), _copies(rows)
    taught = taught_by(TEACHERS["all of two"], rows, image.shape[1], own)
    errors = {}
    for kind in ("softmax", "sigmoid"):
        result = result_of(kind, image[own], text[own], taught, common | {"copies": ids[own]})
        errors[f"distilled {kind} {case}"] = worst_error(result, _whole(f"distilled {kind}", rows), own)
    return errors


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "every"])
@pytest.mark.parametrize("world_size", list(SPLITS))
def test_float64_equals_the_full_matrix_for_every_split(world_size: int, every: bool) -> None:
    found = run_distributed(_compare_splits, world_size, splits=SPLITS[world_size], every=every)
    for rank, errors in enumerate(found):
        too_large = {case: error for case, error in errors.items() if not error < 1e-12}
        assert not too_large, f"rank {rank}: {too_large}"


def _compare_with_golden() -> float:
    """Worst error against the one-process numbers of the authors' code."""
    golden = load_file(GOLDEN)
    prefix = f"world{dist.get_world_size()}"
    own = _own_rows([6] * dist.get_world_size())
    image, text = golden[f"{prefix}.image_features_norm"], golden[f"{prefix}.text_features_norm"]
    worst = 0.0
    for variant in VARIANTS:
        result = contrastive_loss(image[own], text[own], 14.285714, group=dist.group.WORLD, tile=4, variant=variant)
        # Their local loss leaves W times the gradient, to be averaged by data parallelism; ours is the
        # average.
        for got, expected in (
            (result.loss, golden[f"{prefix}.full.loss"]),
            (result.grad_image, golden[f"{prefix}.full.grad_image"][own]),
            (result.grad_text, golden[f"{prefix}.full.grad_text"][own]),
            (result.grad_image, golden[f"{prefix}.local_grad.grad_image"][own] / dist.get_world_size()),
            (result.grad_logit_scale, golden[f"{prefix}.full.grad_scale"]),
        ):
            worst = max(worst, ((got - expected).norm() / expected.norm()).item())
    return worst


@pytest.mark.parametrize("world_size", [2, 4])
def test_golden_numbers_of_the_authors_code(world_size: int) -> None:
    assert max(run_distributed(_compare_with_golden, world_size)) < 5e-6


def _compare_half_precision() -> float:
    counts = [9, 14]
    own = _own_rows(counts)
    image, text = (rows.to(torch.bfloat16) for rows in pairs(sum(counts)))
    reference = contrastive_reference(image, text, 100.0)
    return max(
        worst_error(
            contrastive_loss(image[own], text[own], 100.0, group=dist.group.WORLD, tile=5, variant=variant),
            reference,
            own,
        )
        for variant in VARIANTS
    )


def test_bfloat16_embeddings_travel_as_they_are_and_give_float32_results() -> None:
    assert max(run_distributed(_compare_half_precision, 2)) < 2e-5


def _compare_within_subgroups() -> float:
    """Ranks 0, 2 and ranks 1, 3 hold the same pairs, as tensor-parallel copies do."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[dist.get_rank() % 2]
    image, text = pairs(13)
    own = slice(0, 5) if dist.get_rank() < 2 else slice(5, 13)
    reference = contrastive_reference(image, text, 30.0)
    return max(
        worst_error(contrastive_loss(image[own], text[own], 30.0, group=group, variant=variant), reference, own)
        for variant in VARIANTS
    )


def test_copies_in_another_group_are_never_negatives() -> None:
    assert max(run_distributed(_compare_within_subgroups, 4)) < 1e-12


def _blocks_seen() -> tuple[list[tuple[int, bool]], list[tuple[list[float], bool]]]:
    """(owner, is own) of what a ring shows this rank, twice in a row; (owners of the rows, is own) of a gather."""
    rows = torch.full((dist.get_rank() + 1, 2), float(dist.get_rank()))
    exchange = RowExchange.create(rows, dist.group.WORLD)
    whole = torch.tensor([0.0, 1, 1, 2, 2, 2])
    ring, turned = exchange.blocks(rows, "ring"), []
    for _ in range(2):
        for block in ring:
            owner = int(block.embeddings[0, 0])
            assert (block.embeddings[:, 0] == whole[block.rows]).all() and len(block.embeddings) == owner + 1
            turned.append((owner, block.is_own))
    gathered = list(exchange.blocks(rows, "gather"))
    assert all((block.embeddings[:, 0] == whole[block.rows]).all() for block in gathered)
    return turned, [(block.embeddings[:, 0].tolist(), block.is_own) for block in gathered]


def test_every_row_is_seen_once_and_the_own_ones_first() -> None:
    behind, before = [[1, 1, 2, 2, 2], [2, 2, 2], []], [[], [0], [0, 1, 1]]
    for rank, (turned, gathered) in enumerate(run_distributed(_blocks_seen, 3)):
        assert turned == [((rank + step) % 3, step == 0) for step in range(3)] * 2
        # However many ranks there are, the others' rows come in two blocks: tiles do not shrink with the ranks.
        assert gathered == [([rank] * (rank + 1), True), (behind[rank], False), (before[rank], False)]
