"""A stash gives back what was pushed, last first; the host's one does so after device memory was used again."""

import pytest
import torch
from torch import Tensor

from engine.pipeline.stash import DeviceStash, HostStash

CPU = torch.device("cpu")


def _inputs() -> list[Tensor | None]:
    """As a chunk where the tower starts and two others see them, micro-batch by micro-batch."""
    return [None, torch.full((2, 3), 1.0), torch.full((2, 3), 2.0), None, torch.full((2, 3), 3.0)]


def _same(got: Tensor | None, expected: Tensor | None) -> bool:
    if got is None or expected is None:
        return got is expected
    return torch.equal(got, expected)


@pytest.mark.parametrize("stash", [DeviceStash(), HostStash(CPU)], ids=["device", "host"])
def test_last_in_first_out_over_several_steps(stash: DeviceStash | HostStash) -> None:
    for _step in range(3):
        inputs = _inputs()
        for hidden in inputs:
            stash.push(hidden)
        stash.prefetch()
        assert all(_same(stash.pop(), expected) for expected in reversed(inputs))


def test_the_host_holds_copies() -> None:
    stash = HostStash(CPU)
    hidden = torch.ones(4)
    stash.push(hidden)
    hidden.zero_()
    got = stash.pop()
    assert got is not None and torch.equal(got, torch.ones(4))


def test_what_was_popped_is_not_overwritten_by_later_steps() -> None:
    stash = HostStash(CPU)
    stash.push(torch.ones(4))
    first = stash.pop()
    stash.push(torch.zeros(4))
    assert first is not None and torch.equal(first, torch.ones(4))


def test_host_buffers_are_used_again() -> None:
    stash = HostStash(CPU)
    addresses = []
    for _step in range(2):
        for value in range(3):
            stash.push(torch.full((5,), float(value)))
        addresses.append({buffer.data_ptr() for buffer in stash._kept if buffer is not None})
        for _ in range(3):
            stash.pop()
    assert addresses[0] == addresses[1] and len(addresses[0]) == 3
