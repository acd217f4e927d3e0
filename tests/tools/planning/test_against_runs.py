"""The planner's formulas against real steps of small models: parameters, activations and bytes of every collective.

Four ranks, one launch, many cases (another for the slow ones). What autograd keeps is measured as
train.activation_budget_gb does it; collectives are read where they are dispatched, and agree to the byte once
megatron-core's padding of flat buffers is added.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config.phases import first_phase
from engine.config.read import Config, resolve
from engine.parallel.device import prepare
from engine.parallel.mesh import Mesh, build_mesh
from engine.parallel.traffic import TrafficReader
from engine.trainer import Trainer
from tests.distributed import run_distributed, world
from tests.gather import contrastive_step
from tests.golden import local_batch
from tools.cost.activations import micro_batch_saved_bytes
from tools.cost.layout import Layout, Stage, layout_of, stages_of
from tools.cost.memory import stage_parameters, stash_bytes
from tools.cost.traffic import axis_size, step_traffic

pytestmark = pytest.mark.dist

RANKS, BATCH = 4, 16


@dataclass(frozen=True)
class Case:
    """A model at a layout."""

    name: str
    layout: tuple[int, int]
    """TP, PP; DP is what is left."""
    options: tuple[str, ...] = ()
    model: str = "tiny-18b"

    def config(self) -> Config:
        """The job."""
        tensor, pipeline = self.layout
        given = [
            f"model.preset={self.model}",
            "model.text.depth=2",  # a block of each kind
            "model.block_kernels=torch",  # what auto is on a CPU; the formulas take it for a GPU
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"train.global_batch_size={BATCH}",
            "train.micro_batch_size=4",
            "train.steps=10",
            "train.precision=bf16",
            "model.attention=sdpa",
            *self.options,
        ]
        return resolve({"data": {"shards": ["-"]}}, given)


WIDE = "model.vision.width=64"  # three heads do not divide by two tensor ranks
LAYER = ("model.vision.norm=layer", "model.vision.qkv_bias=true", "model.vision.key_bias=true")
CLIP = (*LAYER, "model.vision.embed_norm=true", "model.vision.patch_bias=false", "model.vision.mlp=quick_gelu")
SIGLIP = (*LAYER, "model.vision.class_token=false", "model.vision.pool=attention", "model.text.causal=false",
          "model.text.pool=last", "model.text.head_bias=true", "model.text.mlp=gelu_tanh")  # fmt: skip
SCALED = ("model.vision.post_norm=false", "model.vision.layer_scale=0.1")
INTERNVIT = (*SCALED, "model.vision.qk_norm=true", "model.vision.final_norm=false")
DINOV3 = ("model.vision.norm=layer", *SCALED, "model.vision.mlp=swiglu", "model.vision.rope=true",
          "model.vision.rope_kind=dinov3", "model.vision.registers=3", "model.vision.pos_embed=false")  # fmt: skip
PE = (*CLIP, "model.vision.rope=true", "model.vision.rope_kind=pe", "model.vision.pool=attention",
      "model.vision.pool_heads=2", "model.vision.pool_mlp_hidden=48")  # fmt: skip
SHALLOW = "model.vision.depth=2"
FAST = [
    Case("internvit-tp2", (2, 2), (*INTERNVIT, SHALLOW, "train.keep_activations=2"), model="tiny-8b"),
    Case("dinov3-tp2", (2, 2), (*DINOV3, SHALLOW, "train.keep_activations=2"), model="tiny-8b"),
    Case("pe-tp2", (2, 1), (*PE, SHALLOW, "train.keep_activations=2"), model="tiny-8b"),
    Case("18b-clips-full", (2, 2), ("data.frames=2", "train.recompute=full", "train.keep_activations=1")),
    Case("18b-pp4-fp32-ring", (1, 4), ("train.precision=fp32", "train.loss_variant=ring")),
    Case("18b-virtual", (1, 2), ("parallel.virtual=2", "train.micro_batch_size=2", "train.keep_activations=1")),
    Case("b16-tp2", (2, 1), (WIDE, "train.keep_activations=2"), model="tiny-b16"),
    Case("siglip-tp2", (2, 2), (*SIGLIP, "train.keep_activations=2"), model="tiny-8b"),
    Case("mean-no-sequence", (2, 1), (*CLIP, SHALLOW, "model.vision.pool=mean", "parallel.sequence=false"),
         model="tiny-8b"),
]  # fmt: skip
PLAIN = Case("18b-tp2-pp2", (2, 2))
SLOW = [
    Case("internvit-no-sequence", (2, 1), (*INTERNVIT, "parallel.sequence=false"), model="tiny-8b"),
    Case("18b-no-sequence-keep", (2, 2), ("parallel.sequence=false", "train.keep_activations=2")),
    Case("clip-tp2", (2, 2), (*CLIP, "train.keep_activations=2"), model="tiny-8b"),
    Case("8b-uneven-keep-all", (1, 2), ("parallel.layers=[1,3]", "train.keep_activations=-1"), model="tiny-8b"),
    PLAIN,
    Case("18b-full", (2, 2), ("train.recompute=full", "train.keep_activations=1")),
    Case("18b-clips", (2, 2), ("data.frames=2", "train.keep_activations=2")),
    Case("8b-dp4", (1, 1), model="tiny-8b"),
    Case("e14-pp2", (1, 2), model="tiny-e14"),
    Case("b16-tp2-no-sequence", (2, 2), (WIDE, "parallel.sequence=false", "train.patch_dropout=0"), model="tiny-b16"),
]
every_case = pytest.mark.parametrize(
    "case", [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=lambda case: case.name
)


class _Recorder(TorchDispatchMode):
    """Bytes that this rank puts in, by axis and kind."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.reader, self.sent = TrafficReader(mesh), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        transfer = self.reader.read(func, args) if func.namespace == "c10d" else None
        if transfer is not None and transfer.sent_bytes:
            self.sent[f"{transfer.axis} {transfer.kind}"] += transfer.sent_bytes
        return func(*args, **(kwargs or {}))


