"""The dry run of small jobs: FLOPs by formula, repetitions against running everything, refusals, full size."""

import json
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config.read import Config, load_config, resolve
from engine.config.stages import stage_layers
from models.tensors.flops import block_flops, last_block_flops
from models.tensors.kept import kept_elements, spared_flops
from tools.cost import counts
from tools.cost.activations import text_saved_bytes
from tools.cost.kernels import Kernels
from tools.cost.layout import layout_of, stages_of
from tools.cost.traffic import step_traffic
from tools.dryrun import __main__ as dryrun
from tools.dryrun.absent import Shapes
from tools.dryrun.flops import flops
from tools.dryrun.memory import ELSEWHERE, MemoryTracker
from tools.dryrun.rank import RankReport, dry_run
from tools.dryrun.report import flops_by_part, to_dict, to_text, traffic_table

SMALL = (
    "model.preset=tiny-18b",
    "model.vision.depth=2",
    "model.text.depth=2",
    "train.patch_dropout=0.5",
    "train.micro_batch_size=4",
    "train.global_batch_size=32",
    "train.loss_tile=8",
)


DEEP = "model.vision.depth=4"
"""For four chunks."""


def small(*options: str) -> Config:
    """A job of one replica of 32 samples in 8 micro-batches, or as the options say."""
    return resolve({"data": {"shards": ["-"]}}, [*SMALL, *options])


@cache
def run_small(options: tuple[str, ...], ranks: int, rank: int) -> RankReport:
    """The dry run of a small job, once for all tests that look at it."""
    return dry_run(small(*options), ranks, rank)


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def vision_flops(config: Config, stage: int) -> tuple[int, int]:
    """(forward of one image on this rank, the part of it whose input needs no gradient), from the planner's formulas.

    More than the planner counts: the class token's row of zeros goes through the patch projection, too; and every
    tensor rank projects the features.
    """
    model, parallel = config.model, config.parallel
    vision, tensor, stages = model.vision, parallel.tensor, parallel.pipeline
    tokens = vision.kept_tokens(config.train.patch_dropout)
    row = 2 * 3 * vision.patch_size**2 * vision.width
    layers = len(stage_layers(vision.depth, stages)[stage])
    embed = tokens * row // (tensor if parallel.sequence else 1) if stage == 0 else 0
    if stage < stages - 1:
        return layers * block_flops(vision, tokens) // tensor + embed, embed
    blocks = (layers - 1) * block_flops(vision, tokens) + last_block_flops(vision, tokens)
    return blocks // tensor + embed + 2 * vision.width * model.embed_dim, embed


def loss_flops(width: int, rows: int, batch: int) -> int:
    """Products of the tiled loss when the logits of the own images are kept: a forward and a backward product for the
    own images x all texts, the own block's share of the text gradient, and all other images x own texts.
    """
    return 2 * width * (2 * rows * batch + rows * rows + 2 * rows * (batch - rows))


@pytest.mark.parametrize(
    ("ranks", "rank", "options"),
    [
        (1, 0, ()),
        pytest.param(1, 0, ("train.keep_activations=3",), marks=pytest.mark.slow),
        pytest.param(4, 1, ("parallel.tensor=2", "train.matryoshka=[8,16,32]"), marks=pytest.mark.slow),
        (4, 3, ("parallel.tensor=2", "parallel.sequence=false", "train.matryoshka=[8,16,32]")),
        (6, 5, ("parallel.pipeline=3", "train.global_batch_size=24", "model.vision.depth=3")),
        (4, 0, ("parallel.pipeline=2", "parallel.tensor=2", "train.text_micro_batch_size=3")),
        pytest.param(2, 0, ("parallel.pipeline=2", "train.keep_outputs=fc2"), marks=pytest.mark.slow),
        (4, 3, ("parallel.pipeline=2", "parallel.tensor=2", "train.keep_outputs=fc2+proj+qkv")),
        (1, 0, ("train.keep_outputs=all", "train.keep_activations=3", "train.offload_outputs=true")),
    ],
)
def test_flops_are_those_of_the_planner(ranks: int, rank: int, options: tuple[str, ...]) -> None:
    config, report = small(*options), run_small(options, ranks, rank)
    replica = config.parallel.tensor * config.parallel.pipeline
    local = config.train.global_batch_size * replica // ranks
    captions = local // replica
    forward, embed = vision_flops(config, report.stage)
    replayed = local - report.keep * config.train.micro_batch_size
    vision, text, level = config.model.vision, config.model.text, config.train.keep_outputs
    widths = config.train.matryoshka or [config.model.embed_dim]
    spared = spared_flops(
        vision,
        level,
        blocks=sum(map(len, report.blocks)),
        tokens=vision.kept_tokens(config.train.patch_dropout),
        pooled=1 if report.stage == config.parallel.pipeline - 1 else None,
        tensor=config.parallel.tensor,
    )
    of_captions = spared_flops(text, level, blocks=text.depth, tokens=text.context_length, pooled=1)
    assert flops_by_part(report) == {
        "encode": local * forward,
        "replay": replayed * (forward - spared),
        "backward": local * (2 * forward - embed),
        "text": captions * (4 * counts.text_executed_flops(config.model) - of_captions),
        "loss": loss_flops(sum(widths), captions, config.train.global_batch_size),
        "other": 0,
        "teacher": 0,
    }


