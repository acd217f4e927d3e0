"""The planner's analytic step time against the discrete-event simulation of the same schedule, and its parts."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config.read import preset_model
from engine.objectives.contrastive.program import ContrastiveProgram
from models.config import ModelConfig
from tests.checkpoint.jobs import alone, build, job_config, release, run_steps
from tools.cost.cluster import Cluster
from tools.cost.compute import block_seconds, stage_seconds, teachers_seconds
from tools.cost.counts import text_parameters
from tools.cost.hardware import load_hardware
from tools.cost.kernels import Kernels
from tools.cost.layout import FrozenModel, Layout, layout_of, stages_of, trained_text_parameters
from tools.cost.memory import stage_parameters
from tools.cost.time import step_time, text_step, unit_time, watched_bytes
from tools.plan.estimate import estimate
from tools.simulate.events import StageCosts, durations_of, simulate

ROOT = Path(__file__).resolve().parents[3]
MODEL = preset_model("18b")
A100 = load_hardware("a100-40")
CLUSTER = Cluster(hardware=A100, gpus=96, per_node=8)
BASE = Layout(tensor=2, pipeline=12, data=4, global_batch=9600, micro_batch=50, text_micro_batch=50)
LAYOUTS = [
    BASE,
    replace(BASE, keep=10),
    replace(BASE, keep=48),
    replace(BASE, virtual=2),
    replace(BASE, virtual=4, keep=12),
    replace(BASE, recompute="full"),
    replace(BASE, tensor=8, pipeline=1, data=12, micro_batch=20),
    replace(BASE, tensor=1, pipeline=24, micro_batch=10, sequence=False),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_simulated_schedule_takes_as_long(layout: Layout) -> None:
    time = step_time(MODEL, layout, CLUSTER)
    expected = time.compute + time.tensor + time.bubble + time.text
    simulated = simulate(
        ContrastiveProgram(
            stages=layout.pipeline, micro_batches=layout.micro_batches, chunks=layout.virtual, keep=layout.keep
        ),
        durations_of(_costs(layout)),
    )
    assert simulated.step_s == pytest.approx(expected, rel=0.005)


def _costs(layout: Layout) -> list[StageCosts]:
    """Of every stage as of an inner one, as the closed form assumes."""
    stages = stages_of(MODEL, layout)
    unit = max((unit_time(MODEL, layout, stage, CLUSTER) for stage in stages), key=lambda unit: unit.f + unit.b)
    encode_text, backward_text = text_step(MODEL, layout, A100)
    chunks = layout.virtual
    forward, backward = (unit.f / chunks,) * chunks, (unit.b / chunks,) * chunks
    costs = StageCosts(
        forward_s=forward,
        backward_s=backward,
        encode_text_s=encode_text,
        backward_text_s=backward_text,
        caption_parts=layout.caption_parts,
    )
    return [costs] * layout.pipeline


def test_mfu_counts_three_forwards_and_hfu_what_runs() -> None:
    none, every = estimate(MODEL, BASE, CLUSTER), estimate(MODEL, replace(BASE, keep=48), CLUSTER)
    read = 0.9836  # share of the model's FLOPs that anybody reads (models/blocks/last_block.py)
    assert none.hfu / none.mfu == pytest.approx(read * 4 / 3, rel=1e-4)
    assert every.hfu / every.mfu == pytest.approx(read, rel=1e-4) and every.mfu > none.mfu
    again = estimate(MODEL, replace(BASE, recompute="full"), CLUSTER)
    assert again.hfu / again.mfu == pytest.approx(read * 5 / 3, rel=0.01)  # captions are not computed a fifth time


def test_a_block_is_never_faster_than_its_products_allow() -> None:
    whole = block_seconds(MODEL.vision, 48, 129, A100, element=2, kernels=Kernels())
    forward, backward = whole.forward, whole.backward
    products = 2 * 48 * 129 * 14 * 5120**2 / (A100.bf16_flops * A100.gemm_limit)
    assert products < forward < 2 * products and 1.8 * forward < backward < 2 * forward
    halves = [
        block_seconds(MODEL.vision, 48, 129, A100, element=2, tensor=2, splits_tokens=s, kernels=Kernels()).forward
        for s in (True, False)
    ]
    assert forward / 2 < halves[0] < halves[1] < forward


def test_products_in_fp32_take_as_long_as_the_data_sheet_says() -> None:
    """What is no product moves twice the bytes, and fp32 weights and activations are multiplied without TF32."""
    fast, slow = (
        block_seconds(MODEL.vision, 48, 129, A100, element=element, kernels=Kernels(elementwise="fused"))
        for element in (2, 4)
    )
    ratio = A100.bf16_tflops / A100.fp32_tflops
    assert 0.9 * ratio < slow.forward / fast.forward < ratio


def test_collectives_between_nodes_share_the_network_cards() -> None:
    gigabyte = 1e9
    within = CLUSTER.collective_seconds(BASE, "tensor", gigabyte)
    assert within == pytest.approx(gigabyte / 2 / 240e9, rel=0.05)
    # Four ranks of DP share a node, with a card each; the world's eight have eight.
    one_node = CLUSTER.collective_seconds(BASE, "data", gigabyte)
    assert one_node == pytest.approx(gigabyte * 3 / 4 / 240e9, rel=0.05)
    spread = replace(BASE, tensor=1, pipeline=6, data=16)
    assert CLUSTER.collective_seconds(spread, "data", gigabyte) == pytest.approx(
        gigabyte * 15 / 16 / (8 * 25e9 * 0.8), rel=0.05
    )
    assert CLUSTER.collective_seconds(replace(BASE, data=1, tensor=1), "data", gigabyte) == 0


class _Summed(TorchDispatchMode):
    """What sums of bits read, and the roundings that they are made of."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name == "sum" and args[0].dtype == torch.int64:
            self.moved += args[0].nbytes
        elif (
            name == "_to_copy" and args[0].ndim == 1 and (args[0].dtype, result.dtype) == (torch.float, torch.bfloat16)
        ):
            self.moved += args[0].nbytes + result.nbytes
        return result


