"""Weights and gradients of a part of the model that are whole on a rank during the part's turn only.

A part is wrapped in megatron-core's DistributedDataParallel: flat buckets of weights and of fp32 gradients, cut into
one contiguous slice an owner. Sharded further (parallel.shard), the buckets' memory is given back between turns and
only the own slices stay: weights are gathered for a turn and dropped behind it, gradients begin at zero with the
backward's turn and are reduce-scattered behind it. Slices, hooks and buckets are the same as without, so the optimizer,
checkpoints and averages see no difference, and neither does a loss, to the last bit. What is not trained comes and goes
with the weights, from buffers without gradients.

The memory is that of the buckets' storages, which keep their tensors: a parameter is a view of its storage at any time,
and what a graph has saved of a weight is there again when the backward's turn has gathered it.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.parallel.mesh import Axis, GatherAxes
from engine.parallel.replicas import Buckets, FrozenBuffer, start_gather


class Store:
    """Memory of a flat tensor that comes and goes while its views stay."""

    def __init__(self, flat: Tensor):
        self.flat = flat
        self._bytes = flat.untyped_storage().nbytes()
        self.observer: Callable[[Tensor], None] | None = None
        """Told of every change (the dry run's memory)."""

    def take(self) -> None:
        """Have memory, whose values are not defined."""
        self._resize(self._bytes)

    def drop(self) -> None:
        """Give it back."""
        self._resize(0)

    def _resize(self, size: int) -> None:
        if self.flat.untyped_storage().nbytes() != size:
            self.flat.untyped_storage().resize_(size)
            if self.observer is not None:
                self.observer(self.flat)


class ShardedPart:
    """One part: its own slices, and the whole of it on demand. Every method but `reset` is collective over the owners.

    Gathers of weights use groups of their own, so that one may be under way while gradients are reduced.
    """

    def __init__(
        self,
        ddp: Buckets,
        owners: Axis,
        axes: GatherAxes | None,
        resident: Sequence[nn.Parameter] = (),
        frozen: Sequence[FrozenBuffer] = (),
    ):
        """axes: ranks that gather the weights; None: weights stay whole, gradients alone are sharded.

        resident: a few small parameters that are read and learn between turns, too. The weights must have their values.
        frozen: buffers of what is not trained; residents have their own.
        """
        self.ddp, self.owners, self.axes = ddp, owners, axes
        self.buckets = [bucket for buffer in ddp.buffers for bucket in buffer.buckets]
        self._held = [*self.buckets, *frozen]
        weights = [own_slice(bucket.param_data, owners) for bucket in self._held]
        self.weights = weights if axes is None else [own.clone() for own in weights]
        """Own slice of every bucket, of what is trained and then of what is not."""
        self.gradients = [torch.zeros_like(own_slice(bucket.grad_data, owners)) for bucket in self.buckets]
        """The same of the gradients, complete after `finish`."""
        # In bf16 the learned scalars, which are fp32, have a buffer of their own, and it stays.
        self._staying = [buffer for buffer in ddp.buffers if set(buffer.params) <= set(resident)]
        coming = [buffer for buffer in ddp.buffers if buffer not in self._staying]
        self._resident = [
            _Resident(parameter, with_value=axes is not None)
            for parameter in resident
            if any(parameter in buffer.param_index_map for buffer in coming)
        ]
        leaving = [*coming, *(buffer for buffer in frozen if not set(buffer.params_list) <= set(resident))]
        self.weight_stores = [] if axes is None else [Store(buffer.param_data) for buffer in leaving]
        self.gradient_stores = [Store(buffer.grad_data) for buffer in coming]
        self._outer: list[Tensor] = []
        """Slices of the ranks that have this rank's place in other groups of gathering ranks, where there are any."""
        self._gathering: list[tuple[list[dist.Work], Tensor | None]] | None = None
        self.is_whole = axes is None
        """Whether every weight can be read."""
        self._is_reducing = False
        for store in (*self.weight_stores, *self.gradient_stores):
            store.drop()
        self.publish()
        self.publish_frozen()

    def own_weights(self, bucket) -> Tensor:
        """Own slice of a bucket's weights."""
        return self.weights[self._held.index(bucket)]

    def own_gradients(self, bucket) -> Tensor:
        """The same of its gradients."""
        return self.gradients[self.buckets.index(bucket)]

    def kept_weights(self) -> list[Tensor]:
        """What of the weights is here between turns, where they are sharded."""
        return [*self.weights, *self._outer, *(resident.parameter.data for resident in self._resident)]

    @property
    def copies(self) -> list[Tensor]:
        """Slices that neighbours gather from this rank, beside its own: all ranks of the outer axis have the same."""
        return self._outer

    # --- weights -------------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Let what is kept of others' slices follow, after the own ones of what is trained have changed."""
        self._publish(slice(len(self.buckets)))

    def publish_frozen(self) -> None:
        """The same of what is not trained, after it was loaded."""
        self._publish(slice(len(self.buckets), None))

    def _publish(self, which: slice) -> None:
        if self.axes is None or self.axes.outer is None:
            return
        if not self._outer:
            self._outer = [own.new_empty(self.axes.outer.size * own.numel()) for own in self.weights]
        for outer, own in zip(self._outer[which], self.weights[which], strict=True):
            for work in start_gather(outer, own, self.axes.outer.group):
                work.wait()

    def gather(self) -> None:
        """Start to bring the weights here; nothing where they are or are on their way."""
        if self.axes is None or self.is_whole or self._gathering is not None:
            return
        for store in self.weight_stores:
            store.take()
        self._gathering = []
        for i, bucket in enumerate(self._held):
            whole, part, loose = bucket.param_data, self.weights[i], None
            if self.axes.outer is not None:
                part, loose = self._outer[i], torch.empty_like(whole)
            target = whole if loose is None else loose
            self._gathering.append((start_gather(target, part, self.axes.inner.group), loose))

    def wait(self) -> None:
        """Have the weights here."""
        self.gather()
        for bucket, (works, loose) in zip(self._held, self._gathering or (), strict=False):
            for work in works:
                work.wait()
            if loose is not None:
                self._in_order(loose, bucket.param_data)
        if self._gathering is not None:
            self._gathering, self.is_whole = None, True
            for parameter in self._resident:
                parameter.read()

    def _in_order(self, loose: Tensor, whole: Tensor) -> None:
        """[inner, outer, slice] as it was gathered -> [outer, inner, slice] as the owners lie."""
        assert self.axes is not None and self.axes.outer is not None
        inner, outer = self.axes.inner.size, self.axes.outer.size
        whole.view(outer, inner, -1).copy_(loose.view(inner, outer, -1).transpose(0, 1))

    def release(self) -> None:
        """Keep the own slices only."""
        if self.is_whole and self.axes is not None:
            for store in self.weight_stores:
                store.drop()
            self.is_whole = False

    # --- gradients -----------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the gradients of the last step."""
        for parameter in self.ddp.params_with_grad:
            parameter.grad_added_to_main_grad = False
        for group in self.ddp.bucket_groups:
            group.reset()
        for resident in self._resident:
            resident.gradient.zero_()
        for buffer in self._staying:
            buffer.grad_data.zero_()
        # Where the rest is frozen, the learned scalars alone are reduced: no turn opens the part's gradients.
        self._is_reducing = not self.gradient_stores

    def open_gradients(self) -> None:
        """Make room for the part's gradients, before its first backward of a step."""
        for store in self.gradient_stores:
            store.take()
            store.flat.zero_()
        for resident in self._resident:
            resident.add_up()
        self._is_reducing = True

    def finish(self) -> None:
        """Behind its last: the own slices are complete, and the memory of the others is free."""
        if not self._is_reducing:
            return
        self.ddp.finish_grad_sync()
        for own, bucket in zip(self.gradients, self.buckets, strict=True):
            own.copy_(own_slice(bucket.grad_data, self.owners))
        for store in self.gradient_stores:
            store.drop()
        self._is_reducing = False

    def partial_gradients(self) -> list[Tensor]:
        """Own parts of gradients that each tensor rank has of its own tokens only."""
        found = []
        for buffer in self.ddp.buffers:
            for parameter in buffer.params:
                if getattr(parameter, "sequence_parallel", False):
                    start, stop, number = buffer.param_index_map[parameter]
                    found.append(self._owned_part(buffer.buckets[number], start, stop))
        return [part for part in found if part.numel()]

    def _owned_part(self, bucket, start: int, stop: int) -> Tensor:
        own = self.own_gradients(bucket)
        first = bucket.offset + self.owners.rank * own.numel()
        return own[max(0, start - first) : max(0, stop - first)]


def own_slice(flat: Tensor, owners: Axis) -> Tensor:
    """The part of a bucket's weights or gradients that this rank owns: a view."""
    length = flat.numel() // owners.size
    return flat.view(-1)[owners.rank * length : (owners.rank + 1) * length]


class _Resident:
    """A parameter with memory of its own, whose value and gradient follow and join those of its bucket."""

    def __init__(self, parameter: nn.Parameter, *, with_value: bool):
        """with_value: False where the value stays in its bucket."""
        self._in_bucket = parameter.data
        self._sum = parameter.main_grad  # type: ignore[attr-defined]
        self.parameter = parameter
        self.gradient = torch.zeros_like(self._sum)
        if with_value:
            parameter.data = self._in_bucket.clone()
        parameter.main_grad = self.gradient  # type: ignore[attr-defined]

    def read(self) -> None:
        """Take the gathered value."""
        self.parameter.data.copy_(self._in_bucket)

    def add_up(self) -> None:
        """Give the gradient to the bucket, which is about to be reduced."""
        self._sum.add_(self.gradient)
