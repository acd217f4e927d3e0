"""Steps in bf16 on a CPU that cannot multiply it: every product in fp32, forward, replayed and backward."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.phases import first_phase
from engine.config.read import Config, ParallelConfig
from engine.parallel.launch import job
from engine.pipeline.clock import Phases
from engine.trainer import Trainer
from models.tensors import products
from tests.engine.mim_jobs import Layout, mim_config, pictures_of_step
from tests.engine.test_distill import FILE
from tests.engine.test_kept_outputs import contrastive
from tests.engine.test_layouts import random_pairs
from tests.gather import whole_gradients
from tests.golden import local_batch
from tests.models.test_products import Operators

PICTURES = Layout(micro_batch=4, batch=8)
TAUGHT = f"train.distill=[{{path: {FILE}, model: tiny-18b, precision: bf16}}]"
CASES: dict[str, Callable[[], Config]] = {
    "outputs kept, recomputed, sdpa": lambda: contrastive(
        "b16-bf16", "train.keep_outputs=fc2", "train.recompute=full", "model.attention=sdpa"
    ),
    "fused, a budget": lambda: contrastive("18b-bf16", "model.block_kernels=fused", "train.activation_budget_gb=0.001"),
    "masked features of a bf16 teacher": lambda: mim_config(PICTURES, "mim.teacher_precision=bf16"),
}
SLOW: dict[str, Callable[[], Config]] = {
    "replayed": lambda: contrastive("18b-bf16"),
    "a bf16 teacher of an fp32 student": lambda: contrastive("18b-fp32", TAUGHT),
    "masked features": lambda: mim_config(PICTURES, "train.precision=bf16"),
}
ALL = CASES | SLOW
NATIVE = 3e-2
"""Norm-wise, all gradients of a step against those of bf16 products; two orders of bf16's sums are as far apart."""


@pytest.fixture(autouse=True)
def _as_written() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def gradients(config: Config, seen: AbstractContextManager[Any]) -> Tensor:
    """Every gradient of a step that is built and run in the block."""
    with job(ParallelConfig()) as (mesh, device), seen:
        trainer = Trainer(first_phase(config), mesh, device)
        step: Any = trainer.training_step
        if config.objective == "mim":
            batch = pictures_of_step(config, mesh, 0)
        else:
            batch = local_batch(*random_pairs(config, 0), mesh)
        step.gradients(batch, Phases())
        step.update.reduce()
        return torch.cat([gradient.flatten() for _, gradient in sorted(whole_gradients(trainer).items())])


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_no_product_of_a_step_is_left_in_bf16(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies_bf16", lambda: False)
    seen = Operators()
    gradients(ALL[case](), seen)
    assert seen.of_bf16 and not seen.products, seen.products


@pytest.mark.parametrize(
    "case", ["fused, a budget", *(pytest.param(case, marks=pytest.mark.slow) for case in ALL if "fused" not in case)]
)
def test_gradients_are_those_of_bf16_products(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for multiplies in (True, False):
        monkeypatch.setattr(products, "multiplies_bf16", lambda multiplies=multiplies: multiplies)
        found.append(gradients(ALL[case](), nullcontext()))
    native, wide = found
    assert 0 < float((wide - native).norm() / native.norm()) < NATIVE