@pytest.mark.parametrize(
    "options",
    [
        ("train.precision=bf16", "optim.ema_decay=0.9"),
        ("train.precision=bf16", "optim.name=adamw", "train.freeze=[vision.*]"),
        ("train.precision=fp32", "health.audit_every_steps=0"),
    ],
    ids=" ".join,
)
def test_what_is_read_to_see_that_memory_forgets_nothing(options: tuple[str, ...], tmp_path: Path) -> None:
    config = job_config(tmp_path, "checkpoint.every_steps=1000", "health.audit_every_steps=2", *options)
    layout, model = layout_of(config, 1), config.model
    with alone() as mesh:
        trainer = build(config, mesh)
        trainer.optimizer.rule.sums_on_a_cpu = False  # as on a GPU
        run_steps(trainer, 2)
        with _Summed() as counted:
            run_steps(trainer, 2)
        release(trainer)
    (stage,) = stages_of(model, layout)
    whole = stage_parameters(model, layout, stage) + text_parameters(model)
    owned = stage_parameters(model, layout, stage.above) + trained_text_parameters(model, layout.freeze)
    planned = watched_bytes(owned, whole, whole - owned, layout)
    assert planned == pytest.approx(counted.moved / 2, rel=0.06)  # a toy's buffers are padded


def test_kept_outputs_spare_a_replay_their_products() -> None:
    """14 parts of products a block, 5 of them in fc2 and none that a replay runs with all of them kept."""
    stage = stages_of(MODEL, BASE)[1]
    none, fc2, every = (
        unit_time(MODEL, replace(BASE, tensor=1, keep_outputs=level), stage, CLUSTER)
        for level in ("none", "fc2", "all")
    )
    assert none.r == none.f == fc2.f and 0 < every.r < fc2.r < none.r
    assert (none.r - fc2.r) / (none.r - every.r) == pytest.approx(5 / 14, rel=0.02)
    # Copies to the host hide behind the phases; what does not is charged.
    here = replace(BASE, keep_outputs="fc2")
    slow = replace(CLUSTER, hardware=replace(A100, pcie_all_gb_s=1))
    on_device, hidden, waited_for = (
        step_time(MODEL, layout, cluster).p2p
        for layout, cluster in (
            (here, CLUSTER),
            (replace(here, offload_outputs=True), CLUSTER),
            (replace(here, offload_outputs=True), slow),
        )
    )
    assert hidden == on_device < waited_for - 1


