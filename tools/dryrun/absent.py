"""Answers for what a dry run does not have: other ranks, and the values of tensors."""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

_RESIZING = {"set_", "resize_", "resize_as_"}
DEVICE = torch.ops.prim.device.default
_READ = torch.ops.aten._local_scalar_dense.default


class _Done(dist.Work):
    """A transfer that is complete; the one of torch's fake groups never says so, and every message would stay alive."""

    def wait(self, timeout: Any = None) -> bool:
        """At once."""
        return True

    def is_completed(self) -> bool:
        """Always."""
        return True


_DONE = _Done()  # torch holds it without keeping the Python object alive


class Absent(TorchDispatchMode):
    """Above a FakeTensorMode: a transfer is done at once, a write has nothing to write, a number that is read is 1 and
    a truth value false. What follows from known values alone (masks from numpy) is computed.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Sees every operator."""
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for with every operator; the mode below takes a while to say the same
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            work = _DONE.boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        if _are_known((*args, *kwargs.values())):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        written = _written_argument(func)
        if written is not None:
            return kwargs[written] if isinstance(written, str) else args[written]
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:
            if func is not _READ:
                raise
            return _number(args[0].dtype)


def _are_known(args: tuple[Any, ...]) -> bool:
    """Whether an operator takes tensors, and each of them has values."""
    given = [value for arg in args for value in (arg if isinstance(arg, list | tuple) else (arg,))]
    tensors = [value for value in given if isinstance(value, Tensor)]
    return bool(tensors) and not any(isinstance(tensor, FakeTensor) for tensor in tensors)


def _number(dtype: torch.dtype) -> float | int | bool:
    """What is read. A truncated normal is drawn again while any value is outside: none is."""
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


@cache
def _written_argument(func: Any) -> str | int | None:
    """Where an operator that only writes into one tensor and returns it (`add_`, `mm.out`) has that tensor."""
    schema = func._schema
    returned = [value.alias_info is not None and value.alias_info.is_write for value in schema.returns]
    if returned != [True] or torch.Tag.inplace_view in func.tags or func.overloadpacket.__name__ in _RESIZING:
        return None
    written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    if len(written) != 1:
        return None
    argument = schema.arguments[written[0]]
    return argument.name if argument.kwarg_only else written[0]
