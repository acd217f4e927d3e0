"""Masked-feature distillation through the real step: the authors' loss and gradients, and the same curve at any layout.

Teacher: the fixture's, loaded from a file in the authors' layout. One launch a number of ranks runs all its cases.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.pixels.masks import BlockMasks
from engine.config.phases import first_phase
from engine.config.read import Config, ParallelConfig, check_layout
from engine.objectives.mim.step import MimStep
from engine.parallel.device import prepare
from engine.parallel.launch import job
from engine.parallel.mesh import Mesh, build_mesh
from engine.pipeline.clock import Phases
from engine.trainer import Trainer
from tests.checkpoint.jobs import build, save
from tests.distributed import MANY_CASES_S, run_distributed, world
from tests.engine.mim_jobs import Layout, depth_of, mim_config, pictures_of_step, without_captions
from tests.gather import whole_gradients, whole_weights
from tests.golden import TOLERANCE, deviation, deviations, load_json, load_tensors, load_weights, noise
from tests.models.students import STUDENTS, masks, student_model, student_tensors

pytestmark = pytest.mark.dist

STEPS, FAST_STEPS = 3, 2
LOSS_TOLERANCE: dict[str, Any] = {"rel": 1e-5, "abs": 1e-6}
"""A loss is a mean of cosines and passes through 0."""
WEIGHT_TOLERANCE = 1e-4
"""|weight - reference| / |reference| of each tensor after the steps; see tests/engine/test_layouts.py."""

# --- the authors' numbers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Golden:
    """A student of the fixture at a layout."""

    student: str
    layout: Layout = field(default_factory=lambda: Layout(micro_batch=4, batch=8))

    def __str__(self) -> str:
        return f"{self.student}-{self.layout}"

    def config(self) -> Config:
        """The job; the fixture's two blocks admit two stages and no virtual ones."""
        scale = 0.1 if load_json("g8-mim/meta.json")["students"][self.student]["stop_grad_conv1"] else 1.0
        mim = {"masked_patches": 6, "min_block": 4, "patch_gradient_scale": scale}
        return mim_config(self.layout, model=student_model(self.student), **mim)


def _layouts(*layouts: Layout) -> list[Layout]:
    return [replace(layout, batch=8) for layout in layouts]


# 85 hidden channels of eva02B do not divide by 2: it is cut into stages and replicas only.
GOLDEN = {
    1: [Golden(s) for s in STUDENTS],
    2: [
        *(Golden("eva02B", layout) for layout in _layouts(Layout(1, 2, 1, 2), Layout(1, 1, 2, 2))),
        *(Golden(s, layout) for s in ("style18b", "style8b") for layout in _layouts(Layout(2, 1, 1, 2))),
        *(
            Golden("style18b", layout)
            for layout in _layouts(Layout(1, 1, 2, 2), Layout(2, 1, 1, 1, options=("parallel.sequence=false",)))
        ),
    ],
    4: [
        *(Golden(s, layout) for s in ("style18b", "style8b") for layout in _layouts(Layout(2, 2, 1, 2))),
        *(Golden("eva02B", layout) for layout in _layouts(Layout(1, 2, 2, 1))),
    ],
}
MORE_GOLDEN = {
    2: [
        *(Golden(s, layout) for s in ("style18b", "style8b") for layout in _layouts(Layout(1, 2, 1, 2))),
        *(Golden("style8b", layout) for layout in _layouts(Layout(1, 1, 2, 2))),
    ],
}
"""Slow: stages of these students are in a fast case of four ranks."""


class _FixtureMasks(BlockMasks):
    """The masks that the fixture used instead of drawn ones."""

    def of_samples(self, seed: int, positions: np.ndarray) -> np.ndarray:
        return masks().numpy()[positions]


def one_pass(case: Golden, mesh: Mesh) -> dict[str, Any]:
    """Teacher, 1F1B and reductions on the fixture's batch: loss; on rank 0 also whole gradients."""
    trainer = Trainer(first_phase(case.config()), mesh, prepare())
    load_weights(trainer.towers, student_tensors(case.student, "weights"))
    step = trainer.training_step
    assert isinstance(step, MimStep)
    step.masks = _FixtureMasks(grid=4, masked=6, min_block=4)
    batch = without_captions(load_tensors("g8-mim/io")["images_u8"], mesh)
    _, own = step.gradients(batch, Phases())
    step.update.reduce()
    return {"loss": step.global_loss(own), "gradients": whole_gradients(trainer)}


# --- layouts ---------------------------------------------------------------------------------------------------------

