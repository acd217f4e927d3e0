"""How many micro-batches may keep their activations: the budget in GB against what one micro-batch really keeps."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(forward: Callable[[], Tensor], weights: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of `forward`, each storage once, the weights not counted."""
    known = {_identity(weight) for weight in weights}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _identity(tensor) not in known:
            sizes[_identity(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    # The pack hook sees storages while they are alive; everything counted is still held by `output`'s graph here.
    del output
    return sum(sizes.values())


def _identity(tensor: Tensor) -> int:
    """Identity of a live tensor's storage; the data's address would not do for tensors without data (dry runs)."""
    return tensor.untyped_storage()._cdata


def keep_within(budget_gb: float, bytes_each: int, micro_batches: int) -> int:
    """k: micro-batches whose activations fit into the budget."""
    return min(micro_batches, int(budget_gb * 1e9 // max(1, bytes_each)))
