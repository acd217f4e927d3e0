"""A few training steps on GPUs against the same steps on the CPU, and the stash in pinned memory. Never run so far."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.pipeline.stash import HostStash
from models.blocks.packages import TRANSFORMER_ENGINE
from models.tensors.sums import looked_up
from tests.gpu.needs import gpus

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
FP32_TOLERANCE, BF16_TOLERANCE = 1e-4, 3e-2
MICRO = "train.micro_batch_size=4"
BF16 = "train.precision=bf16"
TP2, PP2 = "parallel.tensor=2", "parallel.pipeline=2"
TE = "model.backend=transformer_engine"
HOPPER = (9, 0)
"""cuDNN's attention takes packed tokens from here on."""


def _curve(result: Path, ranks: int, options: list[str], *, cpu: bool = False) -> list[float]:
    """Losses of the steps; cpu: in a process that sees no GPU."""
    command = [sys.executable, "-m", "tests.gpu.curve"]
    if ranks > 1:
        launch = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
        command = [sys.executable, "-m", *launch, "-m", "tests.gpu.curve"]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
    subprocess.run([*command, str(result), *options], check=True, cwd=ROOT, env=os.environ | hidden, timeout=600)
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """One rank, fp32."""
    return _curve(tmp_path_factory.mktemp("cpu") / "curve.json", 1, [MICRO], cpu=True)


@pytest.mark.parametrize(
    ("ranks", "options", "tolerance"),
    [
        pytest.param(1, [], FP32_TOLERANCE, marks=gpus(1), id="fp32"),
        pytest.param(1, [BF16], BF16_TOLERANCE, marks=gpus(1), id="bf16"),
        pytest.param(1, [BF16, TE], BF16_TOLERANCE, marks=gpus(1, TRANSFORMER_ENGINE, capability=HOPPER), id="te"),
        pytest.param(2, [TP2], FP32_TOLERANCE, marks=gpus(2), id="tp2"),
        pytest.param(2, [PP2], FP32_TOLERANCE, marks=gpus(2), id="pp2"),
        pytest.param(2, [PP2, "parallel.virtual=2"], FP32_TOLERANCE, marks=gpus(2), id="virtual"),
        pytest.param(2, [PP2, "train.offload_stash=true"], FP32_TOLERANCE, marks=gpus(2), id="offload"),
        pytest.param(2, [], FP32_TOLERANCE, marks=gpus(2), id="dp2"),
        pytest.param(2, ["train.loss_variant=ring"], FP32_TOLERANCE, marks=gpus(2), id="ring"),
        pytest.param(
            2, [TP2, BF16, TE], BF16_TOLERANCE, marks=gpus(2, TRANSFORMER_ENGINE, capability=HOPPER), id="te-tp2"
        ),
    ],
)
def test_gpus_give_the_curve_of_the_cpu(
    ranks: int, options: list[str], tolerance: float, on_the_cpu: list[float], tmp_path: Path
) -> None:
    losses = _curve(tmp_path / "curve.json", ranks, [MICRO, *options])
    assert losses == pytest.approx(on_the_cpu, rel=tolerance)


@gpus(1)
def test_pinned_memory_gives_back_what_the_device_has_overwritten() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    stash = HostStash(device)
    for _step in range(3):
        for value in range(8):
            hidden = torch.full((1024, 1024), float(value), device=device)
            stash.push(hidden)
            del hidden  # its memory goes to the next one while the copy may still be under way
        assert all(buffer.is_pinned() for buffer in stash._kept if buffer is not None)
        stash.prefetch()
        for value in reversed(range(8)):
            got = stash.pop()
            assert got is not None and bool((got == value).all())


@gpus(1)
def test_the_stash_is_not_on_the_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stash = HostStash(device)
    size = 4 * 2**20
    for value in range(64):
        stash.push(torch.full((size // 4,), float(value), device=device))
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 8 * size


@gpus(1)
def test_sums_of_a_table_are_the_cpus_and_the_same_in_two_runs() -> None:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (64, 77), generator=draw)  # every row many times, as padding is
    gradient = torch.randn(64, 77, 256, generator=draw).bfloat16()
    found = []
    for device in ("cpu", "cuda", "cuda"):
        table: Any = torch.nn.Parameter(torch.zeros(1000, 256, dtype=torch.bfloat16, device=device))
        table.main_grad = torch.ones(1000, 256, device=device)
        looked_up(table, ids.to(device)).backward(gradient.to(device))
        found.append(table.main_grad.cpu())
    torch.testing.assert_close(found[1], found[0])
    assert torch.equal(found[1], found[2])