def test_sharded_weights_are_gathered_behind_the_turn_before() -> None:
    chunked = replace(BASE, tensor=1, pipeline=1, virtual=48, data=96, micro_batch=100, shard="weights")
    fast, slow = (
        step_time(MODEL, chunked, replace(CLUSTER, hardware=replace(A100, nic_gb_s=rate))).data for rate in (25, 0.5)
    )
    elements = 17.5e9
    first_gathers, last_reduce = 2 * 2 * elements / 48, 4 * elements / 48
    least = (first_gathers + last_reduce) / (8 * 25e9 * 0.8)
    assert least < fast < 3 * least and slow > 50 * fast
    within_a_node = step_time(
        MODEL, replace(chunked, shard_ranks=8), replace(CLUSTER, hardware=replace(A100, nic_gb_s=0.5))
    )
    assert within_a_node.data < 0.7 * slow


@pytest.mark.parametrize(("pipeline", "virtual", "layers"), [(1, 1, None), (2, 2, (1, 23, 23, 1)), (4, 1, None)])
def test_blocks_at_the_ends_stay_bf16_under_fp8(pipeline: int, virtual: int, layers: tuple[int, ...] | None) -> None:
    plain = preset_model("18b")
    model = replace(plain, backend="transformer_engine", fp8="current", fp8_bf16_blocks=2)
    layout = Layout(data=1, global_batch=64, micro_batch=64, pipeline=pipeline, virtual=virtual, layers=layers)
    half, eighth = (replace(layout, kernels=Kernels(elementwise="compiled", fp8=fp8)) for fp8 in (False, True))
    h100 = load_hardware("h100")

    def forward(model: ModelConfig, layout: Layout) -> float:
        return sum(stage_seconds(model, layout, stage, h100).forward for stage in stages_of(model, layout))

    one, last = (
        sum(
            sign * block_seconds(plain.vision, 64, 129, h100, element=2, is_last=is_last, kernels=kernels).forward
            for sign, kernels in ((1, half.kernels), (-1, eighth.kernels))
        )
        for is_last in (False, True)
    )
    assert forward(model, eighth) - forward(plain, eighth) == pytest.approx(3 * one + last)
    assert forward(model, half) == forward(plain, half) > forward(model, eighth)


def test_teachers_have_their_own_products() -> None:
    student, teacher = (
        Layout(data=8, global_batch=512, micro_batch=64),
        FrozenModel(preset_model("l14"), "bf16", True, False),
    )
    found = [
        teachers_seconds(
            replace(student, teachers=(teacher,), kernels=Kernels(elementwise="fused", fp8=fp8)), load_hardware("h100")
        )
        for fp8 in (False, True)
    ]
    assert found[0] == found[1] > 0


def test_a_receive_that_waits_takes_multiprocessors() -> None:
    stage = stages_of(MODEL, BASE)[1]
    many = replace(CLUSTER, hardware=replace(A100, multiprocessors=1e9))
    ratio = unit_time(MODEL, BASE, stage, CLUSTER).forward / unit_time(MODEL, BASE, stage, many).forward
    assert ratio == pytest.approx(108 / 107, rel=1e-6)


def test_the_engine_makes_as_many_thread_blocks_of_a_message_as_are_priced() -> None:
    """One number: tools/cost imports no torch, and the engine's groups are made where torch is."""
    sources = [file for room in ("engine", "tools") for file in (ROOT / room).rglob("*.py")]
    made = [file for file in sources if re.search(r"^LINK_BLOCKS\b.*=", file.read_text(), re.MULTILINE)]
    assert [str(file.relative_to(ROOT)) for file in made] == ["engine/config/sections/parallel.py"]


def test_a_message_is_no_faster_than_its_thread_block() -> None:
    megabytes = 80e6
    inside, across = (replace(BASE, tensor=1, pipeline=8, data=data) for data in (1, 2))
    assert CLUSTER.message_seconds(inside, megabytes) == pytest.approx(megabytes / 20e9, rel=0.02)  # not NVLink's 240
    slow = replace(CLUSTER, hardware=replace(A100, nic_gb_s=5))
    assert slow.message_seconds(across, megabytes) == pytest.approx(megabytes / 4e9, rel=0.02)


def test_only_what_exceeds_the_overlap_is_left_of_the_reduction() -> None:
    slow = replace(CLUSTER, hardware=replace(A100, nic_gb_s=0.5))
    overlapped, bare = (step_time(MODEL, replace(BASE, overlap=o, data=40), slow).data for o in (True, False))
    assert 0 < overlapped < bare


def test_a_data_bound_job_waits_for_its_cpus() -> None:
    starved = replace(CLUSTER, hardware=replace(A100, decode_images_s=10))
    time = step_time(MODEL, BASE, starved)
    assert time.total == pytest.approx(BASE.global_batch / 10)  # TP 2 x DP 4 first-stage ranks: one node decodes