VIRTUAL = ("parallel.virtual=2",)
LAYOUTS = {
    1: [
        Layout(micro_batch=4),
        Layout(micro_batch=8, options=("train.recompute=full",)),
    ],
    2: [
        Layout(2, 1, 1, 8, options=("parallel.sequence=false",)),
        Layout(1, 2, 1, 16),  # one micro-batch: nothing to alternate
        Layout(1, 2, 1, 4, options=("parallel.layers=[1,3]", "train.recompute=selective")),
        Layout(1, 1, 2, 4, options=("parallel.overlap=false",)),
    ],
    4: [
        Layout(4, 1, 1, 8),
        Layout(2, 2, 1, 4, options=VIRTUAL),
        Layout(1, 2, 2, 2, options=(*VIRTUAL, "parallel.bucket_size=2000")),
        Layout(1, 4, 1, 3, batch=18),  # a local batch that the four teachers cannot share evenly
        Layout(2, 2, 1, 2, batch=2),  # fewer images than teachers
    ],
}
MORE_LAYOUTS = {
    1: [Layout(micro_batch=1)],
    2: [
        Layout(2, 1, 1, 4),
        Layout(1, 2, 1, 2),
        Layout(1, 2, 1, 2, options=VIRTUAL),
        Layout(1, 1, 2, 2),
    ],
    4: [
        Layout(1, 4, 1, 1),
        Layout(1, 1, 4, 2),
        Layout(2, 2, 1, 2),
        Layout(2, 1, 2, 2, options=("parallel.overlap=false",)),
    ],
    8: [
        Layout(8, 1, 1, 8),
        Layout(1, 8, 1, 2, depth=8),
        Layout(2, 2, 2, 2),
        Layout(2, 4, 1, 2),
        Layout(1, 4, 2, 2, depth=8, options=VIRTUAL),
        Layout(2, 2, 2, 4, options=VIRTUAL),
    ],
}
"""The same, slow: each axis alone and each option is in a fast case, too."""


def run(layout: Layout, mesh: Mesh, steps: int = FAST_STEPS) -> dict[str, Any]:
    """The first steps from weights that are nowhere 0 (fresh gains are: all blocks would begin as the identity)."""
    config = mim_config(layout, model=depth_of(layout.depth))
    assert check_layout(config, layout.ranks) == layout.data
    trainer = Trainer(first_phase(config), mesh, prepare())
    load_weights(trainer.towers, noise(trainer.towers))
    losses, norms, masked = [], [], []
    for step in range(steps):
        outcome = trainer.step(pictures_of_step(config, mesh, step * layout.batch))
        losses.append(float(outcome.loss))
        norms.append(outcome.gradient_norm)
        masked.append(float(outcome.metrics["masked_patches"]))
    return {"losses": losses, "norms": norms, "masked": masked, "weights": whole_weights(trainer)}


BF16 = Layout(2, 2, 1, 2, options=(*VIRTUAL, "train.precision=bf16", "mim.teacher_precision=fp32"))
BF16_TOLERANCE = 0.02
"""Of a loss, against fp32: bf16 has 8 bits."""

# --- resuming --------------------------------------------------------------------------------------------------------

RESUMED = [(Layout(2, 2, 1, 2), Layout(1, 1, 4, 4)), (Layout(1, 2, 2, 2, options=VIRTUAL), Layout(2, 1, 2, 2))]


def curve(trainer: Trainer, upto: int) -> list[float]:
    """Losses of the steps until `upto`."""
    losses = []
    while trainer.position.step < upto:
        batch = pictures_of_step(trainer.config, trainer.mesh, trainer.position.samples_seen)
        losses.append(float(trainer.step(batch).loss))
    return losses


def fresh_curve(layout: Layout, mesh: Mesh) -> list[float]:
    """Losses from the student's own initial weights."""
    return curve(Trainer(first_phase(mim_config(layout)), mesh, prepare()), STEPS)


def resumed_curve(before: Layout, after: Layout, mesh, folder: str) -> list[float]:
    """Two steps at one layout, a checkpoint, the rest at another one."""
    losses: list[float] = []
    for layout, upto in ((before, 2), (after, STEPS)):
        config = mim_config(layout, f"run_dir={folder}/{before}", "checkpoint.every_steps=2")
        trainer = build(config, mesh(layout.tensor, layout.pipeline))
        assert trainer.position.step == len(losses)
        losses += curve(trainer, upto)
        save(trainer)
    return losses


# --- launches --------------------------------------------------------------------------------------------------------


def run_all(ranks: int, slow: bool, folder: str) -> dict[str, list[Any]]:
    """Everything fast, or everything slow, for this number of ranks."""
    mesh = cache(lambda tensor, pipeline: build_mesh(tensor, pipeline, world()))
    golden = [
        one_pass(case, mesh(case.layout.tensor, case.layout.pipeline))
        for case in (MORE_GOLDEN.get(ranks, []) if slow else GOLDEN[ranks])
    ]
    if slow:
        more = [run(layout, mesh(layout.tensor, layout.pipeline), STEPS) for layout in MORE_LAYOUTS[ranks]]
        return {"more": more, "more golden": golden}
    layouts = [run(layout, mesh(layout.tensor, layout.pipeline)) for layout in LAYOUTS[ranks]]
    resumed = [resumed_curve(*pair, mesh, folder) for pair in RESUMED] if ranks == 4 else []
    bf16 = [fresh_curve(BF16, mesh(BF16.tensor, BF16.pipeline))] if ranks == BF16.ranks else []
    return {"golden": golden, "layouts": layouts, "resumed": resumed, "bf16": bf16}


