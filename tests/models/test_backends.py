"""Every kernel choice computes the same tower, under the same names: real specs on the stand-ins of tests/fakes.

The stand-ins do the packages' mathematics in plain torch under the packages' signatures, so this proves the specs and
megatron-core's wrappers around them, not the kernels (docs/results/gpu.md).
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.parallel.device import prepare
from engine.parallel.mesh import Mesh
from tests.golden import TOLERANCE, deviation, deviations
from tests.models import backend_cases as cases

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parents[2]
KERNEL_TOLERANCE = 1e-2
"""Of one attention: it rounds to bf16, 2^-9 a number, here before and there after the softmax."""
BF16_TOLERANCE = 6e-2
"""Of features after four blocks with the fixtures' large weights, 4.5e-2 from those in fp32 on the local kernels."""
FP8_TOLERANCE = 0.4
"""The same, with 3 bits of mantissa in place of 7."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the towers gave in a process that finds the stand-ins."""
    return _found(tmp_path_factory.mktemp("backends") / "result.pt")


@pytest.fixture(scope="module")
def slowly_found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The slow curves of such a process."""
    return _found(tmp_path_factory.mktemp("backends") / "slow.pt", "slow")


def _found(result: Path, *part: str) -> dict[str, Any]:
    path = os.pathsep.join([str(cases.FAKES), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(
        [sys.executable, "-m", "tests.models.backend_cases", str(result), *part],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        timeout=300,
    )
    return torch.load(result, weights_only=True)


@pytest.fixture(scope="module")
def local(mesh: Mesh) -> dict[str, dict[str, torch.Tensor]]:
    """Fixture -> features and gradients of the local kernels, where no Transformer Engine is to be found."""
    return {fixture: cases.passes(cases.build(fixture, {}, mesh), fixture) for fixture in cases.ARCHITECTURES}


@pytest.mark.parametrize("case", cases.EXACT)
def test_features_and_gradients_do_not_depend_on_the_kernels(case: str, found: dict, local: dict) -> None:
    assert found["exact"][case], "no fixture takes these kernels"
    for fixture, values in found["exact"][case].items():
        assert not deviations(values, local[fixture], limit=TOLERANCE / 10), fixture


@pytest.mark.parametrize("case", [case for case in cases.ATTENTIONS if case != "sdpa"])
def test_attention_kernels_agree_in_bf16(case: str, found: dict) -> None:
    for fixture, reference in found["attentions"]["sdpa"].items():
        values = found["attentions"][case][fixture]
        assert deviation(values.pop("features"), reference["features"]) < BF16_TOLERANCE
        alone = {name: reference[name] for name in values}
        assert set(alone) == {"out", "q", "k", "v"}
        worst = deviations(values, alone, limit=KERNEL_TOLERANCE)
        assert not worst, f"{fixture}: {worst}"


def test_the_names_and_shapes_of_a_checkpoint_know_of_no_backend(found: dict, mesh: Mesh) -> None:
    assert found["names"] == cases.shipped_names(mesh, {})


def test_fp8_covers_the_gemms_of_the_inner_blocks_only(found: dict) -> None:
    linears = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    for edge, blocks in ((0, range(4)), (1, range(1, 3))):
        expected = {f"block.layers.{block}.{linear}" for block in blocks for linear in linears}
        assert set(found["fp8"][f"modules-{edge}"]) == expected


def test_a_stage_knows_which_of_its_blocks_are_at_the_ends(found: dict) -> None:
    stages = {"stage-0-2": [1], "stage-2-3": [2], "stage-3-4": []}
    assert {stage: found["fp8"][stage] for stage in stages} == stages


def test_fp8_is_near_and_a_replay_repeats_it(found: dict) -> None:
    reference = found["attentions"]["sdpa"]["tiny-18b"]["features"]
    for edge in (0, 1):
        distance = deviation(found["fp8"][f"features-{edge}"], reference)
        assert BF16_TOLERANCE / 10 < distance < FP8_TOLERANCE
        assert found["fp8"][f"repeats-{edge}"]


def test_the_state_of_quantisers_is_no_tensor_of_a_checkpoint(found: dict) -> None:
    assert found["fp8"]["extra-0"] == ["_extra_state", "bias", "cls_token", "pos_embed", "weight"]
    assert not [name for names in found["names"].values() for name in names if "extra" in name]


@pytest.fixture(scope="module")
def local_curve(mesh: Mesh) -> list[float]:
    """Losses of one process on the local kernels."""
    config = cases.step_options._config("18b", "train.micro_batch_size=8")
    return cases.step_options._curve(config, mesh, prepare())["losses"]


@pytest.mark.parametrize("case", [case for case in cases.CURVES if case not in cases.SLOW_CURVES])
def test_training_does_not_show_the_backend(case: str, found: dict, local_curve: list[float]) -> None:
    assert found["curves"][case] == pytest.approx(local_curve, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.SLOW_CURVES)
def test_training_does_not_show_the_backend_with_more_options(
    case: str, slowly_found: dict, local_curve: list[float]
) -> None:
    assert slowly_found["curves"][case] == pytest.approx(local_curve, rel=1e-5)


def test_fp8_training_is_near_bf16_and_the_same_with_and_without_replay(found: dict) -> None:
    curves = found["curves"]
    assert curves["te-bf16"] == pytest.approx(curves["bf16"], rel=BF16_TOLERANCE)
    assert curves["fp8"] == pytest.approx(curves["bf16"], rel=FP8_TOLERANCE)
    assert curves["fp8"] != curves["te-bf16"]
    # Scales follow the tensor at hand, so a replay repeats the encode phase to the bit.
    assert curves["fp8"] == curves["fp8-full"] == curves["fp8-keep-all"]
