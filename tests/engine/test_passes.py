"""Blocks of a tower hold every element once, and sums of their bits see every change but those that are meant."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.adamw import adamw as torch_adamw

from engine.config.read import resolve
from engine.optim import adamw, blocks
from engine.optim.blocks import Block, BlockSums, cut, parts_of
from engine.optim.groups import TensorGroup
from engine.optim.passes import BLOCK_ELEMENTS, words_of
from engine.optim.state import OwnedState, Sums
from engine.parallel.shards import Piece, Shard


def _shard(elements: int, pieces: list[tuple[int, int]], offset: int = 0, dtype: torch.dtype = torch.float32) -> Shard:
    weight = torch.randn(elements + offset).to(dtype)[offset:]
    of_tensors = [Piece(number, start, stop, 0) for number, (start, stop) in enumerate(pieces)]
    return Shard(weight, torch.randn(elements), of_tensors, [], elements)


@pytest.mark.parametrize("elements", [1, 2, 7, 4096, 4099])
@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_hold_everything_once_and_a_flipped_bit_is_not_missed(
    elements: int, offset: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_WHOLE_VECTORS", 1)
    pieces = [(0, elements // 3), (elements // 3, elements - elements // 5)]  # and padding
    shards = [_shard(elements, pieces, offset, dtype), _shard(3, [(0, 3)])]
    kinds = {"weight": [shard.weight for shard in shards], "moment": [shard.gradient for shard in shards]}
    of_all = cut(shards, kinds, 100)
    for i, shard in enumerate(shards):
        of_shard = [block for block in of_all if block.shard == i]
        assert torch.cat([block.held["weight"] for block in of_shard]).equal(shard.weight)
        for piece in shard.pieces:
            found = [s.held["weight"] for block in of_shard for s in block.segments if s.tensor == piece.tensor]
            assert torch.cat([*found, shard.weight[:0]]).equal(shard.weight[piece.start : piece.stop])
    before, after = (BlockSums(of_all, torch.device("cpu")) for _ in range(2))
    before.take_the_rest()
    for place in {0, elements // 2, elements - 1}:
        flat = kinds["weight"][0]
        flat.view(torch.int16)[place * flat.element_size() // 2] ^= 1 << 6
        changed = after.begin().take_the_rest(but=["moment"]).differences(before, ["weight", "moment"])
        assert changed.tolist() == [True, False]
        flat.view(torch.int16)[place * flat.element_size() // 2] ^= 1 << 6
    assert after.begin().take_the_rest().differences(before, after.taken).tolist() == [False, False]


def test_a_change_that_is_meant_is_none_wherever_blocks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_WHOLE_VECTORS", 1)
    state = _state([_shard(11, [(0, 11)]), _shard(9, [(0, 9)])], block_elements=4)
    state.sums = Sums(left=state.to_sum().take_the_rest())
    with state.changes(1, slice(3, 6)):
        state.master[1][3:6] = 5.0
    assert state.sums.left is not None
    assert not state.to_sum().take_the_rest().differences(state.sums.left, ["weight"]).any()
    state.master[1][3:6] = 6.0
    assert state.to_sum().take_the_rest().differences(state.sums.left, ["weight"]).tolist() == [True]


def test_blocks_are_made_once_and_anew_for_other_tensors() -> None:
    state = _state([_shard(8, [(0, 8)])])
    first, sums = state.blocks(), state.to_sum()
    assert state.blocks() is first and state.to_sum(sums) is sums
    state.average = [master.clone() for master in state.master]
    assert [set(block.held) for block in state.blocks()] == [{"weight", "average"}]
    assert state.to_sum(sums) is not sums


def _state(
    shards: list[Shard],
    groups: Sequence[TensorGroup] = (),
    moments: tuple[str, ...] = (),
    block_elements: int = BLOCK_ELEMENTS,
) -> OwnedState:
    tower: Any = SimpleNamespace(shards=shards, counted=torch.zeros(1))
    return OwnedState(tower, list(groups), moments, block_elements=block_elements)


@pytest.mark.parametrize("elements", [1, 700, 3000, 1 << 20])
def test_blocks_end_where_whole_vectors_of_a_tensor_end(elements: int) -> None:
    """Or where the next one begins: so no call on a block rounds otherwise, and where tensors begin at even elements
    words of eight bytes hold it.
    """
    pieces = [(0, 41), (64, 5017), (5056, 9000), (9000, 9002), (9024, 9025), (9088, 20001)]
    shard = _shard(20_480, pieces)
    parts = parts_of(shard, elements)
    assert [0, *(part.stop for part in parts)] == [*(part.start for part in parts), 20_480]
    for border in (part.stop for part in parts[:-1]):
        inside = [border - start for start, stop in pieces if start < border < stop]
        assert all(own % 1024 == 0 for own in inside), border
        assert inside or border in {start for start, _ in pieces} or not any(a <= border < b for a, b in pieces)
    assert all(part.stop - part.start < elements + 1024 for part in parts)
    assert {block.words["weight"].dtype for block in cut([shard], {"weight": [shard.weight]}, elements)} == {
        torch.int64
    }


OPTIM = resolve({"model": "tiny-18b", "data": {"shards": ["-"]}}, ["optim.name=adamw"]).optim
RATES = {"vision": 0.01, "text": 0.02}


def _adamw_state(dtype: torch.dtype = torch.float32) -> OwnedState:
    """Blocks end inside tensors, one of which is younger; one begins at an odd element, one shard does in memory."""
    torch.manual_seed(0)
    pieces = [(3, 40), (40, 5017), (5020, 9000)]
    shards = [_shard(9001, pieces, dtype=dtype), _shard(6000, [(0, 6000)], 1, dtype)]
    groups = [TensorGroup("vision", 1.0, 0.25), TensorGroup("text", 0.5, 0.0), TensorGroup("vision", 1.0, 0.25)]
    state = _state(shards, groups, ("m", "v"), block_elements=700)
    state.began = [0, 2, 0]
    assert len(state.blocks()) > 10
    return state


def _update(state: OwnedState, rule: adamw.AdamW, t: int, scale: float = 1.0) -> None:
    for _ in rule.update(state, OPTIM, gradient_scale=scale, rates=RATES, t=t):
        pass


@pytest.mark.parametrize("scale", [1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_by_blocks_is_torchs_own_to_the_bit_and_sums_what_it_finds_and_leaves(
    dtype: torch.dtype, scale: float
) -> None:
    state, rule = _adamw_state(dtype), adamw.AdamW()
    shards, left = state.shards.shards, state.to_sum().take_the_rest()
    wanted = {kind: [flat.clone() for flat in flats] for kind, flats in state.kinds().items()}
    for t in (3, 4, 5):
        found, left_before = state.to_sum(), left
        left = state.to_sum()
        state.sums = Sums(found, left)
        gradients = [torch.randn_like(shard.gradient) for shard in shards]
        for i, piece in ((i, piece) for i, shard in enumerate(shards) for piece in shard.pieces):
            group, part = state.groups[piece.tensor], slice(piece.start, piece.stop)
            weight, first, second = ([wanted[kind][i][part]] for kind in ("weight", "m", "v"))
            done = [torch.tensor(t - 1.0 - state.began[piece.tensor])]
            torch_adamw(
                weight, [gradients[i][part].clone()], first, second, [], done, fused=True, amsgrad=False,
                beta1=OPTIM.betas[0], beta2=OPTIM.betas[1], lr=RATES[group.tower] * group.lr_scale, eps=OPTIM.eps,
                weight_decay=group.weight_decay, maximize=False,
                grad_scale=None if scale == 1 else torch.tensor(1 / scale),
            )  # fmt: skip
        for shard, gradient in zip(shards, gradients, strict=True):
            shard.gradient.copy_(gradient)
        _update(state, rule, t, scale)
        for kind, flats in state.kinds().items():
            for flat, theirs in zip(flats, wanted[kind], strict=True):
                assert flat.equal(theirs), kind
        assert all(shard.weight.equal(flat.to(dtype)) for shard, flat in zip(shards, wanted["weight"], strict=True))
        assert found.taken == left.taken == {"weight", "m", "v"}
        assert not found.differences(left_before, found.taken).any(), "what the last update has left"
        assert not state.to_sum().take_the_rest().differences(left, left.taken).any()


@pytest.mark.parametrize("kind", ["weight", "m", "v"])
def test_adamw_sums_what_it_finds_before_it_moves_it_wherever_it_lies(kind: str) -> None:
    """At both ends of every block, where vectors of one reached into the next one, and in what belongs to no tensor."""
    state, rule = _adamw_state(), adamw.AdamW()

    def ends(block: Block) -> set[int]:
        return {block.start, (block.start + block.stop) // 2, block.stop - 1}

    left = state.to_sum().take_the_rest()
    for t, block in enumerate(state.blocks(), 3):
        for place in ends(block):
            state.kinds()[kind][block.shard].view(torch.int32)[place] ^= 1 << 5
            state.sums = Sums(state.to_sum(), state.to_sum())
            found, sums_of_next = state.sums.found, state.sums.left
            assert found is not None and sums_of_next is not None
            _update(state, rule, t)
            differ = dict(zip(found.kinds, found.differences(left, found.taken).tolist(), strict=True))
            assert differ == {name: name == kind for name in ("weight", "m", "v")}, (block.number, place)
            left = sums_of_next


def test_adamw_sums_nothing_that_nobody_wants() -> None:
    state, rule = _adamw_state(), adamw.AdamW()
    assert rule.sums_on_its_way(state) == ("weight", "m", "v")
    rule.sums_on_a_cpu = False  # as on a GPU
    assert rule.sums_on_its_way(state) == ()
    _update(state, rule, 3)
    assert state.sums == Sums()


def test_what_stands_for_the_memory_of_a_gpu_is_passed_over_as_there() -> None:
    def lengths(flat: Tensor) -> list[int]:
        shard = Shard(flat, flat, [Piece(0, 0, flat.numel(), 0)], [], flat.numel())
        return [part.stop - part.start for part in parts_of(shard, 1 << 18)]

    with FakeTensorMode():
        assert lengths(torch.zeros(10**9)) == [10**9]
    assert lengths(torch.zeros(10**6)) == [1 << 18] * 3 + [10**6 - 3 * (1 << 18)]
    assert lengths(torch.zeros(0)) == []


def test_the_words_of_a_part_hold_all_of_it() -> None:
    flat = torch.arange(8, dtype=torch.float32)
    assert words_of(flat).dtype == torch.int64 and words_of(flat[:7]).dtype == torch.int32
    assert words_of(flat, slice(3, 5)).data_ptr() == flat[2:].data_ptr() and len(words_of(flat, slice(3, 5))) == 2
    assert len(words_of(flat[1:], slice(3, 5))) == 2
