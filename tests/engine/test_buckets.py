"""Buckets of gradients: no large tower is one bucket, however many ranks there are."""

import pytest
import torch
from torch import nn

from engine.parallel.replicas import bucket_elements


@pytest.mark.parametrize(
    ("elements", "ranks", "expected"),
    [
        (695_000_000, 8, 40_000_000),
        (695_000_000, 360, 695_000_000 // 8),
        (695_000_000, 4608, 695_000_000 // 8),
        (2_200_000_000, 64, 64_000_000),
        (2_200_000_000, 576, 275_000_000),
        (100_000_000, 4608, 40_000_000),
    ],
)
def test_a_bucket_is_at_most_an_eighth_of_a_large_tower(elements: int, ranks: int, expected: int) -> None:
    with torch.device("meta"):
        module = nn.ParameterList([nn.Parameter(torch.empty(elements))])
    assert bucket_elements(module, ranks) == expected
