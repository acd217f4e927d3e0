"""Options of a step beside its layout: the planner's FLOPs, traffic and memory of them against dry runs.

Losses (false negatives left out, teachers, nested widths), towers that are frozen or read as features, sharded weights
and kept outputs; every collective of the step is there, in bytes. The buckets are padded, hence 5 %.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config.read import Config, preset_model, resolve
from engine.objectives.contrastive.copies import Copies
from engine.objectives.contrastive.distill.relational import relational_loss
from engine.objectives.contrastive.sigmoid import sigmoid_loss
from engine.objectives.contrastive.softmax import contrastive_loss
from engine.objectives.contrastive.tiles import bfloat16_factors
from tests.distributed import world
from tools.cost.cluster import Cluster
from tools.cost.hardware import load_hardware
from tools.cost.layout import FrozenModel, Layout, layout_of, stages_of
from tools.cost.loss import BF16_PRODUCTS, GPU_TILE, left_out_bytes, loss_work, relational_work
from tools.cost.memory import phase_memory
from tools.cost.time import loss_seconds, step_time
from tools.cost.traffic import step_traffic
from tools.cost.work import rank_flops
from tools.dryrun.rank import dry_run
from tools.dryrun.report import flops_by_part, traffic_table
from tools.simulate.stage_costs import simulate_config

SMALL = (
    "model.preset=tiny-18b",
    "model.vision.depth=4",
    "model.text.depth=2",
    "train.micro_batch_size=4",
    "train.global_batch_size=32",
    "parallel.pipeline=2",
)
TENSOR, CHUNKS = "parallel.tensor=2", "parallel.virtual=2"
TEACHER = "{path: '-', model: {preset: tiny-18b, vision: {depth: 1}, text: {depth: 1}}, feature: %d, interactive: %d, "
TEACHER += "relational: %d}"
EVERY_LOSS = "train.distill=[" + TEACHER % (1, 1, 1) + "]"
MASKED = "train.mask_false_negatives=both"
LOCKED = "train.freeze=[vision.*]"
FEATURES = (LOCKED, "data.features=x.npz", "data.crop_scale=[1,1]", "train.patch_dropout=0")
LOWER = (
    "train.freeze=[vision.embed.*,vision.blocks.0-1.*,text.token_embedding,text.pos_embed,text.blocks.0.*]",
    "train.keep_outputs=fc2",
)
WEIGHTS = (CHUNKS, "parallel.shard=weights")
FAST = [
    (TENSOR, MASKED, EVERY_LOSS, "train.matryoshka=[16,32]"),
    (EVERY_LOSS, MASKED, "train.loss=sigmoid", "train.loss_variant=ring"),
    (*FEATURES, *WEIGHTS, "train.mask_false_negatives=captions"),
    (*LOWER, *WEIGHTS),
    (TENSOR, LOCKED, "train.offload_outputs=true", "train.keep_outputs=all"),
    (TENSOR, "train.keep_outputs=fc2+proj+qkv", "train.recompute=full", "train.keep_activations=1"),
    ("train.freeze=[text.*]", "optim.name=adamw"),
]
SLOW = [
    (TENSOR, "train.keep_outputs=all", "model.vision.mlp=swiglu", "model.vision.mlp_norm=true"),
    (TENSOR, "parallel.sequence=false", "train.keep_outputs=fc2+proj", "train.recompute=full"),
    (TENSOR, CHUNKS, "train.outputs_budget_gb=0.0005", "train.recompute=selective"),
    (TENSOR, "train.freeze=[vision.embed.*,vision.blocks.0-2.*,text.*]"),
    ("train.freeze=[vision.embed.*,vision.blocks.0-2.*]", "train.recompute=full"),
    (TENSOR, *FEATURES),
    (*WEIGHTS, LOCKED),
    (CHUNKS, "parallel.shard=gradients"),
    ("train.distill=[" + TEACHER % (0, 0, 1) + "]", "train.loss_variant=ring"),
    ("train.distill=[" + TEACHER % (1, 0, 0) + "]", "train.loss=sigmoid"),
]
cases = pytest.mark.parametrize(
    "options", [*FAST, *(pytest.param(options, marks=pytest.mark.slow) for options in SLOW)], ids=" ".join
)


def job(*options: str) -> Config:
    """A job of two stages on eight ranks."""
    return resolve({"data": {"shards": ["-"]}}, [*SMALL, *options])


@cases
@pytest.mark.parametrize("rank", [0, 7])
def test_flops_and_bytes_on_the_wire(options: tuple[str, ...], rank: int) -> None:
    config = job(*options)
    layout, report = layout_of(config, 8), dry_run(config, 8, rank)
    stage = stages_of(config.model, layout)[report.stage]
    counted = flops_by_part(report)
    assert counted.pop("other") == 0
    assert rank_flops(config.model, layout, stage) == pytest.approx(counted, rel=1e-9)
    planned: dict[tuple[str, str], float] = defaultdict(float)
    for entry in step_traffic(config.model, layout, stage):
        if entry.what != "data":  # the feed is not run
            planned[entry.axis, entry.kind] += entry.sent_bytes
    sent = {(row["axis"], row["kind"]): row["sent_bytes"] for row in traffic_table(report) if row["sent_bytes"]}
    assert {kind: size for kind, size in planned.items() if size} == pytest.approx(sent, rel=0.05)


# --- memory -----------------------------------------------------------------------------------------------------------

LOSSES = (
    "model.preset=tiny-18b",
    "model.vision.depth=1",
    "model.text.depth=1",
    "model.embed_dim=256",
    "train.micro_batch_size=512",
    "train.text_micro_batch_size=512",
    "train.global_batch_size=8192",
)
"""More logits than anything else."""
WIDE = EVERY_LOSS.replace("vision:", "embed_dim: 256, vision:")


@pytest.mark.parametrize(
    "options",
    [
        (),
        (MASKED,),
        (WIDE, MASKED, "train.loss=sigmoid"),
        pytest.param((WIDE,), marks=pytest.mark.slow),
        pytest.param((WIDE, "train.loss_variant=ring"), marks=pytest.mark.slow),
        pytest.param((MASKED, "train.loss_variant=ring", "train.matryoshka=[128,256]"), marks=pytest.mark.slow),
        pytest.param((MASKED, "train.loss=sigmoid", "train.loss_tile=1024"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_memory_of_a_loss(options: tuple[str, ...]) -> None:
    config = resolve({"data": {"shards": ["-"]}}, [*LOSSES, *options])
    layout, report = layout_of(config, 2), dry_run(config, 2, 0)
    planned = phase_memory(config.model, layout, stages_of(config.model, layout)[0])["loss"]
    assert planned.total == pytest.approx(report.peaks["loss"].total, rel=0.03)


@pytest.mark.parametrize("model", ["l14, block_kernels: torch", "vit-l14, block_kernels: fused"])
def test_teaching_can_be_the_peak(model: str) -> None:
    """A teacher sees whole pictures at its own size, the student a few patches of small ones."""
    teacher = f"{{path: '-', model: {{preset: {model}, vision: {{depth: 2}}, text: {{depth: 1}}}}, "
    teacher += "feature: 0, interactive: 0, relational: 1}"
    options = [
        "model={preset: tiny-18b, text: {vocab_size: 49408, context_length: 77}, vision: {image_size: 56}}",
        "train.micro_batch_size=256",
        "train.global_batch_size=256",
        "train.text_micro_batch_size=8",
        "train.patch_dropout=0.9",
        "train.precision=bf16",
        f"train.distill=[{teacher}]",
    ]
    config = resolve({"data": {"shards": ["-"]}}, options)
    layout, report = layout_of(config, 1), dry_run(config, 1, 0)
    planned = phase_memory(config.model, layout, stages_of(config.model, layout)[0])
    assert report.peak_phase == "teacher" == max(planned, key=lambda phase: planned[phase].total)
    assert planned["teacher"].total == pytest.approx(report.peak.total, rel=0.05)


COPIES = (
    *("parallel.reduce_dtype=bf16", "train.text_micro_batch_size=16", "train.micro_batch_size=4"),
    *("train.precision=bf16", "model.block_kernels=torch"),
)
TINY = ("model.preset=tiny-18b", "model.vision.depth=4", "model.text.depth=2", "train.global_batch_size=32")
LARGE = ("train.micro_batch_size=16", "train.global_batch_size=64")
QUARTERS = (CHUNKS.replace("2", "4"), "parallel.shard=weights")
FULL = ("model.preset=18b", "model.text.depth=2", *LARGE)


@pytest.mark.parametrize(
    ("ranks", "rank", "options"),
    [
        (4, 0, TINY),
        (4, 0, (*TINY, "parallel.overlap=false")),
        (8, 0, (*TINY, "parallel.pipeline=2")),
        (8, 7, (*TINY, "parallel.pipeline=2")),
        (4, 0, ("model.preset=b16", *LARGE)),
        pytest.param(4, 0, ("model.preset=l14", *LARGE), marks=pytest.mark.slow),
        pytest.param(4, 0, ("model.preset=b16", *LARGE, *QUARTERS), marks=pytest.mark.slow),
        pytest.param(4, 0, (*FULL, "model.vision.depth=4"), marks=pytest.mark.slow),
        pytest.param(
            4, 0, (*FULL, "model.vision.depth=8", QUARTERS[0], "parallel.shard=gradients"), marks=pytest.mark.slow
        ),
    ],
)
def test_room_for_copies_of_gradients(ranks: int, rank: int, options: tuple[str, ...]) -> None:
    config = resolve({"data": {"shards": ["-"]}}, [*COPIES, *options])
    layout, report = layout_of(config, ranks), dry_run(config, ranks, rank)
    planned = phase_memory(config.model, layout, stages_of(config.model, layout)[report.stage])
    assert max(memory.total for memory in planned.values()) == pytest.approx(report.peak.total, rel=0.015)


def test_a_tower_that_is_read_needs_no_room_to_work() -> None:
    config = job(*FEATURES)
    layout = layout_of(config, 8)
    for rank in (0, 7):
        report = dry_run(config, 8, rank)
        planned = phase_memory(config.model, layout, stages_of(config.model, layout)[report.stage])
        for phase, ours in (("loss", "loss"), ("encode_text", "encode_text"), ("backward_text", "text")):
            assert planned[ours].total == pytest.approx(report.peaks[phase].total, rel=0.05)


# --- seconds ----------------------------------------------------------------------------------------------------------

A100 = Cluster(hardware=load_hardware("a100-40"), gpus=32, per_node=8)


def large(*options: str) -> Config:
    """A job on 32 GPUs."""
    given = {"precision": "bf16", "global_batch_size": 8192, "micro_batch_size": 64, "text_micro_batch_size": 64}
    return resolve({"model": "l14", "data": {"shards": ["-"]}, "train": given}, [*options])


class _Bytes(TorchDispatchMode):
    """What operators read and write, products excepted."""

    _NOTHING_READ: ClassVar = {"zero_", "fill_", "zeros", "zeros_like", "new_zeros", "full", "new_full"}

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0
        self.products: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        """Two factors, and what they are written to where they are not added."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("mm", "addmm_"):
            self.products.append((*args[-2:], result if name == "mm" else None))
        elif not func.is_view and not name.startswith(("empty", "new_empty")) and func.namespace != "c10d":
            read = args[1:] if name == "copy_" else () if name in self._NOTHING_READ else args
            self.moved += sum(part.nbytes for part in (*read, result) if isinstance(part, torch.Tensor))
        return result

    def multiply_as_a_gpu(self) -> None:
        """Count what the other branches of engine/objectives/contrastive/tiles.py do, which no CPU takes."""
        for a, b, written in self.products:
            with self:
                factors = bfloat16_factors(a, b)
                if written is not None:
                    written.zero_()
            assert len(factors) == BF16_PRODUCTS