def test_a_product_without_a_formula_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match=r"aten\.convolution"):
        flops(torch.ops.aten.convolution.default, ())


INNER = (DEEP, "parallel.pipeline=4", "train.text_micro_batch_size=2")
"""A stage of whole blocks at rank 1 of 4."""


def keeping(level: str) -> tuple[str, ...]:
    """Options of an inner stage that keeps outputs."""
    return INNER if level == "none" else (*INNER, f"train.keep_outputs={level}")


def test_nine_fourteenths_of_the_products_are_repeated_with_fc2_kept_and_none_with_all() -> None:
    def products(level: str) -> tuple[int, int]:
        """Of encode and replay; attention multiplies nothing that could be kept."""
        vision, phases = small(DEEP).model.vision, run_small(keeping(level), 4, 1).phases
        attention = 32 * vision.depth // 4 * 4 * vision.width * vision.kept_tokens(0.5) ** 2
        return phases["encode"].flops - attention, phases["replay"].flops - attention

    once, again = products("none")
    assert again == once
    once, again = products("fc2")
    assert again == once * 9 // 14
    assert products("all") == (once, 0)


def test_kept_outputs_are_in_the_memory_or_on_the_host() -> None:
    all_kept = keeping("all")
    plain, kept, host = (
        run_small(options, 4, 1).peaks["loss"]
        for options in (INNER, all_kept, (*all_kept, "train.offload_outputs=true"))
    )
    config = small(*INNER)
    vision, text = config.model.vision, config.model.text
    expected = 4 * (
        kept_elements(vision, "all", blocks=1, tokens=32 * vision.kept_tokens(0.5), pooled=None)
        + kept_elements(text, "all", blocks=text.depth, tokens=8 * text.context_length, pooled=8)
    )
    assert kept.total - plain.total == pytest.approx(expected, rel=0.02)
    assert host.total == pytest.approx(plain.total, rel=0.01)


def test_sharded_parts_are_in_the_memory_during_their_turn() -> None:
    options = (DEEP, "parallel.virtual=4", "train.micro_batch_size=2", "parallel.bucket_size=1000000")
    whole, gradients, weights = (
        run_small((*options, *more), 4, 1) for more in ((), ("parallel.shard=gradients",), ("parallel.shard=weights",))
    )
    slices = whole.peaks["optimizer"].parts["weights"] / 4
    for report, parts in ((gradients, ("gradients",)), (weights, ("weights", "gradients"))):
        for part in parts:
            assert report.peaks["optimizer"].parts[part] == pytest.approx(slices, rel=0.05)
            # One chunk and the one behind or ahead of it; the first chunk has the patch embedding, too.
            assert report.peaks["backward"].parts[part] <= slices * (1 + 4 * 0.6)
    assert weights.peak.total < gradients.peak.total < whole.peak.total


