"""This rank's part of each global batch, from the global order of samples.

Position p of the run's sample order belongs to row p mod B of its step; replica d owns rows [d b, (d + 1) b). The first
stage's tensor ranks split the reading and decoding, then share pixels among themselves and captions with all ranks of
the replica: each sample is read once per replica, and a bad sample is replaced once, for all who need it.

Readers work in units of at most a micro-batch of rows, so that all of them work on the same step and the pixels in
flight are `data.prefetch_batches` local batches whatever the number of readers. A thread puts the next step's units
together while the step before runs, one local batch more, so that the loop finds it ready, pinned for a GPU. A step
starts when its last unit is there: the text tower, which encodes first, needs every caption, so captions are shared
before pixels.

The whole local batch stays as uint8 (at the paper's batch 7,200 x 150 kB = 1.1 GB on a first-stage rank), since the
replay needs every image a second time: pinned on the host, from where each pass copies its micro-batch (4.5 MB of 30
images, behind the kernels that are queued: nothing waits for it), or, where tensor ranks share pixels through the
device, there. Captions stay on the host, and travel from host to host: what they are cut to is a shape, and asking a
device for it would be a wait.
"""

import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import BadSample, EncodedBatch, SampleBatch, join
from data.config import DataConfig
from data.errors import DataError
from data.fingerprint import fingerprint
from data.loader import PrefetchLoader
from data.reader import SampleReader
from data.sources import Listing, SourceSize, owners, shard_lists, tally_kept, tally_shards
from engine.config.read import Config
from engine.objectives.registry import objective_of
from engine.parallel.agree import everyone, together
from engine.parallel.mesh import Mesh
from engine.parallel.rows import gather_rows, own_rows, split_rows

T = TypeVar("T")
_SHARED_MEMORY = "/dev/shm"  # where reader processes leave pixels for the training process

_log = logging.getLogger("data.feed")


@dataclass(frozen=True)
class LocalBatch:
    """One step's data on this rank."""

    positions: np.ndarray
    """int64 [b]: global positions of the replica's samples."""
    images: Tensor | None
    """uint8 [b, 3, h, w] on the first stage ([b, frames, 3, h, w] for clips), on the host or the device; None
    elsewhere. With data.features float32 [b, D], the embeddings."""
    tokens: Tensor
    """int64 [own rows, context] on the host: this rank's captions; none of them with objective=mim."""
    bad: Sequence[BadSample] = ()
    """Samples that this rank read and replaced."""
    picture_ids: Tensor | None = None
    """int64 [own rows] on the host: hashes of the pictures of this rank's captions, for train.mask_false_negatives."""
    source_counts: Mapping[str, int] = field(default_factory=dict)
    """Samples of each named source in the run up to this step's end, on the first stage."""


def list_together(config: DataConfig, mesh: Mesh) -> Listing:
    """The shards of the config, listed by one rank and asked for their samples by the reading ranks in turn: each shard
    is touched once a job, not once a rank. Collective; raises on every rank.
    """
    axis = mesh.control
    asked = [(owner.shards, owner.subset, owner.subset_weights) for owner in owners(config)]
    told = everyone((mesh.is_first_stage, asked), axis)
    readers = [rank for rank, (reads, _) in enumerate(told) if reads]
    for rank, (_, others) in enumerate(told):
        if others != told[0][1]:
            raise DataError(
                f"rank {rank} was given the shards {others}, rank 0 {told[0][1]}: start all with one config"
            )
    found: list[Any] = [None]
    with together(axis):
        if axis.rank == 0:
            found = [shard_lists(config)]
    dist.broadcast_object_list(found, src=dist.get_global_rank(axis.group, 0), group=axis.group)
    shards = [shard for shards in found[0] for shard in shards]
    tallies = _in_turns(mesh, readers, len(shards), lambda turn: tally_shards(config, shards[turn]))
    listing = Listing(lists=found[0], tallies=tallies)
    if not any(owner.subset for owner in owners(config)):
        return listing
    with together(axis):  # a table that has to be sorted is sorted once where all see one disk
        if axis.rank == readers[0]:
            tally_kept(config, listing, [0])
    kept = _in_turns(mesh, readers, len(shards), lambda turn: tally_kept(config, listing, range(len(shards))[turn]))
    return replace(listing, kept=kept)


