"""The planner's formulas against a dry run: the engine's own step at full width, counted operator by operator.

FLOPs are equal, memory at the peak of every phase agrees within 5 % and no phase has more than is planned + 1 %.
A few blocks of each model stand for its towers; whole 18B stages run in the slow set.
"""

from dataclasses import dataclass

import pytest

from engine.config.read import Config, resolve
from tools.cost.activations import micro_batch_saved_bytes
from tools.cost.layout import layout_of, stages_of
from tools.cost.memory import phase_memory
from tools.cost.work import rank_flops
from tools.dryrun.rank import dry_run

PHASES = {"loss": "loss", "backward": "backprop", "backward_text": "text"}
"""Phase of the dry run -> of the formulas."""
SHORT = ("model.vision.depth=4", "model.text.depth=1", "train.global_batch_size=512", "train.micro_batch_size=16")

LARGE = ("model.vision.depth=4", "model.text.depth=2", "train.global_batch_size=64", "train.micro_batch_size=32")


@dataclass(frozen=True)
class Case:
    """A rank of a job."""

    name: str
    ranks: int
    stage: int
    options: tuple[str, ...]
    model: str = "18b"

    def config(self) -> Config:
        """The job."""
        train = {"precision": "bf16", "text_micro_batch_size": 64}
        model = {"preset": self.model, "block_kernels": "torch"}
        return resolve({"model": model, "data": {"shards": ["-"]}, "train": train}, list(self.options))


OFFLOADED = ("train.keep_outputs=all", "train.offload_outputs=true", "train.offload_stash=true")
FUSED = "model.block_kernels=fused"
PRODUCTS = "model.attention=matmul"
LONG = ("train.patch_dropout=0", "train.micro_batch_size=8")
TEACHER = (
    "{path: '-', model: {preset: 18b, block_kernels: torch, vision: {image_size: 196, width: 1024, head_width: 64, "
    "mlp_hidden: 4096, depth: 3}, text: {depth: 2}}, relational: 1}"
)

# fmt: off
FAST = [
    Case(
        "clips-averaged", 8, 1,
        (*SHORT, "parallel.pipeline=2", "data.frames=8", "train.global_batch_size=64", "optim.ema_decay=0.9",
         "optim.name=adamw"),
    ),
    Case("captions-beside-kept", 2, 0, (*LARGE, "train.keep_activations=1", "parallel.pipeline=2"), "l14"),
    Case(
        "captions-kept-sigmoid", 1, 0,
        (*LARGE, "train.keep_activations=-1", "model.vision.depth=3", "train.loss=sigmoid",
         "train.matryoshka=[64,512]"),
        "b16",
    ),
    Case(
        "weights-come-and-go", 8, 0,
        (*SHORT, "parallel.virtual=4", "parallel.shard=weights", "train.keep_outputs=fc2+proj", FUSED),
    ),
    Case("taught", 8, 1, (*SHORT, "parallel.tensor=2", "parallel.pipeline=2", f"train.distill=[{TEACHER}]")),
    Case(
        "upper-blocks", 8, 1, (*SHORT, "parallel.tensor=2", "parallel.pipeline=2", "train.freeze="
        "[vision.embed.*,vision.blocks.0-2.*,text.*]"),
    ),
    Case("scores-kept", 2, 0, (*LARGE, PRODUCTS, *LONG, "parallel.pipeline=2", "train.keep_activations=1"), "18b-336"),
    Case("scores-computed-again", 1, 0, (*LARGE, PRODUCTS, *LONG, "train.recompute=selective", FUSED), "l14"),
    Case("8b-full-virtual", 8, 1, (*SHORT, "parallel.pipeline=2", "parallel.virtual=2", "train.recompute=full"), "8b"),
]
PAPER = ("train.global_batch_size=108000", "train.text_micro_batch_size=25")
SLOW = [
    Case("first-stage-tp2", 8, 0, (*SHORT, "parallel.tensor=2", "parallel.pipeline=2")),
    Case(
        "virtual-nested", 8, 0,
        (*SHORT, "parallel.pipeline=2", "parallel.virtual=2", "train.micro_batch_size=32",
         "train.matryoshka=[256,768,1536]"),
    ),
    Case(
        "weights-within-a-node", 8, 0,
        (*SHORT, "parallel.pipeline=2", "parallel.virtual=2", "parallel.shard=weights", "parallel.shard_ranks=2",
         "train.outputs_budget_gb=0.5"),
    ),
    Case("locked-image-tower", 8, 0, (*SHORT, "parallel.pipeline=2", "train.freeze=[vision.*]")),
    Case(
        "upper-blocks-of-both", 2, 0, (*LARGE[1:], "model.vision.depth=8", "train.freeze="
        "[vision.embed.*,vision.blocks.0-1.*,text.token_embedding,text.pos_embed,text.blocks.0.*]"), "b16",
    ),
    Case("fused-swiglu", 2, 0, (*LARGE, FUSED, "train.keep_activations=1", "parallel.pipeline=2"), "l14"),
    Case("offloaded", 8, 0, (*SHORT, FUSED, "parallel.virtual=4", "parallel.shard=weights", *OFFLOADED)),
    Case(
        "gradients", 8, 1, (*SHORT, "parallel.pipeline=2", "parallel.virtual=2", "parallel.shard=gradients", *OFFLOADED)
    ),
    Case("last-stage-keep", 8, 1, (*SHORT, "parallel.pipeline=2", "train.keep_activations=3")),
    Case("tp2-pp12", 360, 6, (*PAPER, "parallel.tensor=2", "parallel.pipeline=12", "train.micro_batch_size=48")),
    Case("tp1-pp8", 360, 7, (*PAPER, "parallel.pipeline=8", "train.micro_batch_size=50")),
    Case("recipe", 360, 1, (*PAPER, "parallel.pipeline=8", "parallel.virtual=2", "train.micro_batch_size=50")),
    Case("tp8-pp3", 360, 0, (*PAPER, "parallel.tensor=8", "parallel.pipeline=3", "train.micro_batch_size=48")),
]
# fmt: on