# --- traffic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), marks=pytest.mark.slow, id="one"),
        pytest.param(
            ("train.loss=sigmoid", "train.matryoshka=[8,16,32]", "parallel.reduce_dtype=bf16"), id="nested-bf16"
        ),
        pytest.param(
            ("train.loss=sigmoid", "train.matryoshka=[8,32]", "train.loss_variant=ring"),
            marks=pytest.mark.slow,
            id="ring",
        ),
    ],
)
def test_traffic_is_that_of_the_planner(options: tuple[str, ...]) -> None:
    # Real steps agree, too (test_dryrun_real.py), but are read by the same code. The buckets are padded, hence 5 %.
    config = small(DEEP, "parallel.tensor=2", "parallel.pipeline=2", *options)
    report = dry_run(config, 8, 7)
    layout = layout_of(config, 8)
    expected: dict[tuple[str, str], float] = defaultdict(float)
    for entry in step_traffic(config.model, layout, stages_of(config.model, layout)[1]):
        if entry.what != "data":  # the feed is not run
            expected[entry.axis, entry.kind] += entry.sent_bytes
    counted = {(row["axis"], row["kind"]): row["sent_bytes"] for row in traffic_table(report)}
    received = [counted.pop(key) for key in list(counted) if key[1] == "receive"]
    assert received and not any(received)
    assert counted == pytest.approx(dict(expected), rel=0.05)


# --- repetitions ------------------------------------------------------------------------------------------------------


def _split(report: RankReport) -> tuple[dict[str, Any], dict[str, int]]:
    """What two dry runs of the same rank must agree on to the unit, and the memory of the phases.

    Which is exact, too, but for a few index tensors that megatron-core's recomputation leaves to the garbage collector.
    """
    numbers = to_dict(report)
    varies = ("seconds", "micro_batches_run", "peak_bytes", "peak_bytes_by_category", "peak_bytes_by_phase")
    exact = {name: value for name, value in numbers.items() if name not in varies}
    return exact, {**numbers["peak_bytes_by_phase"], "step": numbers["peak_bytes"]}


