"""Every option of the step gives the curve that one process gives without it: four ranks, one launch, many cases.

The curve is the losses and gradient norms of LAMB steps: two of the fast cases, so that it sees an update of every
weight and what is left of one step in the next; three of the slow ones.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.phases import first_phase
from engine.config.read import Config, ParallelConfig, check_layout, resolve
from engine.parallel.device import Device, prepare
from engine.parallel.launch import job
from engine.parallel.mesh import Mesh, build_mesh
from engine.pipeline.clock import Phases, write_spans
from engine.trainer import Trainer
from tests.distributed import MANY_CASES_S, run_distributed, world
from tests.gather import contrastive_step
from tests.golden import FOLDER, local_batch
from tools.timeline.__main__ import main as draw_timeline

pytestmark = pytest.mark.dist

RANKS, STEPS, FAST_STEPS, BATCH = 4, 3, 2, 16
TOLERANCE = 1e-5
COMMON = (
    f"train.global_batch_size={BATCH}",
    f"train.steps={STEPS}",
    "train.patch_dropout=0.5",
    "model.text.depth=2",
    "optim.lr_vision=0.005",
    "optim.lr_text=0.005",
    "optim.lr_other=0.005",
    "optim.warmup_steps=1",
    # Gradients that are zero but for rounding must not become whole steps: they would hide the comparison in noise.
    "optim.eps=1e-4",
)
_FILE = FOLDER / "tiny-18b" / "weights.safetensors"
TEACHER = f"{{path: {_FILE}, model: tiny-18b, relational: 1}}"
SMALL_TEACHER = f"{{path: {_FILE}, model: tiny-18b, feature: 0, interactive: 0, relational: 0.5, logit_scale: 20}}"
MODELS: dict[str, tuple[str, ...]] = {
    "18b": ("model.preset=tiny-18b", "train.logit_scale=20"),
    "18b-deep": ("model.preset=tiny-18b", "train.logit_scale=20", "model.vision.depth=8"),
    "18b-learned-scale": ("model.preset=tiny-18b", "train.logit_scale=null"),
    "18b-sigmoid": (
        "model.preset=tiny-18b",
        "train.logit_scale=null",
        "train.loss=sigmoid",
        "train.matryoshka=[8,20,32]",
        "train.mask_false_negatives=captions",
    ),
    "distilled": ("model.preset=tiny-18b", "train.logit_scale=null", f"train.distill=[{TEACHER}]"),
    "distilled-sigmoid": (
        "model.preset=tiny-18b",
        "train.logit_scale=null",
        "train.loss=sigmoid",
        "train.matryoshka=[20,32]",
        "train.mask_false_negatives=captions",
        f"train.distill=[{TEACHER}, {SMALL_TEACHER}]",
    ),
    "eva-02": ("model.preset=tiny-b16", "train.logit_scale=20", "model.vision.width=64"),
    "locked-vision": (
        "model.preset=tiny-18b",
        "train.logit_scale=null",
        "train.freeze=[vision.*]",
        "optim.lr_text=0.02",
    ),
    "locked-text": ("model.preset=tiny-18b", "train.logit_scale=20", "train.freeze=[text.*]"),
    # The image tower from within the second of four stages on, the caption tower from its last block on.
    "upper-blocks": (
        "model.preset=tiny-18b",
        "train.logit_scale=20",
        "model.vision.depth=8",
        "train.freeze=[vision.embed.*,vision.blocks.0-2.*,text.token_embedding,text.pos_embed,text.blocks.0.*]",
    ),
    "heads": (
        "model.preset=tiny-18b",
        "train.logit_scale=20",
        "train.freeze=[vision.embed.*,vision.blocks.*,text.token_embedding,text.pos_embed,text.blocks.*]",
    ),
    # Islands: a frozen block and frozen matrices between what is trained.
    "islands": (
        "model.preset=tiny-18b",
        "train.logit_scale=null",
        "train.freeze=[vision.blocks.2.*,*.attn.qkv.weight,*.mlp.fc2.weight,logit_scale.*]",
    ),
}
"""What changes the mathematics: case and reference share it."""
BUDGET_GB = 0.0006
"""A few micro-batches of one stage of tiny-18b."""
OUTPUTS_BUDGET_GB = 0.0001
"""Some of the products of such a stage."""


TP2_PP2, PP2_DP2, PP4, DP4 = (2, 2), (1, 2), (1, 4), (1, 1)
MICRO_BATCHES = 4
"""Of a replica, at every layout with a pipeline."""


@dataclass(frozen=True)
class Case:
    """A model at a layout with options that must not be seen in the curve."""

    name: str
    layout: tuple[int, int]
    """TP, PP; DP is what is left of the ranks."""
    options: tuple[str, ...] = ()
    model: str = "18b"

    def config(self) -> Config:
        """The job."""
        tensor, pipeline = self.layout
        layout = (f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}")
        return _config(self.model, *layout, f"train.micro_batch_size={self.micro_batch}", *self.options)

    @property
    def micro_batch(self) -> int:
        """Images of one pass."""
        return BATCH // MICRO_BATCHES if self.layout in (TP2_PP2, PP4) else BATCH // (2 * MICRO_BATCHES)


def _config(model: str, *options: str) -> Config:
    return resolve({"data": {"shards": ["-"]}}, [*COMMON, *MODELS[model], *options])


def _train(**values: Any) -> tuple[str, ...]:
    return tuple(f"train.{name}={value}" for name, value in values.items())


def _parallel(**values: Any) -> tuple[str, ...]:
    return tuple(f"parallel.{name}={value}" for name, value in values.items())


KEPT = [Case(f"keep-{k}-tp2-pp2", TP2_PP2, _train(keep_activations=k)) for k in (0, 1, -1)]
OUTPUTS = [
    *(Case(f"outputs-{level}", TP2_PP2, _train(keep_outputs=level)) for level in ("fc2", "fc2+proj+qkv")),
    Case("outputs-offload-keep-1", TP2_PP2, _train(keep_outputs="all", offload_outputs=True, keep_activations=2)),
    Case("outputs-budget", TP2_PP2, _train(outputs_budget_gb=OUTPUTS_BUDGET_GB)),
    Case("outputs-full", TP2_PP2, _train(keep_outputs="all", recompute="full", keep_activations=-1)),
    Case("outputs-selective", TP2_PP2, _train(keep_outputs="fc2+proj", recompute="selective")),
]
_FUSED = ("model.block_kernels=fused",)
FUSED = [
    Case("fused-tp2-pp2", TP2_PP2, _FUSED),
    Case("fused-no-sp-selective", TP2_PP2, _FUSED + _train(recompute="selective") + _parallel(sequence=False)),
    Case("fused-virtual-full", PP2_DP2, _FUSED + _train(recompute="full", keep_activations=1) + _parallel(virtual=2)),
    Case("fused-kept-dp4", DP4, _FUSED + _train(keep_activations=-1) + _parallel(bucket_size=5000)),
    Case("fused-outputs-pp4", PP4, _FUSED + _train(keep_outputs="all", offload_outputs=True)),
    Case("fused-outputs-eva-02-tp2", TP2_PP2, _FUSED + _train(keep_outputs="all"), model="eva-02"),
    Case("fused-eva-02", PP2_DP2, _FUSED, model="eva-02"),
]
"""Kernels that torch.compile writes; here their functions run as they are written."""
BUDGET = Case("budget-no-overlap", PP2_DP2, _train(activation_budget_gb=BUDGET_GB) + _parallel(overlap=False))
TRACED = Case("offload-virtual-keep-1", PP2_DP2, _train(offload_stash=True, keep_activations=1) + _parallel(virtual=2))
SELECTIVE = Case(
    "selective-text-in-uneven-parts-kept",
    PP2_DP2,
    _train(recompute="selective", text_micro_batch_size=3, keep_activations=-1),
)
FULL = Case("full", PP2_DP2, _train(recompute="full"))
MEASURED = (BUDGET, SELECTIVE, FULL)
CASES = [
    *KEPT,
    *OUTPUTS,
    *FUSED,
    *MEASURED,
    TRACED,
    Case("keep-2-pp4", PP4, _train(keep_activations=2)),
    Case("keep-all-dp4", DP4, _train(keep_activations=-1)),
    Case("budget-nothing-fits", TP2_PP2, _train(activation_budget_gb=0)),
    Case("selective", TP2_PP2, _train(recompute="selective")),
    Case("full-keep-1", TP2_PP2, _train(recompute="full", keep_activations=1)),
    Case("offload-tp2-pp2", TP2_PP2, _train(offload_stash=True)),
    Case("virtual-pp2", PP2_DP2, _parallel(virtual=2)),
    Case("text-one-by-one", PP2_DP2, _train(text_micro_batch_size=1)),
    Case("virtual-tp2-pp2-keep-3", TP2_PP2, _parallel(virtual=2) + _train(keep_activations=3)),
    Case("virtual-pp4", PP4, _parallel(virtual=2), model="18b-deep"),
    Case("virtual-pp2-4-chunks-full", PP2_DP2, _parallel(virtual=4) + _train(recompute="full"), model="18b-deep"),
    Case("uneven-pp2", PP2_DP2, _parallel(layers=[1, 3])),
    Case("uneven-pp4", PP4, _parallel(layers=[1, 3, 2, 2]), model="18b-deep"),
    Case("uneven-virtual-pp2", PP2_DP2, _parallel(layers=[1, 2, 4, 1], virtual=2), model="18b-deep"),
    Case("small-buckets-dp4", DP4, _parallel(bucket_size=5000)),
    Case("small-buckets-virtual", PP2_DP2, _parallel(bucket_size=5000, virtual=2) + _train(keep_activations=1)),
    Case("small-buckets-no-overlap", DP4, _parallel(bucket_size=5000, overlap=False)),
    Case("outputs-captions-in-parts", PP2_DP2, _train(keep_outputs="all", text_micro_batch_size=1)),
    Case("outputs-no-sp", TP2_PP2, _train(keep_outputs="all") + _parallel(sequence=False)),
    Case("outputs-virtual", PP2_DP2, _train(keep_outputs="all", offload_outputs=True) + _parallel(virtual=2)),
    Case("outputs-eva-02-tp2", TP2_PP2, _train(keep_outputs="all"), model="eva-02"),
    Case("ring-dp4", DP4, _train(loss_variant="ring") + _parallel(bucket_size=5000)),
    Case("ring-tp2-pp2-tiles", TP2_PP2, _train(loss_variant="ring", loss_tile=3)),
    Case("learned-scale", PP2_DP2, model="18b-learned-scale"),
    Case("learned-scale-ring", TP2_PP2, _train(loss_variant="ring"), model="18b-learned-scale"),
    Case("sigmoid", PP2_DP2, model="18b-sigmoid"),
    Case("sigmoid-ring-virtual", TP2_PP2, _train(loss_variant="ring") + _parallel(virtual=2), model="18b-sigmoid"),
    Case("distilled", TP2_PP2, _train(loss_tile=3), model="distilled"),
    Case("distilled-shared", PP2_DP2, _train(loss_variant="ring") + _parallel(shard="weights"), model="distilled"),
    Case("distilled-sigmoid", TP2_PP2, _train(keep_activations=1) + _parallel(virtual=2), model="distilled-sigmoid"),
    Case("locked-vision-tp2-pp2", TP2_PP2, model="locked-vision"),
    Case("locked-vision-kept", PP2_DP2, _train(keep_activations=-1) + _parallel(virtual=2), model="locked-vision"),
    Case("locked-text-pp4-offload", PP4, _train(offload_stash=True, keep_outputs="all"), model="locked-text"),
    Case("upper-blocks-pp4", PP4, _train(keep_outputs="all", offload_stash=True), model="upper-blocks"),
    Case("upper-blocks-tp2-pp2-full", TP2_PP2, _train(recompute="full", keep_activations=1), model="upper-blocks"),
    Case("upper-blocks-virtual", PP2_DP2, _parallel(virtual=2, bucket_size=5000), model="upper-blocks"),
    Case(
        "upper-blocks-budgets",
        DP4,
        _train(activation_budget_gb=BUDGET_GB, outputs_budget_gb=OUTPUTS_BUDGET_GB),
        model="upper-blocks",
    ),
    Case("heads-tp2-pp2", TP2_PP2, model="heads"),
    Case("heads-dp4-full", DP4, _train(recompute="full", text_micro_batch_size=1), model="heads"),
    Case("islands-tp2-pp2", TP2_PP2, _train(keep_outputs="fc2+proj+qkv"), model="islands"),
    Case("islands-fused-no-sp", TP2_PP2, (*_FUSED, *_parallel(sequence=False)), model="islands"),
    Case("eva-02-virtual", PP2_DP2, _parallel(virtual=2), model="eva-02"),
    Case("eva-02-virtual-tp2-keep-1", TP2_PP2, _parallel(virtual=2) + _train(keep_activations=1), model="eva-02"),
]
SLOW = {
    "outputs-fc2", "outputs-full", "outputs-no-sp", "fused-tp2-pp2", "fused-kept-dp4", "fused-eva-02",
    "keep-2-pp4", "keep-all-dp4", "selective", "budget-nothing-fits", "offload-tp2-pp2", "text-one-by-one",
    "uneven-pp2", "virtual-tp2-pp2-keep-3", "virtual-pp4", "learned-scale", "virtual-pp2-4-chunks-full",
    "locked-vision-kept", "upper-blocks-virtual", "upper-blocks-budgets", "heads-dp4-full", "islands-fused-no-sp",
    "small-buckets-virtual", "small-buckets-no-overlap", "ring-tp2-pp2-tiles", "sigmoid", "eva-02-virtual",
    "distilled-shared", "distilled-sigmoid", "upper-blocks-tp2-pp2-full", "eva-02-virtual-tp2-keep-1",
    "outputs-eva-02-tp2", "outputs-selective", "full-keep-1", "uneven-virtual-pp2", "locked-text-pp4-offload",
    "keep-1-tp2-pp2", "outputs-fc2+proj+qkv", "fused-virtual-full", "small-buckets-dp4", "outputs-captions-in-parts",
    "outputs-virtual", "learned-scale-ring", "heads-tp2-pp2", "virtual-pp2", "fused-outputs-pp4",
}  # fmt: skip
"""Pairs of options that the slow tests add; each option is in a fast case, too."""


# --- what the ranks do ------------------------------------------------------------------------------------------------


def _curve(
    config: Config, mesh: Mesh, device: Device, *, steps: int = STEPS, spans_to: str = "", measure: bool = False
) -> dict[str, Any]:
    """Losses and gradient norms of the first `steps`; with spans_to, the last one's spans are written below it."""
    trainer = Trainer(first_phase(config), mesh, device)
    losses, norms, frozen = [], [], [buffer.param_data for part in trainer.towers.parts for buffer in part.frozen]
    before = [flat.clone() for flat in frozen]
    for step in range(steps):
        phases = Phases(record_spans=bool(spans_to) and step == steps - 1)
        if phases.record_spans:  # elsewhere nobody waits for the new weights but who reads them
            trainer.meet()
        zero_s = phases.clock()
        outcome = trainer.step(local_batch(*_pairs(config, step), mesh), phases)
        losses.append(float(outcome.loss))
        norms.append(float(outcome.gradient_norm))
        if phases.record_spans:
            place = {"tensor": mesh.tensor.rank, "pipeline": mesh.pipeline.rank, "data": mesh.data.rank}
            write_spans(Path(spans_to), mesh.world.rank, place, step, zero_s, phases)
    assert all(map(torch.equal, frozen, before)), "what is frozen has changed"
    training = contrastive_step(trainer)
    bytes_each = training.activations.micro_batch_bytes() if measure else 0
    return {
        "losses": losses,
        "norms": norms,
        "keep": training.keep,
        "activation_bytes": bytes_each,
        "caption_bytes": training.activations.caption_bytes() if measure else 0,
    }