OTHERS, OWN, WIDTH = 15, 128, 64
"""Ranks beside this one, rows of each, and the embedding of a job whose losses are counted."""


@pytest.fixture
def ranks() -> Iterator[dist.ProcessGroup]:
    """Ranks that answer with whatever is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=OTHERS + 1)
    yield world()
    dist.destroy_process_group()


@pytest.mark.parametrize("tile", [None, 96])
@pytest.mark.parametrize("variant", ["gather", "ring"])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "relational"])
def test_the_charge_of_a_loss_is_what_a_gpu_moves(
    loss: str, variant: Any, tile: int | None, ranks: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(data=OTHERS + 1, global_batch=(OTHERS + 1) * OWN, micro_batch=8, loss_variant=variant)
    layout = replace(layout, loss_tile=tile, loss="sigmoid" if loss == "sigmoid" else "softmax")
    rows = torch.rand(OWN, WIDTH)
    where: dict[str, Any] = {"tile": tile or GPU_TILE, "row_counts": [OWN] * (OTHERS + 1)}
    calls: dict[str, Callable[[], object]] = {
        "softmax": lambda: contrastive_loss(rows, rows, 1.0, ranks, variant=variant, keep_bytes=0, **where),
        "sigmoid": lambda: sigmoid_loss(rows, rows, 1.0, 0.0, ranks, variant=variant, **where),
        "relational": lambda: relational_loss(
            rows, rows, (rows[:, : WIDTH // 2],) * 2, 1.0, 1.0, ranks, variant=variant, **where
        ),
    }
    with _Bytes() as counted:
        calls[loss]()
    counted.multiply_as_a_gpu()
    student = replace(preset_model("tiny-18b"), embed_dim=WIDTH)
    teacher = FrozenModel(replace(student, embed_dim=WIDTH // 2), "fp32", interactive=False, relational=True)
    monkeypatch.setattr("tools.cost.loss.KEPT_LOGITS", 0)
    work = relational_work(teacher, student, layout) if loss == "relational" else loss_work(WIDTH, layout)
    assert work.flops == sum(2 * a.numel() * b.shape[1] for a, b, _ in counted.products)
    assert work.moved == pytest.approx(counted.moved, rel=0.05)


def test_the_charge_of_false_negatives_is_what_operators_move() -> None:
    """One rank has every logit in one tile: the image strip, whose logits of the first pass are kept."""
    config = resolve({"model": "tiny-18b", "data": {"shards": ["-"]}}, [MASKED, "train.loss=sigmoid"])
    layout = layout_of(config, 1)
    rows = layout.own_rows
    tile, copies = torch.zeros(rows, rows), Copies(of_all=torch.zeros(layout.copies, rows, dtype=torch.int64))
    with _Bytes() as counted:
        copies.leave_out(tile, slice(0, rows), slice(0, rows))
    assert left_out_bytes(layout) == pytest.approx(counted.moved, rel=0.03)


def test_a_loss_takes_as_long_as_its_options_ask() -> None:
    def seconds(*options: str) -> float:
        config = large(*options)
        return loss_seconds(config.model, layout_of(config, 32), A100)

    teacher = "{path: '-', model: l14, feature: %d, interactive: %d, relational: %d}"
    plain, masked = seconds(), seconds(MASKED)
    layout = layout_of(large(MASKED), 32)
    left_out = left_out_bytes(layout) / A100.hardware.memory_bytes_s
    assert left_out < masked - plain < 1.2 * left_out
    crossed, related = (seconds(f"train.distill=[{teacher % which}]") for which in ((0, 1, 0), (0, 0, 1)))
    assert crossed == pytest.approx(3 * plain, rel=0.05) and related == pytest.approx(3 * plain, rel=0.05)
    sigmoid = seconds("train.loss=sigmoid")
    assert seconds(f"train.distill=[{teacher % (0, 1, 0)}]", "train.loss=sigmoid") == pytest.approx(
        3 * sigmoid, rel=0.05
    )


@pytest.mark.parametrize(
    "options",
    [
        (*FEATURES,),
        (*FEATURES, "parallel.pipeline=4"),
        (*FEATURES, "parallel.virtual=6", "parallel.shard=weights"),
        (LOCKED, "parallel.virtual=24", "parallel.shard=weights"),
        ("train.freeze=[vision.embed.*,vision.blocks.0-17.*]", "parallel.virtual=24", "parallel.shard=weights"),
        ("train.freeze=[text.*]", "parallel.virtual=24", "parallel.shard=weights"),
        ("train.distill=[{path: '-', model: l14}]", "parallel.pipeline=4"),
        ("train.distill=[{path: '-', model: l14}]",),
    ],
    ids=" ".join,
)
def test_the_simulated_step_takes_as_long(options: tuple[str, ...]) -> None:
    config = large("parallel.tensor=1", *options)
    time = step_time(config.model, layout_of(config, 32), A100)
    assert simulate_config(config, A100).step_s == pytest.approx(time.total - time.input, rel=0.03)


def test_features_are_no_work() -> None:
    config, pixels = (large("parallel.pipeline=4", *options) for options in (FEATURES, (LOCKED, FEATURES[-1])))
    read, seen = (step_time(one.model, layout_of(one, 32), A100) for one in (config, pixels))
    assert read.compute == read.tensor == read.bubble == 0 and read.input < 0.01 * seen.input
    rows = 1024 / 4 * config.model.embed_dim * 4 * 3 / 20e9
    assert rows < read.p2p < 2 * rows and read.total < 0.25 * (seen.total - seen.input)
