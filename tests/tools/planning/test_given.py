"""Every setting of the schema is priced, free, or said to be left out: none is ignored in silence."""

from pathlib import Path

import pytest

from engine.config.help.fields import settings
from engine.config.read import Config, load_config, resolve
from tools.cost.cluster import Cluster
from tools.cost.hardware import load_hardware
from tools.cost.layout import layout_of, stages_of
from tools.cost.memory import phase_memory
from tools.cost.mim import mim_estimate
from tools.cost.time import step_time
from tools.cost.traffic import step_traffic
from tools.cost.work import rank_flops
from tools.plan.given import FREE, UNPRICED, left_out, matches
from tools.simulate.__main__ import main

PRICED = [key for key in settings() if not matches(key, FREE) and not matches(key, tuple(UNPRICED))]
TEACHER = "train.distill=[{path: '-', model: %s, interactive: %d, %s}]"
LOCKED, WHOLE = "train.freeze=[vision.*]", "train.patch_dropout=0"
# fmt: off
SAMPLES = {
    "model.embed_dim": "1024", "model.norm_kernel": "torch", "model.block_kernels": "torch",
    "model.attention": "matmul",
    "model.fp8": "current model.backend=transformer_engine train.micro_batch_size=16",
    "model.fp8_bf16_blocks": "2 model.backend=transformer_engine model.fp8=current train.micro_batch_size=16",
    "model.vision.norm": "rms", "model.vision.post_norm": "true", "model.vision.embed_norm": "true",
    "model.vision.qkv_bias": "false", "model.vision.key_bias": "true model.vision.separate_qkv=false",
    "model.vision.separate_qkv": "false", "model.vision.attention_norm": "false",
    "model.vision.mlp": "gelu model.vision.mlp_norm=false", "model.vision.mlp_norm": "false",
    "model.vision.rope": "false",
    "model.vision.qk_norm": "true model.vision.norm=rms model.vision.separate_qkv=false",
    "model.vision.patch_bias": "false", "model.vision.class_token": "false model.vision.pool=mean",
    "model.vision.pool": "mean", "model.vision.final_norm": "false", "model.vision.head_bias": "false",
    "model.vision.projection": "false model.embed_dim=768 model.vision.head_bias=false",
    "model.vision.pool_mlp_hidden": "96 model.vision.pool=attention model.vision.mlp=gelu model.vision.mlp_norm=false",
    "model.vision.layer_scale": "0.1", "model.vision.registers": "4", "model.vision.image_size": "384",
    "model.vision.patch_size": "32", "model.vision.depth": "10", "model.vision.width": "1536",
    "model.vision.head_width": "96", "model.vision.mlp_hidden": "4096", "model.text.norm": "rms",
    "model.text.bias": "false", "model.text.rope": "true", "model.text.pos_embed": "false model.text.rope=true",
    "model.text.mlp": "swiglu", "model.text.pool": "mean", "model.text.head_bias": "true",
    "model.text.context_length": "64", "model.text.vocab_size": "50000", "model.text.width": "768",
    "model.text.depth": "6", "model.text.heads": "4", "model.text.mlp_hidden": "512", "data.frames": "2",
    "data.features": f"x {LOCKED} {WHOLE} data.crop_scale=[1,1]", "parallel.tensor": "2", "parallel.pipeline": "2",
    "parallel.virtual": "2", "parallel.overlap": "false", "parallel.sequence": "false parallel.tensor=2",
    "parallel.round_size": "8 parallel.virtual=3 parallel.pipeline=2", "parallel.shard": "weights parallel.virtual=4",
    "parallel.shard_ranks": "2 parallel.shard=weights parallel.virtual=4",
    "parallel.layers": "[2,10] parallel.pipeline=2", "parallel.reduce_dtype": "bf16",
    "parallel.bucket_size": "1000000", "train.global_batch_size": "8192", "train.micro_batch_size": "32",
    "train.text_micro_batch_size": "8", "train.keep_activations": "2", "train.recompute": "full",
    "train.offload_stash": "true parallel.virtual=2", "train.keep_outputs": "fc2", "train.outputs_budget_gb": "1",
    "train.offload_outputs": "true train.keep_outputs=all", "train.patch_dropout": "0.25", "train.freeze": "[text.*]",
    "train.precision": "fp32", "train.loss": "sigmoid", "train.mask_false_negatives": "captions",
    "train.matryoshka": "[128,512]", "train.loss_variant": "ring", "train.loss_tile": "32", "optim.name": "adamw",
    "optim.ema_decay": "0.9", "health.audit_every_steps": "0",
}
TEACHERS = {"model": ("l14", 0, "feature: 0, relational: 1"), "precision": ("b16", 0, "precision: fp32"),
            "feature": ("b16", 0, "feature: 0, relational: 1"), "interactive": ("b16", 1, "feature: 1"),
            "relational": ("b16", 0, "relational: 1")}