def _pairs(config: Config, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [B, 3, h, w] and captions of all lengths, int64 [B, context]; the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    side, text = config.model.vision.image_size, config.model.text
    images = torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8, generator=generator)
    end = text.vocab_size - 1
    tokens = torch.randint(1, end, (BATCH, text.context_length), generator=generator)
    ends = torch.randint(2, text.context_length, (BATCH, 1), generator=generator)
    place = torch.arange(text.context_length)
    return images, tokens.masked_fill(place == ends, end).masked_fill(place > ends, 0)


def _all_cases(folder: str = "", slow: bool = False) -> dict[str, Any]:
    torch.compiler.set_stance("force_eager")
    device = prepare()
    mesh = cache(lambda tensor, pipeline: build_mesh(tensor, pipeline, world()))
    out = {}
    for case in CASES:
        if case is not KEPT[0] and (case.name in SLOW) != slow:
            continue
        config = case.config()
        check_layout(config, RANKS)
        out[case.name] = _curve(
            config,
            mesh(*case.layout),
            device,
            steps=STEPS if slow else FAST_STEPS,
            spans_to=folder if case is TRACED else "",
            measure=case in MEASURED,
        )
    return out


# --- what is true of them ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the traced case leaves its spans."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def ranks(run_dir: Path) -> list[dict[str, Any]]:
    """What each of the four ranks returned, by case."""
    return run_distributed(_all_cases, RANKS, timeout_s=MANY_CASES_S, folder=str(run_dir))