def _in_turns(mesh: Mesh, readers: Sequence[int], count: int, ask: Callable[[slice], list[T]]) -> list[T]:
    """What `ask` says of `count` things, each asked for by one of the reading ranks. Collective; raises on every rank.

    ask: of the things of one rank, a slice with a step.
    """
    axis, own = mesh.control, list[T]()
    with together(axis):
        if mesh.is_first_stage:
            own = ask(slice(readers.index(axis.rank), count, len(readers)))
    of_ranks = everyone(own, axis)
    return [of_ranks[readers[place % len(readers)]][place // len(readers)] for place in range(count)]


class Feed:
    """Iterates over LocalBatch from `start_position` for `steps` steps. Collective over the replica."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        device: torch.device,
        *,
        start_position: int,
        steps: int,
        first_position: int = 0,
        listing: Listing | None = None,
    ):
        """first_position: where in the run the order of samples begins (a phase has its own). listing: from
        `list_together`; without it this rank asks for every shard itself.
        """
        self.config, self.mesh, self.device, self.first_position = config, mesh, device, first_position
        self.global_batch = config.train.global_batch_size
        self.local_batch = self.global_batch // mesh.data.size
        self.captions = objective_of(config).reads_captions
        self.context = config.model.text.context_length
        self.next_position = start_position
        self._first_position = first_position
        self.loader: PrefetchLoader[list[SampleBatch] | list[EncodedBatch]] | None = None
        self._read: list[SampleBatch] = []
        self._picture_ids = config.train.mask_false_negatives in ("images", "both")
        self.units = self._units(config.micro_batch_samples)
        if mesh.is_first_stage:
            self.reader = SampleReader(
                config.data,
                image_size=config.model.vision.image_size,
                context_length=self.context,
                seed=config.train.seed,
                train=True,
                captions=self.captions,
                picture_ids=self._picture_ids,
                global_batch_size=self.global_batch,
                first_position=first_position,
                device=device,
                listing=listing,
            )
            self._check_width(config)
            if self.captions and mesh.world.rank == 0:
                for line in self.reader.sources.subsets():
                    _log.info("%s", line)
                for line in self.reader.sources.copies_within(self.global_batch):
                    _log.warning("%s", line)
            self.loader = PrefetchLoader(
                self.reader.fetch if self.reader.decodes_on_gpu else self.reader.read,
                _positions_of_units(self._positions(start_position), self.units, self.global_batch, steps),
                workers=config.data.workers,
                prefetch=self._units_ahead(config),
                stall_timeout_s=config.data.stall_timeout_s,
                take=partial(_units_of_a_step, count=len(self.units), device=device),
            )

    def _check_width(self, config: Config) -> None:
        width = self.reader.feature_width
        if width not in (None, config.model.embed_dim):
            raise DataError(
                f"data.features {config.data.features} have {width} numbers, model.embed_dim is "
                f"{config.model.embed_dim}: embed the shards with this model"
            )

    def __iter__(self) -> Iterator[LocalBatch]:
        return self

    def __next__(self) -> LocalBatch:
        error = self.read()
        if error is not None:
            raise error
        return self.share()

    def read(self) -> Exception | None:
        """This rank's units of the next step; returns what went wrong. Local: all ranks can then fail together."""
        self._read = []
        try:
            if self.loader is not None:
                self._log_epochs()
                self._read = [self._decoded(unit) for unit in next(self.loader)]
                self._check()
        except Exception as error:  # whatever it is, the other ranks must hear of it
            return error
        return None

    def _check(self) -> None:
        """Raise DataError if memory has forgotten a bit of what was read, or which samples are this step's."""
        for unit in self._read:
            unit.check()
        wanted = self._positions(self.next_position)[slice(self.units[0].start, self.units[-1].stop)]
        found = [unit.positions for unit in self._read if unit.positions is not None]
        if found and not np.array_equal(np.concatenate(found), wanted):
            raise DataError(
                f"rank {self.mesh.world.rank} on {socket.gethostname()} wanted samples {_span(wanted)} for this step "
                f"and was given {_span(np.concatenate(found))}: its memory may be bad, take the host out of the job "
                "and resume"
            )

    def is_elsewhere(self, samples_seen: int) -> Exception | None:
        """What is wrong if the run has seen another number of samples than this rank has given. Local."""
        if self.next_position == samples_seen:
            return None
        return DataError(
            f"rank {self.mesh.world.rank} on {socket.gethostname()} has seen {samples_seen} samples and given "
            f"{self.next_position}: its memory may be bad, take the host out of the job and resume"
        )

    @property
    def bad(self) -> list[BadSample]:
        """Samples of the units that `read` has read and replaced."""
        return [sample for unit in self._read for sample in unit.bad]

    @property
    def caption_fallbacks(self) -> int:
        """Samples of those units whose chosen text could not be used."""
        return sum(unit.caption_fallbacks for unit in self._read)

    def share(self) -> LocalBatch:
        """The step's batch from what the ranks have read. Collective over the replica."""
        positions = self._positions(self.next_position)
        tokens, picture_ids = self._own_captions([self._columns(unit) for unit in self._read])
        images = self._pixels([unit.images for unit in self._read]) if self.loader is not None else None
        self.next_position += self.global_batch
        bad, self._read = self.bad, []
        return LocalBatch(positions, images, tokens, bad, picture_ids, self._source_counts())

    def _columns(self, unit: SampleBatch) -> Tensor:
        """int32 [n, context], with two further columns for the hash of each picture where it is asked for."""
        if unit.picture_ids is None:
            return unit.tokens.int()
        return torch.cat([unit.tokens.int(), unit.picture_ids.view(torch.int32).view(-1, 2)], dim=1)

    def _own_captions(self, read: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """int64 [own rows, context] and [own rows] from what the first stage has read; none without captions.
        Collective.
        """
        if not self.captions:
            return torch.empty(0, self.context, dtype=torch.int64), None
        own = self._shared_captions(read)[own_rows(self.local_batch, self.mesh)]
        pictures = own[:, self.context :].contiguous().view(torch.int64)[:, 0] if self._picture_ids else None
        return own[:, : self.context].long(), pictures

    def _shared_captions(self, read: list[Tensor]) -> Tensor:
        """int32 [b, columns]: each tensor rank of the first stage gives what it has read to all ranks of the replica,
        over the hosts: no device is waited for.
        """
        hosts = self.mesh.hosts
        if hosts.size == 1:
            return torch.cat(read)
        columns = self.context + 2 * self._picture_ids
        shared = torch.empty(self.local_batch, columns, dtype=torch.int32)
        shares = split_rows(self.local_batch, self.mesh.tensor.size)
        if read:
            torch.cat(read, out=shared[shares[self.mesh.tensor.rank]])
        works = [
            dist.broadcast(shared[share], group_src=reader, group=hosts.group, async_op=True)
            for reader, share in enumerate(shares)  # the first ranks of a replica are the first stage's
            if share.stop > share.start
        ]
        for work in works:
            assert work is not None, "this rank is of the replica"
            work.wait()
        return shared

    def _pixels(self, parts: list[Tensor]) -> Tensor:
        """uint8 [b, …] of the local batch. Collective over the tensor axis."""
        if self.mesh.tensor.size > 1 or any(part.is_cuda for part in parts):
            return self._gather(parts)
        (whole,) = parts
        return whole

    def fingerprint(self) -> dict[str, Any]:
        """What the order of samples depends on; empty on ranks that read nothing."""
        if self.loader is None:
            return {}
        return fingerprint(
            self.config.data,
            self.reader.sources,
            seed=self.config.train.seed,
            global_batch_size=self.global_batch,
            first_position=self.first_position,
        )

    def close(self) -> None:
        """End the reader processes."""
        if self.loader is not None:
            self.loader.close()

    def sources(self, first_step: int, last_step: int) -> list[SourceSize]:
        """Say what there is of each source, and its epochs in these steps of the phase, on the first stage."""
        if self.loader is None:
            return []
        last = self._first_position + (last_step - first_step) * self.global_batch
        return self.reader.sources.sizes(self._first_position, last)

    def _source_counts(self) -> dict[str, int]:
        return self.reader.sources.counts(self.next_position) if self.loader is not None else {}

    def _decoded(self, unit: SampleBatch | EncodedBatch) -> SampleBatch:
        return self.reader.decode(unit) if isinstance(unit, EncodedBatch) else unit

    def _gather(self, parts: list[Tensor]) -> Tensor:
        """The parts of this rank's share -> the rows of the whole local batch, on the device."""
        share = torch.cat([part.to(self.device, non_blocking=True) for part in parts])
        return gather_rows(share, self.local_batch, self.mesh.tensor)

    def _positions(self, step_position: int) -> np.ndarray:
        first = step_position + self.mesh.data.rank * self.local_batch
        return np.arange(first, first + self.local_batch, dtype=np.int64)

    def _units(self, size: int) -> list[slice]:
        """Rows of the local batch that this rank reads, in units (one empty unit where it reads none)."""
        share = split_rows(self.local_batch, self.mesh.tensor.size)[self.mesh.tensor.rank]
        starts = range(share.start, max(share.stop, share.start + 1), size)
        return [slice(start, min(start + size, share.stop)) for start in starts]

    def _units_ahead(self, config: Config) -> int:
        """Units that each reader prepares ahead. Raises DataError if their pixels do not fit in shared memory."""
        data, side = config.data, config.model.vision.image_size
        if data.workers == 0:
            return 1
        each = math.ceil(data.prefetch_batches * len(self.units) / data.workers)
        rows = max(unit.stop - unit.start for unit in self.units)
        of_row = 4 * config.model.embed_dim if data.features else data.frames * 3 * side * side
        needed = each * data.workers * rows * of_row
        shared = os.statvfs(_SHARED_MEMORY)
        free = shared.f_bavail * shared.f_frsize
        _log.info(
            "readers hold at most %.3f GB of pixels: %d x %d units of %d rows", needed / 1e9, data.workers, each, rows
        )
        if needed > free:
            raise DataError(
                f"data.prefetch_batches={data.prefetch_batches} lets {data.workers} readers hold {needed / 1e9:.2f} GB "
                f"of pixels, but {_SHARED_MEMORY} has {free / 1e9:.2f} GB free: lower data.prefetch_batches or "
                "train.micro_batch_size, or enlarge it (docker run --shm-size)"
            )
        return each

    def _log_epochs(self) -> None:
        if self.mesh.world.rank == 0:
            first = self.next_position
            for line in self.reader.sources.epochs_begun(first, first + self.global_batch):
                _log.warning("%s", line)


def _span(positions: np.ndarray) -> str:
    return f"{positions[0]} to {positions[-1]}" if len(positions) else "none"


def _positions_of_units(first: np.ndarray, units: Sequence[slice], stride: int, steps: int) -> Iterator[np.ndarray]:
    """int64 [rows of the unit] of every unit of every step. first: positions of the first step's local batch.

    stride: from a step to the next, the global batch. Knows no feed: a loader that its readers' positions kept alive
    would never end by itself.
    """
    for step in range(steps):
        for unit in units:
            yield first[unit] + step * stride


def _units_of_a_step(
    units: Iterator[SampleBatch | EncodedBatch], *, count: int, device: torch.device
) -> list[SampleBatch] | list[EncodedBatch]:
    """The next `count` units as one, out of the readers' memory, pinned for a GPU; as they are where it decodes."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread begins with the first GPU, and pinning would make a context there
    read = [next(units) for _ in range(count)]
    encoded = [unit for unit in read if isinstance(unit, EncodedBatch)]
    if encoded:
        return encoded
    return [join([unit for unit in read if isinstance(unit, SampleBatch)], pinned=device.type == "cuda")]
