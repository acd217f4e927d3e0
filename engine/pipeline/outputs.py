"""Kept outputs of products (models/blocks/outputs.py) over a step: pass by pass, on the device or in host memory.

Every pass without graph that is repeated with one leaves its outputs here: a micro-batch through a chunk from its
encode to its replay, a part of the captions likewise, and under full recomputation a forward until its backward.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from engine.config.read import Config, ConfigError
from engine.parallel.device import SideStream
from engine.parallel.mesh import Mesh
from models.blocks.outputs import Outputs, can_keep, keep_outputs
from models.tensors.kept import LEVELS, choose_levels, kept_elements
from models.towers.text import TextTower
from models.towers.vision import VisionTower


class KeptOutputs:
    """What the passes of one chunk, or of the caption tower, have left on the device."""

    def __init__(self, layers: nn.ModuleList, level: str):
        """layers: the blocks; level: train.keep_outputs. Raises ConfigError for linears that cannot answer with one."""
        if level != "none" and not can_keep(layers):
            raise ConfigError(
                "model.backend=auto has chosen Transformer Engine, whose linears quantise and multiply in one call and "
                "cannot answer with a kept output: set model.backend=local or train.keep_outputs=none"
            )
        self.level = level
        self.tape = keep_outputs(layers, level)
        self._passes: dict[int, Outputs] = {}

    @property
    def kept_bytes(self) -> int:
        """Bytes of all outputs that are here."""
        return sum(t.nbytes for outputs in self._passes.values() for t in outputs.values())

    @contextmanager
    def leaving(self, number: int) -> Iterator[None]:
        """Pass `number`, which may be repeated, runs in the block."""
        outputs: Outputs = {}
        with self.tape.open(outputs):
            yield
        if outputs:
            self._leave(number, outputs)

    @contextmanager
    def taking(self, number: int) -> Iterator[None]:
        """The pass that repeats number `number`, and its backward, run in the block."""
        with self.tape.open(self._take(number)):
            yield

    def _leave(self, number: int, outputs: Outputs) -> None:
        self._passes[number] = outputs

    def _take(self, number: int) -> Outputs:
        return self._passes.pop(number, {})


class HostOutputs(KeptOutputs):
    """The same in host memory: copied out as soon as a pass ends, and back while the pass before it is repeated.

    Passes are repeated in the reverse order, the last one first. Host buffers are used again in every step.
    """

    def __init__(self, layers: nn.ModuleList, level: str, device: torch.device):
        super().__init__(layers, level)
        self.side = SideStream(device)
        self._fetched: tuple[int, Outputs] | None = None
        self._free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}

    def _leave(self, number: int, outputs: Outputs) -> None:
        for linear, output in outputs.items():
            free = self._free.setdefault((output.shape, output.dtype), [])
            buffer = free.pop() if free else self.side.host_buffer(output)
            self.side.copy_out(output, buffer)
            outputs[linear] = buffer
        super()._leave(number, outputs)

    def _take(self, number: int) -> Outputs:
        if self._fetched is None or self._fetched[0] != number:
            if number not in self._passes:
                return {}  # kept its activations, and is not repeated
            self._fetch(number)
        assert self._fetched is not None
        outputs, self._fetched = self._fetched[1], None
        for output in outputs.values():
            self.side.join(output)  # before the next copies are queued, which it would otherwise wait for, too
        if self._passes:
            self._fetch(next(reversed(self._passes)))
        return outputs

    def _fetch(self, number: int) -> None:
        outputs = super()._take(number)
        for linear, buffer in outputs.items():
            outputs[linear] = self.side.copy_in(buffer)
            # Already free: the next copy into it is queued on the same stream behind this one.
            self._free[buffer.shape, buffer.dtype].append(buffer)
        self._fetched = number, outputs


def keep_of(layers: nn.ModuleList, level: str, config: Config, device: torch.device) -> KeptOutputs:
    """What keeps the outputs of these blocks where the config wants them."""
    return HostOutputs(layers, level, device) if config.train.offload_outputs else KeptOutputs(layers, level)


# --- a budget ---------------------------------------------------------------------------------------------------------


def output_levels(
    config: Config, mesh: Mesh, device: torch.device, vision: Sequence[VisionTower], text: TextTower, passes: "Passes"
) -> list[str]:
    """Level of each chunk and of the captions: train.keep_outputs, or what fits the budget. Collective over TP."""
    budget_gb = config.train.outputs_budget_gb
    if budget_gb is None:
        return [config.train.keep_outputs] * (len(vision) + 1)
    sizes = [{level: passes.vision_bytes(i, tower, level) for level in LEVELS} for i, tower in enumerate(vision)]
    sizes.append({level: passes.text_bytes(text, level) for level in LEVELS})
    chosen = choose_levels(budget_gb * 1e9, sizes)
    # A product that is repeated runs its collectives again, so the ranks of a tensor group have to agree.
    order = list(LEVELS)
    agreed = torch.tensor([order.index(level) for level in chosen[:-1]], device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=mesh.tensor.group)
    return [*(order[i] for i in agreed.tolist()), chosen[-1]]


class Passes:
    """How many passes of which size are kept at once on this rank, for the bytes of a level."""

    def __init__(self, config: Config, tensor: int, *, vision_passes: Sequence[int], captions: int):
        """tensor: ranks of the tensor axis; vision_passes: of each chunk; captions: of this rank, 0 if kept whole."""
        self.config, self.tensor = config, tensor
        self.vision_passes, self.captions = vision_passes, captions

    def vision_bytes(self, chunk: int, tower: VisionTower, level: str) -> int:
        """Bytes of one chunk at `level`."""
        train = self.config.train
        samples, blocks = train.micro_batch_size, len(tower.blocks_above)
        pools = tower.is_last and blocks > 0 and tower.vision.reads_one_token
        pooled = -(-samples // tower.pooled_multiple) * tower.pooled_multiple if pools else None
        elements = kept_elements(
            tower.vision,
            level,
            blocks=blocks,
            tokens=samples * tower.vision.kept_tokens(train.patch_dropout),
            pooled=pooled,
            tensor=self.tensor,
            sequence=tower.config.sequence_parallel,
        )
        return self.vision_passes[chunk] * elements * tower.config.params_dtype.itemsize

    def text_bytes(self, tower: TextTower, level: str) -> int:
        """Bytes of all captions at full context; shorter ones keep less."""
        text = self.config.model.text
        rows = self.captions
        pooled = None if text.pool == "mean" else rows
        blocks = len(tower.blocks_above)
        pooled = pooled if blocks else None
        elements = kept_elements(text, level, blocks=blocks, tokens=rows * text.context_length, pooled=pooled)
        return elements * tower.config.params_dtype.itemsize