@pytest.fixture(scope="module")
def slow_ranks() -> list[dict[str, Any]]:
    """The same of the slow cases and of the plain one."""
    return run_distributed(_all_cases, RANKS, timeout_s=MANY_CASES_S, slow=True)


References = Callable[[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def references() -> Iterator[References]:
    """The curve of one process of a model, so many steps: the whole batch at once, nothing cut, nothing overlapped."""
    with job(ParallelConfig()) as (mesh, device):
        whole = f"train.micro_batch_size={BATCH}"
        yield cache(lambda model, steps: _curve(_config(model, whole), mesh, device, steps=steps))


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fast", "slow"])
def test_the_references_learn_something(slow: bool, references: References) -> None:
    for model in {case.model for case in CASES if (case.name in SLOW) == slow}:
        losses = references(model, STEPS if slow else FAST_STEPS)["losses"]
        least = 50 if model == "heads" else 1e3  # projections alone do not move far
        for before, after in pairwise(losses):
            assert abs(after - before) > least * TOLERANCE * before, f"{model}: {losses} hardly moves"


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in SLOW], ids=lambda case: case.name)
def test_an_option_does_not_show_in_the_curve(case: Case, ranks: list[dict[str, Any]], references: References) -> None:
    reference = references(case.model, len(ranks[0][case.name]["losses"]))
    for rank, results in enumerate(ranks):
        for what in ("losses", "norms"):
            found = results[case.name][what]
            assert found == pytest.approx(reference[what], rel=TOLERANCE), f"rank {rank}: {what}"


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.name in SLOW], ids=lambda case: case.name)
def test_a_pair_of_options_does_not_show_in_the_curve(
    case: Case, slow_ranks: list[dict[str, Any]], references: References
) -> None:
    test_an_option_does_not_show_in_the_curve(case, slow_ranks, references)


