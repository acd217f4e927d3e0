"""Frozen tensors (train.freeze) against plain torch on one process: towers, one graph, torch's AdamW, requires_grad.

Layouts of several ranks are compared with one process in tests/engine/test_step_options.py and test_sharded.py.
"""

from collections.abc import Callable
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.manifest import AVERAGE, WEIGHT
from engine.checkpoint.reader import Checkpoint
from engine.config.phases import plan_job
from engine.config.read import Config, ConfigError
from engine.config.sections.phase import PhaseConfig
from engine.optim.groups import base_rate, tensor_group
from engine.optim.rates import warmup_cosine
from engine.parallel.device import prepare
from engine.parallel.mesh import Mesh
from engine.trainer import Trainer
from models.clip import LogitScale, embedding
from models.tensors.naming import logical_name
from models.towers.text import TextTower
from models.towers.vision import VisionTower
from tests.checkpoint.jobs import (
    BATCH,
    CONTEXT,
    SIDE,
    VOCABULARY,
    alone,
    build,
    job_config,
    run_steps,
    save,
    world_mesh,
)
from tests.distributed import run_distributed
from tests.gather import whole_weights
from tests.golden import deviations

STEPS = 5
LIKE_TORCH = (
    "train.patch_dropout=0",
    "train.micro_batch_size=8",
    "optim.name=adamw",
    "optim.eps=1e-4",  # gradients that are zero but for rounding must not become whole steps
    "optim.clip_grad_norm=0.5",
    "optim.layer_decay_vision=0.8",
)
FROZEN: dict[str, tuple[str, Callable[[str], bool]]] = {
    "locked image tower": ("vision.*", lambda name: name.startswith("vision.")),
    "locked caption tower": ("text.*", lambda name: name.startswith("text.")),
    "lower blocks": (
        "vision.embed.*,vision.blocks.0-2.*,text.blocks.0.*,text.token_embedding,text.pos_embed",
        lambda name: (
            name.startswith(
                ("vision.embed", "vision.blocks.0", "vision.blocks.1", "vision.blocks.2", "text.blocks.0", "text.tok")
            )
            or name == "text.pos_embed"
        ),
    ),
    "all but projections and scale": (
        "vision.embed.*,vision.blocks.*,vision.head.norm.*,text.token_embedding,text.pos_embed,text.blocks.*,text.norm.*",
        lambda name: "projection" not in name and name != "logit_scale.log_scale",
    ),
    "weights but no biases, a middle block": (
        "vision.blocks.2.*,*.weight,logit_scale.*",
        lambda name: name.startswith("vision.blocks.2.") or name.endswith((".weight", "log_scale")),
    ),
}
"""Patterns, and the same said in another way."""


class Plain:
    """The job in plain torch, from the same first weights."""

    def __init__(self, config: Config, mesh: Mesh, weights: dict[str, Tensor]):
        vision, text = (
            VisionTower(config.model, groups=mesh.vision_groups()),
            TextTower(config.model, groups=mesh.text_groups()),
        )
        self.config, self.vision, self.text, self.scale = config, vision, text, LogitScale()
        self.named: dict[str, nn.Parameter] = {"logit_scale.log_scale": self.scale.log_scale}
        for tower, kind in ((vision, "vision"), (text, "text")):
            self.named |= {logical_name(local, kind): parameter for local, parameter in tower.named_parameters()}
        for name, parameter in self.named.items():
            parameter.data.copy_(weights[name])
        self.rates, groups = {}, []
        for name, parameter in self.named.items():
            group = tensor_group(name, parameter.dim(), config.model, config.optim)
            self.rates[name] = base_rate(group.tower, config.optim) * group.lr_scale
            groups.append({"params": [parameter], "weight_decay": group.weight_decay})
        first, second = config.optim.betas
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(first, second), eps=config.optim.eps)

    def freeze(self, is_frozen: Callable[[str], bool]) -> None:
        """From here on."""
        for name, parameter in self.named.items():
            parameter.requires_grad_(not is_frozen(name))

    def step(self, number: int) -> float:
        """Number `number` of the job, on the batch of tests/checkpoint/jobs.py; its loss."""
        images, tokens = _batch(number)
        pixels = (images.float() / 255 - _MEAN) / _STD
        pictures, captions = self.vision(pixels, samples=BATCH), self.text(tokens)
        logits = self.scale() * embedding(pictures) @ embedding(captions).T
        labels = torch.arange(BATCH)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optim, steps = self.config.optim, self.config.train.steps
        trained = [parameter for parameter in self.named.values() if parameter.grad is not None]
        nn.utils.clip_grad_norm_(trained, optim.clip_grad_norm)
        factor = warmup_cosine(number, warmup_steps=optim.warmup_steps, total_steps=steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates.values(), strict=True):
            group["lr"] = factor * rate
        self.optimizer.step()
        return float(loss)

    def weights(self) -> dict[str, Tensor]:
        """As they are now."""
        return {name: parameter.detach().clone() for name, parameter in self.named.items()}