@pytest.mark.parametrize(
    ("ranks", "rank", "options"),
    [
        (1, 0, ("train.keep_activations=2", "train.precision=bf16")),
        pytest.param(
            2,
            0,
            (DEEP, "parallel.pipeline=2", "parallel.virtual=2", "train.keep_activations=-1"),
            marks=pytest.mark.slow,
        ),
        pytest.param(1, 0, (), marks=pytest.mark.slow),
        pytest.param(
            2,
            1,
            ("parallel.pipeline=2", "train.keep_activations=1", "train.micro_batch_size=2"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4, 2, ("parallel.tensor=2", "train.recompute=full", "train.micro_batch_size=2"), marks=pytest.mark.slow
        ),
    ],
)
def test_repeated_micro_batches_count_as_if_they_had_run(ranks: int, rank: int, options: tuple[str, ...]) -> None:
    config = small(*options)
    repeated, run = (dry_run(config, ranks, rank, every_micro_batch=every) for every in (False, True))
    assert repeated.micro_batches_run < run.micro_batches_run == run.micro_batches
    (exact, memory), (exact_of_run, memory_of_run) = _split(repeated), _split(run)
    assert exact == exact_of_run
    assert memory == pytest.approx(memory_of_run, rel=5e-4)


def test_memory_grows_by_a_stage_input_with_each_micro_batch() -> None:
    # Batch and text grow with the micro-batches, too: the stash is the part that must be on the line.
    stash = []
    for options in (("train.global_batch_size=24",), ()):
        report = run_small(("parallel.pipeline=2", *options), 2, 1)
        stash.append(report.peaks["replay"].parts["stash"])
    message = 4 * 9 * 64 * 4  # micro-batch x tokens x width x fp32
    assert stash == [n * message for n in (6, 8)]


def test_a_budget_of_memory_keeps_as_many_micro_batches_as_fit() -> None:
    each = run_small((), 1, 0).activation_bytes
    report = dry_run(small(f"train.activation_budget_gb={2.5 * each / 1e9}"), 1, 0)
    assert report.keep == 2
    assert report.peaks["encode"].parts["activations"] >= 2 * each


def test_a_budget_counts_the_captions_where_all_micro_batches_are_kept() -> None:
    images = 8 * run_small((), 1, 0).activation_bytes
    captions = text_saved_bytes(small().model, 32, element=4, kernels=Kernels())
    for budget, keep in ((images + 0.9 * captions, 7), (images + 1.1 * captions, 8)):
        assert dry_run(small(f"train.activation_budget_gb={budget / 1e9}"), 1, 0).keep == keep


def test_an_offloaded_stash_is_not_on_the_device() -> None:
    stage = ("parallel.pipeline=2",)
    on_device, on_host = (run_small((*stage, *more), 2, 1) for more in ((), ("train.offload_stash=true",)))
    message = 4 * 9 * 64 * 4
    assert on_device.peaks["loss"].parts["stash"] == 8 * message
    assert on_host.peaks["loss"].parts["stash"] == 0


# --- fake tensors -----------------------------------------------------------------------------------------------------


class _Asked(TorchDispatchMode):
    """Counts the operators that come through."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _looks(result: Any, taken: list[torch.Tensor]) -> list[Any]:
    """All that a dry run may see of a result: container, shapes, and whose elements it shows."""
    parts = result if isinstance(result, tuple | list) else [result]
    storages = [tensor.untyped_storage()._cdata for tensor in taken]
    shown = [
        (part.shape, part.stride(), part.storage_offset(), part.dtype, part.device, part.requires_grad)
        for part in parts
    ]
    shares = [[part.untyped_storage()._cdata == storage for storage in storages] for part in parts]
    return [type(result), *shown, *shares]


def test_what_an_operator_gives_is_remembered_as_it_was() -> None:
    aten = torch.ops.aten
    with FakeTensorMode() as fake:
        shapes, x, y, ids = Shapes(fake), torch.empty(4, 6), torch.empty(6, 3), torch.empty(4, dtype=torch.int64)
        later, across = torch.empty(5, 6)[1:], torch.empty(6, 4).t()  # of the shape of x
        cases: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
            (aten.mm.default, (x, y), {}),
            (aten.t.default, (x,), {}),
            (aten.slice.Tensor, (x, 1, 2, 5), {}),
            (aten.slice.Tensor, (later, 1, 2, 5), {}),
            (aten.slice.Tensor, (across, 1, 2, 5), {}),
            (aten.split.Tensor, (x, 2, 1), {}),
            (aten._unsafe_view.default, (x, [8, 3]), {}),
            (aten.native_layer_norm.default, (x, [6], None, None, 1e-6), {}),
            (aten.mul.Tensor, (ids, 1), {}),
            (aten.mul.Tensor, (ids, 1.0), {}),
            (aten.mul.Tensor, (ids, True), {}),
            (aten.cat.default, ([x, x],), {}),
            (aten._to_copy.default, (x,), {"dtype": torch.bfloat16}),
            (aten.empty.memory_format, ([2, 3],), {"device": torch.device("cpu")}),
        ]
        for func, args, kwargs in cases:
            wanted = _looks(func(*args, **kwargs), [x, y, later])
            for _ in range(2):
                with _Asked() as asked:
                    assert _looks(shapes(func, args, kwargs), [x, y, later]) == wanted, func
            assert asked.count == 0, func


def test_what_returns_its_argument_or_has_a_value_is_asked_each_time() -> None:
    with FakeTensorMode() as fake:
        shapes, x, three, unknown = Shapes(fake), torch.empty(4), torch.tensor(3), torch.empty((), dtype=torch.int64)
        for _ in range(2):
            assert shapes(torch.ops.aten.mul.Tensor, (unknown, 2), {}).constant is None
            doubled = shapes(torch.ops.aten.mul.Tensor, (three, 2), {})
            assert shapes(torch.ops.aten._local_scalar_dense.default, (doubled,), {}) == 6
            assert shapes(torch.ops.aten.transpose_.default, (x.view(2, 2), 0, 1), {}).shape == (2, 2)
            assert shapes(torch.ops.aten.relu_.default, (x,), {}) is x
            assert shapes(torch.ops.aten._local_scalar_dense.default, (three,), {}) == 3


# --- the tracker ------------------------------------------------------------------------------------------------------


def test_storages_count_once_from_first_sight_to_release() -> None:
    memory = MemoryTracker()
    memory.enter("encode", "activations")
    first = torch.zeros(1000)
    memory.see(first)
    memory.see(first[10:])
    with memory.booked_as(ELSEWHERE):
        memory.see(torch.zeros(5000))
    memory.enter("loss", "loss")
    second = torch.zeros(1, 128)
    memory.see(second)
    del first
    assert +memory.live.parts == {"loss": 512}
    assert memory.live.total == 512
    assert +memory.peaks["loss"].parts == {"activations": 4096, "loss": 512}
    memory.move(second, "stash")
    assert +memory.live.parts == {"stash": 512}
    assert memory.peaks["encode"].total == 4096


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A small job's YAML."""
    file = tmp_path / "job.yaml"
    file.write_text(
        "model: {preset: tiny-18b, text: {vocab_size: 49408, depth: 1}}\ndata: {shards: '-'}\nparallel: {pipeline: 2}\n"
        "train: {global_batch_size: 32, micro_batch_size: 4}\n"
    )
    return file


def test_all_stages_and_the_json(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numbers.json"
    arguments = [str(recipe), "--world-size", "4", "--all-stages", "train.precision=bf16", "--json", str(file)]
    assert dryrun.main(arguments) == 0
    first, last = json.loads(file.read_text())
    assert (first["rank"], first["stage"], last["rank"], last["stage"]) == (0, 0, 2, 1)
    assert sum(first["peak_bytes_by_category"].values()) == first["peak_bytes"]
    shown = capsys.readouterr().out
    worst = first if first["peak_bytes"] >= last["peak_bytes"] else last
    assert f"highest peak: rank {worst['rank']} (stage {worst['stage']})" in shown
    assert {row["axis"] for row in first["traffic"]} >= {"data", "pipeline", "world"}


def test_many_chunks_are_named_by_the_first_and_the_last() -> None:
    report = run_small((DEEP, "parallel.virtual=4"), 1, 0)
    assert "stage 0 (blocks 0, 1, 2, 3)" in to_text(report)
    many = replace(report, blocks=[range(2 * i, 2 * i + 2) for i in range(24)])
    assert "stage 0 (24 chunks: blocks 0-1, 2-3 … 46-47)" in to_text(many)


def test_stages_that_do_the_same_run_once(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numbers.json"
    options = ["parallel.pipeline=4", "train.global_batch_size=36", "--all-stages", "--json", str(file)]
    assert dryrun.main([str(recipe), "--world-size", "4", *options]) == 0
    assert [number["stage"] for number in json.loads(file.read_text())] == [0, 1, 3]
    assert "stages 1 to 2 (2 of them) do the same" in capsys.readouterr().out


def test_a_phase_is_a_job_of_its_own(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numbers.json"
    phases = "{name: stills, steps: 2}, {name: clips, steps: 2, data: {frames: 2}, train: {patch_dropout: 0.0}}"
    recipe.write_text(recipe.read_text() + f"checkpoint: {{every_steps: 1}}\nphases: [{phases}]\n")
    counted = []
    for options in ([], ["--phase", "clips"]):
        assert dryrun.main([str(recipe), "--world-size", "2", *options, "--json", str(file)]) == 0
        counted.append(json.loads(file.read_text())[0]["flops"])
    assert "job.yaml, phase clips: TP 1" in capsys.readouterr().out
    assert counted[1]["encode"] > 3 * counted[0]["encode"]  # twice the frames, and 17 tokens instead of 9
    assert counted[1]["text"] == counted[0]["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", "3"], "3 ranks cannot be cut into replicas"),
        (["--world-size", "4", "--rank", "4"], "--rank 4 is not one of the 4 ranks"),
        (["--world-size", "4", "parallel.pipeline=9"], "exceeds the 4 blocks"),
        (["--world-size", "4", "model.text.vocab_size=512"], "tokenizer"),
        (["--world-size", "4", "--gpu-memory-gb", "0.001"], "more than the 0.001 GB that it may take: raise"),
        (["--world-size", "4", "--gpu", "h9000"], "--gpu h9000 is neither"),
    ],
)
def test_what_would_fail_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert dryrun.main([str(recipe), *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_stage_of_the_18b_recipe() -> None:
    recipe = Path(__file__).parents[2] / "examples" / "18b" / "2_clip.yaml"
    layout = ["parallel.tensor=2", "parallel.pipeline=12", "parallel.virtual=1"]
    config = load_config(recipe, ["train.micro_batch_size=16", *layout])
    report = dry_run(config, 360, 30 * 6)
    assert report.parameters["vision"] == pytest.approx(734.2e6, rel=1e-4)
    forward, _ = vision_flops(config, 6)
    assert flops_by_part(report)["encode"] == 7200 * forward
    kinds = {(row["axis"], row["kind"]): row for row in traffic_table(report)}
    message = 16 * 129 // 2 * 5120 * 2
    assert kinds["pipeline", "send"]["sent_bytes"] == 2 * 450 * message
    assert report.peaks["loss"].parts["stash"] == 450 * message


@pytest.mark.slow
def test_the_page_shows_what_the_command_prints() -> None:
    root = Path(__file__).parents[2]
    config = load_config(root / "examples" / "18b" / "2_clip.yaml")
    printed = to_text(dry_run(config, 360, 45)).splitlines()
    shown = (root / "docs" / "dryrun.md").read_text().split("```\n")[-2].splitlines()
    assert shown == [line for line in printed if "dry run  " not in line]
