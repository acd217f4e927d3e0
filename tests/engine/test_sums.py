"""A step adds gradients of weights and tokens to their sums where they are computed: no pass over a weight, none over
the table of tokens.

Autograd adds what is a sum over samples: tables of positions and registers, and what has one dimension.
"""

from typing import Any

import pytest
import torch

from engine.config.phases import first_phase
from engine.config.read import ParallelConfig, resolve
from engine.parallel.launch import job
from engine.pipeline.clock import Phases
from engine.trainer import Trainer
from tests.engine.test_layouts import random_pairs
from tests.golden import local_batch
from tests.models.test_sums import Passes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_no_step_passes_over_gradients_of_weights_and_tokens(
    kernels: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.tensors.products.multiplies_bf16", lambda: False)
    options = (
        "model.preset=tiny-18b",
        f"model.block_kernels={kernels}",
        f"train.precision={precision}",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "model.text.vocab_size=997",
        "model.embed_dim=48",
    )
    config = resolve({"data": {"shards": ["-"]}}, list(options))
    with job(ParallelConfig()) as (mesh, device), torch.compiler.set_stance("force_eager"):
        trainer = Trainer(first_phase(config), mesh, device)
        towers = trainer.towers
        weights = {
            tuple(parameter.shape)
            for tower in (*towers.vision, towers.text_side.tower)
            for name, parameter in tower.named_parameters()
            if parameter.dim() > 1 and "pos_embed" not in name
        }
        assert (997, config.model.text.width) in weights and len(weights) > 7
        batch = local_batch(*random_pairs(config, 0), mesh)
        step: Any = trainer.training_step
        with Passes(weights) as seen:
            step.gradients(batch, Phases())
    wide = {"_to_copy"} if precision == "bf16" else set()  # factors of products
    assert set(seen.writes) == {"addmm_", "index_add_"} | wide, seen.writes
    assert seen.writes["index_add_"] == 1, "captions are one part"


SMALL = (
    "model.embed_dim=32",
    *(f"model.text.{what}" for what in ("width=32", "depth=1", "heads=2", "vocab_size=512", "context_length=8")),
    *(f"model.vision.{what}" for what in ("width=32", "depth=1", "head_width=16", "mlp_hidden=64", "image_size=28")),
    "model.vision.patch_size=14",
)
TABLES = {"embed.pos_embed", "embed.registers", "pos_embed"}
"""What autograd may add, image tower's and captions'."""
POOL = ("model=pe-core-l14", "model.vision.rope_grid=2", "model.vision.pool_heads=2")


@pytest.mark.parametrize("options", [("model=tiny-b16",), (*POOL, *SMALL), ("model=dinov3-7b", *SMALL)], ids=str)
def test_what_autograd_adds_is_no_product(options: tuple[str, ...]) -> None:
    config = resolve({"data": {"shards": ["-"]}}, [*options, "train.global_batch_size=2", "train.micro_batch_size=2"])
    with job(ParallelConfig()) as (mesh, device):
        trainer = Trainer(first_phase(config), mesh, device)
        towers = (*trainer.towers.vision, trainer.towers.text_side.tower)
        wide = {
            parameter: name
            for tower in towers
            for name, parameter in tower.named_parameters()
            if parameter.dim() > 1 and parameter.requires_grad
        }
        by_autograd, by_product = set[str](), set[str]()

        def note(parameter: Any) -> None:
            (by_product if parameter.grad_added_to_main_grad else by_autograd).add(wide[parameter])

        for parameter in wide:
            parameter.register_post_accumulate_grad_hook(note)
        step: Any = trainer.training_step
        step.gradients(local_batch(*random_pairs(config, 0), mesh), Phases())
        assert all(parameter.main_grad.any() for parameter in wide)  # type: ignore[attr-defined]
    assert by_autograd <= TABLES and not by_autograd & by_product
    assert by_autograd | by_product == set(wide.values())
