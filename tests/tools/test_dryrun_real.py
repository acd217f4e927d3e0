"""The dry run against real steps on gloo: the same transfers byte for byte, the same memory.

A real step is seen by the same recorder, on real tensors. Two things are gloo's and not the step's, and left out of the
comparison of memory: its copy of the gradients in the reduction (phase "reduce"), and messages of a pipeline that wait
for a slow neighbour.
"""

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.phases import first_phase
from engine.config.read import Config
from engine.feed import LocalBatch
from engine.objectives.contrastive.step import ContrastiveStep
from engine.objectives.mim.step import MimStep
from engine.parallel.device import prepare
from engine.parallel.mesh import Mesh, build_mesh
from engine.parallel.rows import own_rows
from engine.trainer import Trainer
from tests.distributed import run_distributed, world
from tests.engine.mim_jobs import Layout, mim_config, pictures_of_step
from tests.tools.test_dryrun import DEEP, small
from tools.dryrun.memory import Usage
from tools.dryrun.rank import RankReport, dry_run
from tools.dryrun.record import record_step
from tools.dryrun.report import transfers_of

pytestmark = pytest.mark.dist

RANKS = 4
CASES = {
    "tp2-dp2": ("parallel.tensor=2",),
    "tp4-nosp-bf16": ("parallel.tensor=4", "parallel.sequence=false", "train.precision=bf16", "model.attention=sdpa"),
    "pp2-tp2": ("parallel.pipeline=2", "parallel.tensor=2"),
    "pp4-sigmoid-ring": ("parallel.pipeline=4", "train.loss=sigmoid", "train.loss_variant=ring"),
    "pp2-virtual-keep": ("parallel.pipeline=2", "parallel.virtual=2", "train.keep_activations=2"),
    "dp4-learned-text": ("train.logit_scale=null", "train.text_micro_batch_size=3", "train.patch_dropout=0"),
    "tp2-recompute": ("parallel.tensor=2", "train.recompute=full"),
    "pp2-clips": ("parallel.pipeline=2", "data.frames=2"),
}
MIM_CASES = {
    "mim-pp2-tp2": Layout(2, 2, 1, 2),
    "mim-tp2-dp2-nosp": Layout(2, 1, 2, 2, options=("parallel.sequence=false",)),
    "mim-pp4-uneven-rows": Layout(1, 4, 1, 3, batch=18),
    "mim-pp2-virtual-bf16": Layout(
        2, 2, 1, 4, options=("parallel.virtual=2", "train.precision=bf16", "train.recompute=full")
    ),
}
FAST = ("pp2-tp2", "mim-pp2-tp2")
SLOW = tuple(name for name in (*CASES, *MIM_CASES) if name not in FAST)
LOOKED_AT = {FAST: (0, RANKS - 1), SLOW: tuple(range(RANKS))}
"""Ranks that are run dry: of the fast cases one of each stage, at the two places of the tensor axis."""


def config_of(name: str) -> Config:
    """The job of a case."""
    return mim_config(MIM_CASES[name], "model.attention=sdpa") if name in MIM_CASES else small(DEEP, *CASES[name])


def real_batch(config: Config, mesh: Mesh) -> LocalBatch:
    """Random pixels and, where there are any, captions that fill the context, as the dry run takes them."""
    if config.objective == "mim":
        return pictures_of_step(config, mesh, 0)
    rows, first = config.train.global_batch_size // mesh.data.size, mesh.data.rank
    text, side = config.model.text, config.model.vision.image_size
    own = own_rows(rows, mesh)
    tokens = torch.randint(1, text.vocab_size - 1, (own.stop - own.start, text.context_length))
    tokens[:, -1] = text.vocab_size - 1
    clip = (config.data.frames,) if config.data.frames > 1 else ()
    shape = (rows, *clip, 3, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8) if mesh.is_first_stage else None
    return LocalBatch(positions=np.arange(first * rows, (first + 1) * rows), images=images, tokens=tokens)


def real_steps(names: list[str]) -> list[dict[str, Any]]:
    """The second step of the cases on this rank: (axis, kind, bytes, puts in, count), and peak bytes of its phases."""
    mesh = cache(lambda tensor, pipeline: build_mesh(tensor, pipeline, world()))
    seen = []
    for name in names:
        config = config_of(name)
        trainer = Trainer(first_phase(config), mesh(config.parallel.tensor, config.parallel.pipeline), prepare())
        trainer.optimizer.rule.sums_on_a_cpu = False  # as on a GPU
        step, batch = trainer.training_step, real_batch(config, trainer.mesh)
        assert isinstance(step, ContrastiveStep | MimStep)
        trainer.step(batch)
        recorder = record_step(step, batch, every=True)
        transfers = sum((tally.transfers for tally in recorder.phases.values()), Counter())
        seen.append({"transfers": _rows(transfers), "peaks": _peaks(recorder.memory.peaks)})
        trainer.towers.wait_for_weights()
    return seen


@cache
def dry(name: str, rank: int) -> RankReport:
    """The dry run of a case."""
    return dry_run(config_of(name), RANKS, rank)


def _rows(transfers: Counter) -> list[tuple[Any, ...]]:
    return sorted((t.axis, t.kind, t.tensor_bytes, t.puts_in, count) for t, count in transfers.items())


def _peaks(peaks: dict[str, Usage]) -> dict[str, int]:
    """Phase -> bytes at its peak without messages."""
    return {
        phase: usage.total - usage.parts["messages"]
        for phase, usage in peaks.items()
        if phase not in ("", "wait", "reduce")
    }


@cache
def real(names: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """Case -> what each rank did; one launch."""
    by_rank = run_distributed(real_steps, RANKS, names=list(names))
    return {name: [rank[i] for rank in by_rank] for i, name in enumerate(names)}


EVERY_CASE = [
    pytest.param(launch, name, id=name, marks=[] if launch is FAST else [pytest.mark.slow])
    for launch in (FAST, SLOW)
    for name in launch
]


@pytest.mark.parametrize(("launch", "name"), EVERY_CASE)
def test_the_transfers_of_a_real_step(launch: tuple[str, ...], name: str) -> None:
    for rank in LOOKED_AT[launch]:
        expected = real(launch)[name][rank]["transfers"]
        assert _rows(transfers_of(dry(name, rank))) == expected, f"rank {rank}"


@pytest.mark.parametrize(("launch", "name"), EVERY_CASE)
def test_the_memory_of_a_real_step(launch: tuple[str, ...], name: str) -> None:
    for rank in LOOKED_AT[launch]:
        found, dried = real(launch)[name][rank]["peaks"], _peaks(dry(name, rank).peaks)
        assert max(dried.values()) == pytest.approx(max(found.values()), rel=0.1), f"rank {rank}"
        assert dried == pytest.approx(found, rel=0.1), f"rank {rank}"
