"""The authors' checkpoint layout: there and back, to the bit."""

import pytest
import torch

from models.formats.eva_names import LayoutMismatch, authors_name, from_logical, is_derived, logical_name, to_logical
from tests.golden import ARCHITECTURES, load_tensors, logical, model_of


@pytest.mark.parametrize("fixture", ARCHITECTURES)
def test_round_trip_is_bit_identical(fixture: str) -> None:
    theirs = {name: value for name, value in load_tensors(f"{fixture}/weights").items() if not is_derived(name)}
    back = from_logical(to_logical(theirs, model_of(fixture)), model_of(fixture))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], value) and back[name].shape == value.shape for name, value in theirs.items())


@pytest.mark.parametrize("fixture", ARCHITECTURES)
def test_names_are_a_bijection(fixture: str) -> None:
    for theirs in load_tensors(f"{fixture}/weights"):
        if not is_derived(theirs):
            assert authors_name(logical_name(theirs)) == theirs


def test_the_rope_tables_are_derived_and_left_out() -> None:
    derived = [name for name in load_tensors("tiny-eva02-B/weights") if is_derived(name)]
    assert len(derived) == 2 + 2 * 4  # one module, registered once more in each block
    assert not any("rope" in name for name in logical("tiny-eva02-B", "weights"))


def test_qkv_rows_go_from_stacked_to_per_head() -> None:
    """Row r of theirs is (q | k | v, head, channel); ours is (head, q | k | v, channel)."""
    model = model_of("tiny-18b")  # 4 heads of 16
    rows = torch.arange(3 * 64).float()[:, None].expand(-1, 64)
    ours = to_logical({"visual.blocks.2.attn.qkv.weight": rows}, model)["vision.blocks.2.attn.qkv.weight"][:, 0]
    head, kind, channel = 2, 1, 5  # a k row
    assert ours[(head * 3 + kind) * 16 + channel] == kind * 64 + head * 16 + channel


def test_an_unknown_tensor_is_named() -> None:
    with pytest.raises(LayoutMismatch, match=r"visual\.fc_norm\.weight"):
        to_logical({"visual.fc_norm.weight": torch.zeros(1)}, model_of("tiny-18b"))