def test_kept_activations_change_no_bit(ranks: list[dict[str, Any]]) -> None:
    stash, *kept = [ranks[0][case.name]["losses"] for case in KEPT if case.name in ranks[0]]
    assert kept == [stash]


@pytest.mark.slow
def test_some_kept_activations_change_no_bit(slow_ranks: list[dict[str, Any]]) -> None:
    test_kept_activations_change_no_bit(slow_ranks)


def test_kept_outputs_change_no_bit(ranks: list[dict[str, Any]]) -> None:
    repeated = ranks[0][KEPT[0].name]["losses"]
    kept = [ranks[0][case.name]["losses"] for case in OUTPUTS if case.name in ranks[0]]
    assert kept == [repeated] * len(kept) and len(kept) >= 2


@pytest.mark.slow
def test_more_kept_outputs_change_no_bit(slow_ranks: list[dict[str, Any]]) -> None:
    test_kept_outputs_change_no_bit(slow_ranks)


def test_a_budget_keeps_what_fits(ranks: list[dict[str, Any]]) -> None:
    keeps = []
    for results in ranks:
        one, captions, keep = (results[BUDGET.name][key] for key in ("activation_bytes", "caption_bytes", "keep"))
        fit = min(MICRO_BATCHES, math.floor(BUDGET_GB * 1e9 / one))
        # Where all micro-batches keep their activations, the captions do, too.
        one_less = fit == MICRO_BATCHES and fit * one + captions > BUDGET_GB * 1e9
        assert keep == fit - one_less
        keeps.append(keep)
    assert 0 < min(keeps) < MICRO_BATCHES, f"the budget of this test no longer divides a replica's work: {keeps}"


def test_recompute_keeps_less(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        plain, selective, full = (results[case.name]["activation_bytes"] for case in MEASURED)
        assert selective < plain
        assert full < plain / 4


def test_the_spans_of_a_run_are_drawn(ranks: list[dict[str, Any]], run_dir: Path) -> None:
    png, trace = run_dir / "timeline.png", run_dir / "trace.json"
    assert draw_timeline([str(run_dir), "--png", str(png), "--trace", str(trace)]) == 0
    assert png.stat().st_size > 10_000
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    units = {(e["tid"], e["args"]["micro_batch"], e["args"]["chunk"]) for e in events if e["name"] == "backward"}
    assert len(units) == RANKS * 2 * MICRO_BATCHES
