"""Sums of bits along with a pass over a vector are those of the whole vector, and a flipped bit is not missed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.optim import passes
from engine.optim.passes import Tally, in_cache, sum_of_bits, total, words_of


@pytest.mark.parametrize("elements", [1, 2, 7, 4096, 4099])
@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_along_a_pass_is_that_of_the_whole(
    elements: int, offset: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "_NEAR_BYTES", 512)
    monkeypatch.setattr(passes, "_CACHED_ELEMENTS", 100)
    flat = torch.randn(elements + offset).to(dtype)[offset:]
    near, by_parts, seen = Tally(flat), Tally(flat), 0
    for (part,) in in_cache(flat):
        seen += part.numel()
        near.up_to(seen)
        by_parts.up_to(seen, all_of_them=True)
    assert seen == elements and int(total([near])) == int(total([by_parts])) == int(sum_of_bits(flat))
    before = int(sum_of_bits(flat))
    flat.view(torch.int16)[-1] ^= 1 << 6
    assert int(sum_of_bits(flat)) != before


def test_what_stands_for_the_memory_of_a_gpu_is_passed_over_as_there() -> None:
    with FakeTensorMode():
        flat = torch.zeros(10**9)
        assert [part.numel() for (part,) in in_cache(flat)] == [10**9]
        tally = Tally(flat)
        tally.up_to(10**9 - 2)
    assert not tally._summed
    assert len(list(in_cache(torch.zeros(10**6)))) == 4


def test_the_words_of_a_part_hold_all_of_it() -> None:
    flat = torch.arange(8, dtype=torch.float32)
    assert words_of(flat).dtype == torch.int64 and words_of(flat[:7]).dtype == torch.int32
    assert words_of(flat, slice(3, 5)).data_ptr() == flat[2:].data_ptr() and len(words_of(flat, slice(3, 5))) == 2
    assert len(words_of(flat[1:], slice(3, 5))) == 2