class Outcomes:
    """Starts a launch when its first case is asked for."""

    def __init__(self, mesh: Mesh, folder: Path):
        """mesh: of this process alone."""
        self.alone = cache(lambda layout, steps: run(layout, mesh, steps))
        self._mesh = mesh
        self._of_launch = cache(self._start)
        self._folder = folder

    def _start(self, ranks: int, slow: bool) -> list[dict[str, list[Any]]]:
        if ranks == 1:
            return [run_all(1, slow, str(self._folder))]
        return run_distributed(run_all, ranks, ranks=ranks, slow=slow, folder=str(self._folder), timeout_s=MANY_CASES_S)

    @cached_property
    def fresh(self) -> list[float]:
        """The curve of one process from the student's own initial weights."""
        return fresh_curve(Layout(), self._mesh)

    def of(self, ranks: int, part: str, index: int) -> list[Any]:
        """What each rank returned."""
        return [result[part][index] for result in self._of_launch(ranks, part.startswith("more"))]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    with job(ParallelConfig()) as (mesh, _):
        yield Outcomes(mesh, tmp_path_factory.mktemp("mim"))


def _cases(table: dict[int, list]) -> list:
    return [
        pytest.param(ranks, i, id=f"{ranks}ranks-{case}")
        for ranks, cases in table.items()
        for i, case in enumerate(cases)
    ]


@pytest.mark.parametrize(("ranks", "index"), _cases(GOLDEN))
def test_the_authors_loss_and_every_gradient(ranks: int, index: int, outcomes: Outcomes) -> None:
    check_golden(GOLDEN[ranks][index], outcomes.of(ranks, "golden", index))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "index"), _cases(MORE_GOLDEN))
def test_the_authors_loss_and_every_gradient_at_more_layouts(ranks: int, index: int, outcomes: Outcomes) -> None:
    check_golden(MORE_GOLDEN[ranks][index], outcomes.of(ranks, "more golden", index))


def check_golden(case: Golden, results: list[Any]) -> None:
    """Loss and gradients are the fixture's."""
    loss = load_tensors("g8-mim/io")[f"{case.student}.loss"]
    for result in results:
        torch.testing.assert_close(result["loss"], loss, rtol=1e-5, atol=0)
    assert not deviations(results[0]["gradients"], student_tensors(case.student, "grads"), TOLERANCE)


def test_the_curve_moves_and_masks_end_short(outcomes: Outcomes) -> None:
    alone = outcomes.alone(Layout(), STEPS)
    assert all(after != pytest.approx(before, rel=1e-3) for before, after in pairwise(alone["losses"]))
    assert len(set(alone["masked"])) > 1 and max(alone["masked"]) < 10


@pytest.mark.parametrize(("ranks", "index"), _cases(LAYOUTS))
def test_the_one_process_curve(ranks: int, index: int, outcomes: Outcomes) -> None:
    check_curve(LAYOUTS[ranks][index], outcomes.of(ranks, "layouts", index), outcomes)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "index"), _cases(MORE_LAYOUTS))
def test_the_one_process_curve_at_more_layouts(ranks: int, index: int, outcomes: Outcomes) -> None:
    check_curve(MORE_LAYOUTS[ranks][index], outcomes.of(ranks, "more", index), outcomes)


def check_curve(layout: Layout, results: list[Any], outcomes: Outcomes) -> None:
    """Losses, gradient norm, masks and weights are those of one process."""
    reference = outcomes.alone(layout.alone, len(results[0]["losses"]))
    for rank, result in enumerate(results):
        assert result["losses"] == pytest.approx(reference["losses"], **LOSS_TOLERANCE), f"rank {rank}"
        assert result["norms"][0] == pytest.approx(reference["norms"][0], rel=1e-5), f"rank {rank}"
        assert result["masked"] == reference["masked"]
    found = {name: deviation(value, reference["weights"][name]) for name, value in results[0]["weights"].items()}
    assert found.keys() == reference["weights"].keys()
    worst = max(found, key=lambda name: found[name])
    assert found[worst] < WEIGHT_TOLERANCE, f"{worst}: {found[worst]:.1e}"


def test_bf16_stays_beside_the_fp32_curve(outcomes: Outcomes) -> None:
    for losses in outcomes.of(BF16.ranks, "bf16", 0):
        assert losses == pytest.approx(outcomes.fresh, abs=BF16_TOLERANCE)
        assert losses != pytest.approx(outcomes.fresh, abs=1e-6)


@pytest.mark.parametrize("index", range(len(RESUMED)), ids=[f"{a}-to-{b}" for a, b in RESUMED])
def test_a_run_resumes_at_another_layout(index: int, outcomes: Outcomes) -> None:
    for rank, losses in enumerate(outcomes.of(4, "resumed", index)):
        assert losses == pytest.approx(outcomes.fresh, **LOSS_TOLERANCE), f"rank {rank}"