_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


def _batch(number: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1000 + number * BATCH)
    images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8, generator=draw)
    tokens = torch.randint(1, VOCABULARY - 1, (BATCH, CONTEXT), generator=draw)
    tokens[:, -1] = VOCABULARY - 1
    return images, tokens


def _freeze(patterns: str) -> str:
    return f"train.freeze=[{patterns}]"


@pytest.mark.dist
@pytest.mark.parametrize("case", FROZEN)
def test_training_is_that_of_plain_torch(case: str, tmp_path: Path) -> None:
    patterns, is_frozen = FROZEN[case]
    config = job_config(tmp_path, *LIKE_TORCH, _freeze(patterns))
    with alone() as mesh:
        trainer = build(config, mesh)
        first = whole_weights(trainer)
        plain = Plain(config, mesh, first)
        plain.freeze(is_frozen)
        losses, expected = run_steps(trainer, STEPS), [plain.step(i) for i in range(STEPS)]
        after, reference = whole_weights(trainer), plain.weights()
        held = sum(flat.numel() for buffer in _buffers(trainer) for flat in (buffer.grad_data,))
    assert losses == pytest.approx(expected, rel=1e-5)
    frozen = {name for name in first if is_frozen(name)}
    for name in first:
        assert torch.equal(after[name], first[name]) == (name in frozen), name
    assert not deviations(after, reference, 1e-5)
    trained = sum(value.numel() for name, value in first.items() if name not in frozen)
    padding = 64 * (len(first) - len(frozen)) + 1024  # megatron-core's
    assert trained <= held < trained + padding, "gradients of what is trained, and of nothing else"


def _buffers(trainer: Trainer) -> list[Any]:
    return [buffer for part in trainer.towers.parts for buffer in part.ddp.buffers]


# --- checkpoints ------------------------------------------------------------------------------------------------------

LOCKED = _freeze("vision.*,text.blocks.0.*")


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_to_the_bit(precision: str, tmp_path: Path) -> None:
    options = (LOCKED, f"train.precision={precision}", "optim.ema_decay=0.5")
    with alone() as mesh:
        straight = build(job_config(tmp_path / "straight", *options), mesh)
        expected = run_steps(straight, 4)
        first = build(job_config(tmp_path / "stopped", *options), mesh)
        run_steps(first, 2)
        folder = save(first)
        again = build(job_config(tmp_path / "stopped", *options), mesh)
        assert run_steps(again, 2) == expected[2:]
        after, whole = whole_weights(again), whole_weights(straight)
        assert all(torch.equal(after[name], whole[name]) for name in whole)
    checkpoint = Checkpoint(folder)
    shapes = checkpoint.manifest.shapes()
    assert shapes.keys() == whole.keys(), "what is frozen is in the checkpoint"
    trained = {name for name in shapes if not name.startswith(("vision.", "text.blocks.0."))}
    assert checkpoint.manifest.shapes("moment1").keys() == checkpoint.manifest.shapes(AVERAGE).keys() == trained
    averages = checkpoint.kind(AVERAGE)
    assert averages.shapes() == shapes
    name = "vision.head.projection.weight"
    assert torch.equal(checkpoint.read_whole(name, AVERAGE), checkpoint.read_whole(name, WEIGHT))


ELSEWHERE = {
    "tensor": ("parallel.tensor=2",),
    "pipeline": ("parallel.pipeline=2",),
    "sharded": ("parallel.virtual=2", "parallel.shard=weights", "train.micro_batch_size=2"),
}