def check(case: Case) -> None:
    """Compare the rank's FLOPs and the peak of each phase."""
    config = case.config()
    layout = layout_of(config, case.ranks)
    stage = stages_of(config.model, layout)[case.stage]
    report = dry_run(config, case.ranks, case.stage * layout.tensor * layout.data)
    counted = {phase: sum(t.flops for name, t in report.phases.items() if text_of(name) == phase) for phase in _PARTS}
    if layout.keeps_outputs:  # a replay multiplies less (models/tensors/kept.py, tests/engine/test_kept_outputs.py)
        counted = {phase: flops for phase, flops in counted.items() if phase in ("encode", "backward", "teacher")}
    planned_flops = rank_flops(config.model, layout, stage)
    assert {phase: planned_flops[phase] for phase in counted} == pytest.approx(counted, rel=1e-9)
    planned = phase_memory(config.model, layout, stage)
    for phase, ours in ((phase, ours) for phase, ours in PHASES.items() if phase in report.peaks):
        measured = report.peaks[phase].total
        assert planned[ours].total == pytest.approx(measured, rel=0.05), (phase, planned[ours], report.peaks[phase])
    # What is kept of captions or micro-batches while others are encoded is a moment of its own (first stage).
    highest = max(memory.total for memory in planned.values())
    assert report.peak.total <= 1.01 * highest, (report.peak_phase, report.peak, planned)
    if layout.keep and stage.has_embedding:
        for phase in ("encode", "encode_text"):
            assert 0.99 <= planned[phase].total / report.peaks[phase].total <= 1.05, phase


_PARTS = ("encode", "replay", "backward", "text", "teacher", "loss")


def text_of(phase: str) -> str:
    """The planner's phase of a phase of the timeline."""
    return "text" if phase.endswith("_text") else phase


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_a_few_blocks(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
@pytest.mark.parametrize(
    "options",
    [
        ("model.preset=18b", "parallel.tensor=2"),
        ("model.preset=b16", FUSED),
        ("model.preset=dinov3-7b", FUSED),
        pytest.param(("model.preset=internvit-6b",), marks=pytest.mark.slow),
        pytest.param(("model.preset=b16", "model.block_kernels=torch"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_what_a_micro_batch_keeps(options: tuple[str, ...], attention: str) -> None:
    short = ("model.vision.depth=3", "model.text.depth=1", "train.micro_batch_size=4", "train.global_batch_size=8")
    given = [*options, f"model.attention={attention}", *short, "train.precision=bf16"]
    config = resolve({"data": {"shards": ["-"]}}, given)
    ranks = config.parallel.tensor
    layout = layout_of(config, ranks)
    kept = micro_batch_saved_bytes(config.model, layout, stages_of(config.model, layout)[0])
    assert kept == pytest.approx(dry_run(config, ranks, 0).activation_bytes, rel=0.002)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case.name)
def test_kept_activations_and_the_18b_on_the_papers_gpus(case: Case) -> None:
    check(case)