def _all_cases(cases: list[Case]) -> dict[str, Any]:
    device = prepare()
    mesh = cache(lambda tensor, pipeline: build_mesh(tensor, pipeline, world()))
    return {case.name: _measured(case.config(), mesh(*case.layout), device) for case in cases}


def _measured(config: Config, mesh: Mesh, device: Any) -> dict[str, Any]:
    trainer = Trainer(first_phase(config), mesh, device)
    trainer.optimizer.rule.sums_on_a_cpu = False  # as on a GPU
    saved = contrastive_step(trainer).activations.micro_batch_bytes()
    parts = trainer.towers.parts
    padding = [
        sum(buffer.numel for buffer in part.ddp.buffers) - sum(p.numel() for p in part.ddp.parameters())
        for part in parts
    ]
    side, text = config.model.vision.image_size, config.model.text
    clip = (config.data.frames,) if config.data.frames > 1 else ()
    images = torch.zeros(BATCH, *clip, 3, side, side, dtype=torch.uint8)
    captions = torch.full((BATCH, text.context_length), 1)
    captions[:, -1] = text.vocab_size - 1  # full length: nothing is cut off
    with _Recorder(mesh) as recorder:
        trainer.step(local_batch(images, captions, mesh))
        trainer.towers.wait_for_weights()
    return {
        "stage": mesh.pipeline.rank,
        "parameters": sum(parameter.numel() for part in parts[:-1] for parameter in part.ddp.parameters()),
        "padding": {"data": sum(padding[:-1]), "world": padding[-1]},
        "saved": saved,
        "sent": dict(recorder.sent),
    }


Measured = Callable[[Case], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def measured() -> Measured:
    """What each of the four ranks measured of a case; the first question starts them."""
    launch = cache(lambda slow: run_distributed(_all_cases, RANKS, cases=SLOW if slow else FAST))
    return lambda case: [results[case.name] for results in launch(case in SLOW)]


def _planned(case: Case, stage: int) -> tuple[Config, Layout, Stage]:
    config = case.config()
    layout = layout_of(config, RANKS)
    return config, layout, stages_of(config.model, layout)[stage]


@every_case
def test_parameters_of_a_rank(case: Case, measured: Measured) -> None:
    for rank in measured(case):
        config, layout, stage = _planned(case, rank["stage"])
        assert stage_parameters(config.model, layout, stage) == rank["parameters"], stage


@every_case
def test_bytes_that_autograd_keeps(case: Case, measured: Measured) -> None:
    for rank in measured(case):
        config, layout, stage = _planned(case, rank["stage"])
        planned = micro_batch_saved_bytes(config.model, layout, stage)
        # abs: recomputation keeps the bounds of the samples, which only show in so small a model.
        assert planned == pytest.approx(rank["saved"], rel=0.01, abs=128), stage


@every_case
def test_bytes_of_every_collective(case: Case, measured: Measured) -> None:
    for rank in measured(case):
        config, layout, stage = _planned(case, rank["stage"])
        planned: dict[str, float] = defaultdict(float)
        for entry in step_traffic(config.model, layout, stage):
            if entry.what != "data":  # the batch was handed over, not read by the feed
                planned[f"{entry.axis} {entry.kind}"] += entry.sent_bytes
        for axis, elements in rank["padding"].items():
            if (owners := axis_size(layout, axis)) > 1:
                planned[f"{axis} reduce-scatter"] += elements * 4
                planned[f"{axis} all-gather"] += elements * layout.element_bytes / owners
        assert {key: value for key, value in planned.items() if value} == rank["sent"], stage


def test_the_stash_is_the_inputs_of_all_micro_batches() -> None:
    config, layout, second = _planned(PLAIN, 1)
    tokens = BATCH * config.model.vision.kept_tokens(0.5)
    assert stash_bytes(config.model, layout, second) == tokens * config.model.vision.width * 2 / layout.tensor
    assert stash_bytes(config.model, layout, _planned(PLAIN, 0)[2]) == 0
