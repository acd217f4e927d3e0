"""Answers for what a dry run does not have: other ranks, and the values of tensors."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

_RESIZING = {"set_", "resize_", "resize_as_"}
DEVICE = torch.ops.prim.device.default
_READ = torch.ops.aten._local_scalar_dense.default
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types of arguments that say all by their value."""


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

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self._shapes = Shapes(fake)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch wraps the method below to keep its compiler out: none comes here."""
        return False

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
            return self._shapes(func, args, kwargs)
        except DataDependentOutputException:
            if func is not _READ:
                raise
            return _number(args[0].dtype)


@dataclass(frozen=True, slots=True)
class _Result:
    """A tensor among those that an operator returned."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    source: int | None
    """Which of the tensors that the operator took holds its elements; None: they are new."""


_Answer = tuple[type, list[_Result]]
"""Tensor, tuple or list, and what is in it."""


class Shapes:
    """What FakeTensorMode returned, by operator and arguments: asked again, it takes several times as long to say so.

    One memory for all dry runs of this process, as FakeTensorMode has one: the stages of a job do much the same.
    """

    _known: ClassVar[dict[tuple[Any, ...], _Answer | None]] = {}
    """None: it has to be asked each time."""

    def __init__(self, fake: FakeTensorMode):
        self._fake = fake

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operator."""
        key: list[Any] = [func, torch.get_default_dtype()]
        tensors: list[FakeTensor] = []
        if not _describe((*args, *kwargs.items()), key, tensors):
            return func(*args, **kwargs)
        asked = tuple(key)
        known = self._known.get(asked)
        if known is not None:
            kind, results = known
            made = [self._made(result, tensors) for result in results]
            return made[0] if kind is Tensor else kind(made)
        answer = func(*args, **kwargs)
        if asked not in self._known:
            self._known[asked] = _answer(answer, tensors)
        return answer

    def _made(self, result: _Result, tensors: list[FakeTensor]) -> FakeTensor:
        with in_kernel_invocation_manager(self._fake):
            made = torch.empty_strided(result.shape, result.stride, dtype=result.dtype, device="meta")
            if result.source is not None:
                storage = tensors[result.source].untyped_storage()
                made.set_(storage, result.offset, result.shape, result.stride)
        return FakeTensor(self._fake, made, result.device)


def _describe(values: Iterable[Any], key: list[Any], tensors: list[FakeTensor]) -> bool:
    """Add to `key` what an operator may know of its arguments, and to `tensors` those among them; False if some have
    values, or are of another kind.
    """
    for value in values:
        if isinstance(value, FakeTensor):
            if value.constant is not None:
                return False
            key += (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
            tensors.append(value)
        elif isinstance(value, _PLAIN):
            key += (type(value), value)  # 1, 1.0 and True are equal
        elif isinstance(value, list | tuple):
            key.append(len(value))
            if not _describe(value, key, tensors):
                return False
        else:
            return False
    return True


def _answer(answer: Any, tensors: list[FakeTensor]) -> _Answer | None:
    """What tells how to make the answer again; None if it is not made of new FakeTensors alone."""
    kind = type(answer) if isinstance(answer, tuple | list) else Tensor
    parts = [answer] if kind is Tensor else answer
    if not all(isinstance(part, FakeTensor) and part.constant is None and not part.requires_grad for part in parts):
        return None
    if any(part is tensor for part in parts for tensor in tensors):
        return None
    storages = _storages(tensors)
    sources = [storages.index(own) if own in storages else None for own in _storages(parts)]
    if len(set(_storages(parts))) < len(parts) and None in sources:
        return None
    return kind, [
        _Result(
            shape=part.shape,
            stride=part.stride(),
            offset=part.storage_offset(),
            dtype=part.dtype,
            device=part.fake_device,
            source=source,
        )
        for part, source in zip(parts, sources, strict=True)
    ]


def _storages(tensors: list[FakeTensor]) -> list[int]:
    return [tensor.untyped_storage()._cdata for tensor in tensors]


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