MIM = {"mim.teacher_model": "l14", "mim.teacher_precision": "fp32", "mim.masked_patches": "80"}
# fmt: on
H100 = Cluster(hardware=load_hardware("h100"), gpus=16, per_node=8)
REFUSED = {"train.activation_budget_gb"}
"""Settings that layout_of refuses in words."""


def job(*options: str) -> Config:
    """A job on 16 GPUs."""
    train = {"precision": "bf16", "global_batch_size": 4096, "micro_batch_size": 64}
    return resolve({"model": "b16", "data": {"shards": ["-"]}, "train": train}, list(options))


def price(config: Config) -> list[object]:
    """Seconds, bytes, messages and FLOPs of a job."""
    layout, model = layout_of(config, 16), config.model
    stage = stages_of(model, layout)[0]
    traffic = [(one.what, one.axis, one.kind, one.count, one.sent_bytes) for one in step_traffic(model, layout, stage)]
    return [
        step_time(model, layout, H100),
        phase_memory(model, layout, stage),
        traffic,
        rank_flops(model, layout, stage),
    ]


def test_every_setting_is_one_of_the_kinds() -> None:
    known = {*SAMPLES, *MIM, *REFUSED, *(f"train.distill[].{name}" for name in TEACHERS)}
    phases = {key for key in PRICED if key.startswith("phases[]")}  # they are priced one by one
    assert set(PRICED) - known - phases == set(), "say in tools/plan/given.py what these cost"
    assert known - set(PRICED) == set()


@pytest.mark.parametrize("key", SAMPLES)
def test_a_setting_that_is_priced_changes_the_price(key: str) -> None:
    value, *others = SAMPLES[key].split()
    assert price(job(*others, f"{key}={value}")) != price(job(*others))


@pytest.mark.parametrize("name", TEACHERS)
def test_what_a_teacher_is_and_teaches_changes_the_price(name: str) -> None:
    other = ("b16", *TEACHERS[name][1:]) if name == "model" else ("b16", 0, "feature: 1")
    assert price(job(TEACHER % TEACHERS[name])) != price(job(TEACHER % other))


@pytest.mark.parametrize("key", MIM)
def test_what_is_distilled_from_changes_the_price(key: str) -> None:
    train = {"precision": "bf16", "global_batch_size": 512, "micro_batch_size": 16}
    mim = {"teacher": "-", "teacher_model": "e14"}
    tree = {"model": "l14", "objective": "mim", "data": {"shards": ["-"]}, "train": train, "mim": mim}
    one, other = (resolve(tree, ["parallel.pipeline=2", *more]) for more in ([], [f"{key}={MIM[key]}"]))
    assert mim_estimate(one, layout_of(one, 16), H100) != mim_estimate(other, layout_of(other, 16), H100)


def test_what_is_not_priced_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert left_out(job()) == left_out(job("model.attention=matmul")) == []
    file = tmp_path / "job.yaml"
    file.write_text("model: b16\ndata: {shards: x, workers: 3}\ncheckpoint: {every_steps: 9}\n")
    assert load_config(file).data.workers == 3
    assert main([str(file), "--world-size=4", "--gpu=h100"]) == 0
    said = capsys.readouterr().err
    assert "not priced: data.workers=3 (pictures are decoded as fast as the profile says)" in said
    assert "not priced: checkpoint.every_steps=9 (a step without saves)" in said