def _go_on(checkpoint: str, run_dir: str) -> dict[str, Any]:
    """Two more steps at each layout of two ranks, and the weights of rank 0."""
    found = {}
    for name, layout in ELSEWHERE.items():
        config = job_config(f"{run_dir}/{name}", LOCKED, *layout, f"checkpoint.resume={checkpoint}")
        trainer = build(config, world_mesh(config))
        found[name] = {"losses": run_steps(trainer, 2), "weights": whole_weights(trainer)}
    return found


@pytest.mark.dist
def test_a_run_goes_on_at_other_layouts(tmp_path: Path) -> None:
    with alone() as mesh:
        trainer = build(job_config(tmp_path / "alone", LOCKED), mesh)
        run_steps(trainer, 2)
        folder = save(trainer)
        expected, weights = run_steps(trainer, 2), whole_weights(trainer)
    found, _ = run_distributed(_go_on, 2, checkpoint=str(folder), run_dir=str(tmp_path))
    for name, result in found.items():
        assert result["losses"] == pytest.approx(expected, rel=1e-5), name
        for tensor, value in weights.items():
            if tensor.startswith(("vision.", "text.blocks.0.")):
                assert torch.equal(result["weights"][tensor], value), f"{name}: {tensor}"


@pytest.mark.dist
def test_another_freeze_is_another_run(tmp_path: Path) -> None:
    with alone() as mesh:
        first = build(job_config(tmp_path, LOCKED), mesh)
        run_steps(first, 2)
        save(first)
        with pytest.raises(CheckpointError, match=r"train\.freeze .*vision.*checkpoint\.accept=\[train\.freeze\]"):
            build(job_config(tmp_path), mesh)
        accepted = build(job_config(tmp_path, "checkpoint.accept=[train.freeze]"), mesh)
        began = accepted.position.began
        assert began.keys() == {n for n in whole_weights(accepted) if n.startswith(("vision.", "text.blocks.0."))}
        assert set(began.values()) == {2}
        run_steps(accepted, 1)
        position = Checkpoint(save(accepted)).manifest.position
        assert position is not None and position.began == began


# --- phases -----------------------------------------------------------------------------------------------------------


def _unfreezing(tmp_path: Path, *more: str) -> Config:
    """Two steps with a locked image tower, then two with all, then two with a locked caption tower."""
    config = job_config(tmp_path, *LIKE_TORCH, *more)
    phases = [
        PhaseConfig(name="lit", steps=2, train={"freeze": ["vision.*"]}),
        PhaseConfig(name="all", steps=2),
        PhaseConfig(name="locked", steps=2, train={"freeze": ["text.*"]}),
    ]
    return replace(config, phases=phases)


@pytest.mark.dist
def test_phases_freeze_and_unfreeze(tmp_path: Path) -> None:
    config = _unfreezing(tmp_path)
    plan = plan_job(config).phases
    locks = ("vision.", "no such", "text.")
    with alone() as mesh:
        plain: Plain | None = None
        for number, (phase, lock) in enumerate(zip(plan, locks, strict=True)):
            trainer = Trainer(phase, mesh, prepare())
            trainer.resume()
            if plain is None:
                plain = Plain(config, mesh, whole_weights(trainer))
            plain.freeze(methodcaller("startswith", lock))
            first = 2 * number
            assert run_steps(trainer, 2) == pytest.approx([plain.step(first), plain.step(first + 1)], rel=1e-5)
            save(trainer)
        # Biases that were 0 until the second phase are sums of near-zero gradients: 1e-4 of them is rounding.
        assert plain is not None and not deviations(whole_weights(trainer), plain.weights(), 5e-4)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("train.freeze=[visoin.*]",), r"train\.freeze: visoin\.\* matches no parameter .* nearest: vision\.\*"),
        (("train.freeze=[vision]",), r"nearest: vision\.\*$"),
        (("train.freeze=[vision.blocks.0-5.*]",), r"vision\.blocks\.0-5\.\* .*past the last block"),
        (("train.freeze=[vision.blocks.3-1.*]",), "matches no parameter"),
        (("train.freeze=[logit_scale.*]", "train.logit_scale=20"), "matches no parameter"),
        (("train.freeze=[*]",), "freezes every parameter"),
        (("train.freeze=[vision.*]", "train.offload_stash=true", "parallel.pipeline=2"), "nothing to move"),
    ],
)
def test_what_cannot_be_frozen_is_said(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_job(job_config("runs/none", *options))
