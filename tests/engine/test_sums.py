"""A step adds gradients of weights and tokens to their sums where they are computed: no pass over a weight, none over
the table of tokens.
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
        "model.embed_dim=48",  # no projection has a block's shape
    )
    config = resolve({"data": {"shards": ["-"]}}, list(options))
    with job(ParallelConfig()) as (mesh, device), torch.compiler.set_stance("force_eager"):
        trainer = Trainer(first_phase(config), mesh, device)
        towers = trainer.towers
        weights = {
            tuple(parameter.shape)
            for tower in (*towers.vision, towers.text_side.tower)
            for name, parameter in tower.named_parameters()
            if name == "token_embedding" or (name.startswith("block.") and parameter.dim() > 1)
        }
        assert (997, config.model.text.width) in weights and len(weights) > 4
        batch = local_batch(*random_pairs(config, 0), mesh)
        step: Any = trainer.training_step
        with Passes(weights) as seen:
            step.gradients(batch, Phases())
    wide = {"_to_copy"} if precision == "bf16" else set()  # factors of products
    assert set(seen.writes) == {"addmm_", "index_add_"} | wide, seen.writes
    assert seen.writes["index_add_"] == 1, "captions are one part"
