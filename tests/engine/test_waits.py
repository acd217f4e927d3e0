"""What a step asks of the host: numbers that are read from the device and arrays that travel to it, counted.

Operators are counted on the CPU, where a wait costs nothing; `tolist`, `cpu`, `numpy` and `from_numpy` are where a GPU
would be waited for or written to from pageable memory. Captions of several ranks travel from host to host, so that
sharing them asks no device either.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config.phases import first_phase
from engine.config.read import Config, ParallelConfig, resolve
from engine.feed import Feed
from engine.parallel.device import prepare
from engine.parallel.launch import job
from engine.parallel.mesh import build_mesh
from engine.pipeline.clock import Phases
from engine.trainer import Trainer
from tests.data.shard_factory import make_shards
from tests.distributed import run_distributed, world
from tests.engine.test_layouts import random_pairs
from tests.golden import FOLDER, local_batch

_READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "unique"}
_ARRIVES = "lift_fresh"
"""What torch.tensor(number) and torch.from_numpy(array) are to an operator."""


class _Counting(TorchDispatchMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _READS:
            self.found["read"] += 1
        elif name == _ARRIVES:
            self.found["arrives"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Numbers that are read from the device meanwhile, and made on the host."""
    found: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        tolist = Tensor.tolist

        def read(tensor: Tensor) -> Any:
            found["read"] += 1
            return tolist(tensor)

        patch.setattr(Tensor, "tolist", read)
        with _Counting(found):
            yield found


_TEACHER = f"{{path: {FOLDER / 'tiny-18b' / 'weights.safetensors'}, model: tiny-18b, relational: 1}}"
_LOCKED = "[vision.embed.*,vision.blocks.0.*,text.token_embedding,*.attn.qkv.weight]"
CASES: dict[str, tuple[str, ...]] = {
    "adamw": ("optim.name=adamw",),
    "lamb": ("optim.name=lamb",),
    "no clip, averaged": ("optim.name=adamw", "optim.clip_grad_norm=0", "optim.ema_decay=0.9"),
    "clips, outputs": ("optim.name=adamw", "data.frames=2", "train.keep_outputs=all", "train.recompute=full"),
    "kept, learned scale": ("optim.name=lamb", "train.keep_activations=1", "train.logit_scale=null"),
    "frozen": ("optim.name=lamb", f"train.freeze={_LOCKED}", "train.recompute=full", "train.precision=bf16"),
    "taught": ("optim.name=adamw", f"train.distill=[{_TEACHER}]", "train.matryoshka=[8,32]"),
    "sigmoid": (
        "optim.name=lamb",
        "train.loss=sigmoid",
        "train.logit_scale=null",
        "train.matryoshka=[8,32]",
        "train.mask_false_negatives=captions",
    ),
    "fused": ("optim.name=adamw", "model.block_kernels=fused", "train.outputs_budget_gb=0.0001"),
}


def clips_or_pictures(config: Config, step: int) -> tuple[Tensor, Tensor]:
    """Pictures, or clips of pictures, and their captions."""
    images, ids = random_pairs(config, step)
    frames = config.data.frames
    return (images if frames == 1 else images.unsqueeze(1).repeat(1, frames, 1, 1, 1)), ids


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_twice_however_many_micro_batches(case: str) -> None:
    counts, options = [], CASES[case]
    for micro_batch in (4, 2):
        sizes = (f"train.micro_batch_size={micro_batch}", f"train.text_micro_batch_size={micro_batch}")
        base = ["model.preset=tiny-18b", "train.global_batch_size=8", "train.patch_dropout=0.5", "model.text.depth=1"]
        base.append("model.vision.depth=2")
        config = resolve({"data": {"shards": ["-"]}}, [*base, *options, *sizes])
        with job(ParallelConfig()) as (mesh, device), torch.compiler.set_stance("force_eager"):
            trainer = Trainer(first_phase(config), mesh, device)
            trainer.optimizer.rule.sums_on_a_cpu = False  # as on a GPU, which tells of the state with the norm
            for step in range(2):
                batch = local_batch(*clips_or_pictures(config, step), mesh)
                with counted() as found:
                    trainer.step(batch, Phases()).on_host()
        counts.append(found)
    assert counts[0] == counts[1], "grows with the micro-batches"
    # LAMB on a CPU asks for the ratios of both towers, which on a GPU stay there (tests/engine/test_lamb.py).
    assert counts[0]["read"] == 2 + 2 * ("optim.name=lamb" in options)
    assert counts[0]["arrives"] <= 2, "the step's kept patches, weights by which captions are compared"


LAYOUTS = {
    "stages": ("parallel.pipeline=2", "parallel.virtual=2", "train.mask_false_negatives=both"),
    "tensor ranks": ("parallel.tensor=2",),
}


def _waits_of_layouts(shards: list[str]) -> list[list[dict[str, int]]]:
    """Of each layout and number of micro-batches, what this rank's step asks and makes, and what its captions ask."""
    device, found = prepare(), []
    for options in LAYOUTS.values():
        of_layout = []
        for micro_batches in (2, 8):
            sizes = (f"train.micro_batch_size={16 // micro_batches}", f"train.text_micro_batch_size={micro_batches}")
            base = ["model.preset=tiny-18b", "train.global_batch_size=16", "train.patch_dropout=0.5", "data.workers=0"]
            base += ["model.vision.depth=4", "model.text.depth=1", "model.text.vocab_size=49408", "optim.name=adamw"]
            config = resolve({"data": {"shards": shards}}, [*base, *options, *sizes])
            mesh = build_mesh(config.parallel.tensor, config.parallel.pipeline, world())
            trainer = Trainer(first_phase(config), mesh, device)
            trainer.optimizer.rule.sums_on_a_cpu = False  # as on a GPU
            feed = Feed(config, mesh, device.torch_device, start_position=0, steps=2)
            for _ in range(2):
                assert feed.read() is None
                with _counted_copies() as copies:
                    batch = feed.share()
                with counted() as step:
                    trainer.step(batch, Phases()).on_host()
            of_layout.append({**step, "of captions": copies["read"]})
            feed.close()
        found.append(of_layout)
    return found


@contextmanager
def _counted_copies() -> Iterator[Counter[str]]:
    """`counted`, and tensors that are brought to the host."""
    with counted() as found, pytest.MonkeyPatch.context() as patch:
        cpu = Tensor.cpu

        def read(tensor: Tensor) -> Tensor:
            found["read"] += 1
            return cpu(tensor)

        patch.setattr(Tensor, "cpu", read)
        yield found


@pytest.mark.dist
def test_no_layout_waits_more_often(tmp_path: Path) -> None:
    for rank in run_distributed(_waits_of_layouts, 2, shards=make_shards(tmp_path, [40])):
        for few, many in rank:
            assert few == many, "grows with the micro-batches"
            assert few["read"] == 2 and few["of captions"] == 0 and few["arrives"] <= 2
