"""Layout invariance: every TP × PP × DP × micro-batch of 1, 2, 4 and 8 ranks gives the curve of one process.

Three LAMB steps with half of the patches dropped, of which the fast cases take two: losses to 1e-5 relative, weights
after them to WEIGHT_TOLERANCE. One launch a number of ranks runs all its cases. Options that must not show in the curve
either: tests/engine/test_step_options.py.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.phases import first_phase
from engine.config.read import Config, ParallelConfig, check_layout, resolve
from engine.parallel.device import prepare
from engine.parallel.launch import job
from engine.parallel.mesh import Mesh, build_mesh
from engine.record import Callback, Record
from engine.trainer import Trainer
from tests.data.shard_factory import make_shards
from tests.distributed import MANY_CASES_S, run_distributed, world
from tests.gather import whole_weights
from tests.golden import deviation, local_batch

pytestmark = pytest.mark.dist

STEPS, FAST_STEPS = 3, 2
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-4
"""|weight - reference| / |reference| of each tensor after the steps. Layouts add the same numbers in another order,
which is 1e-7 to 1e-6 of a gradient; where an element's gradient is near 0, m / sqrt(v) makes that a visible part of its
step. Measured after five: at most 5e-5, mostly below 1e-5, always in a bias of a block that started at 0, all of
whose value comes from these steps."""
MODEL = (
    "model.preset=tiny-18b",
    "model.vision.head_width=8",  # a head for each of 8 tensor ranks
    "model.vision.mlp_hidden=160",
    "model.text.depth=2",
)
RECIPE = (
    f"train.steps={STEPS}",
    "train.patch_dropout=0.5",
    "train.logit_scale=20",
    "optim.lr_vision=0.01",
    "optim.lr_text=0.01",
    "optim.lr_other=0.01",
    "optim.warmup_steps=2",
)


@dataclass(frozen=True)
class Case:
    """A layout."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    micro_batch: int = 16
    sequence: bool = True
    batch: int = 16
    depth: int = 4
    """Blocks of the image tower: 8 where there are 8 stages."""
    options: tuple[str, ...] = ()
    """What changes the mathematics: the one-process run has it, too."""

    def __str__(self) -> str:
        name = f"tp{self.tensor}-pp{self.pipeline}-dp{self.data}-mb{self.micro_batch}"
        return (
            name
            + ("" if self.sequence else "-nosp")
            + (f"-b{self.batch}" if self.batch != 16 else "")
            + ("-options" if self.options else "")
        )

    @property
    def ranks(self) -> int:
        """W."""
        return self.tensor * self.pipeline * self.data

    @property
    def alone(self) -> "Case":
        """The same mathematics on one process, the whole batch at once."""
        return Case(micro_batch=self.batch, batch=self.batch, depth=self.depth, options=self.options)

    def config(self, *more: str) -> Config:
        """The job."""
        layout = (
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.sequence={self.sequence}",
            f"model.vision.depth={self.depth}",
            f"train.micro_batch_size={self.micro_batch}",
            f"train.global_batch_size={self.batch}",
        )
        return resolve({"data": {"shards": ["-"]}}, [*MODEL, *RECIPE, *layout, *self.options, *more])


def factorisations(ranks: int) -> list[tuple[int, int, int]]:
    """Every (TP, PP, DP) with this product."""
    divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
    return [(t, p, ranks // (t * p)) for t in divisors for p in divisors if ranks % (t * p) == 0]


def cases_of(ranks: int) -> list[Case]:
    """Every factorisation with two micro-batch sizes, and with sequence parallelism off where it could be on."""
    cases = []
    for tensor, pipeline, data in factorisations(ranks):
        # 9 tokens a sample: sequence parallelism needs micro-batches that are multiples of TP. A pipeline gets more.
        small = max(tensor, 16 // data // (4 if pipeline > 1 else 2))
        layout = Case(tensor, pipeline, data, small, depth=max(4, pipeline))
        cases += [layout, replace(layout, micro_batch=2 * small)]
        if tensor > 1:
            cases.append(replace(layout, sequence=False))
    return cases


def _layout(case: Case) -> tuple[int, int, int]:
    return case.tensor, case.pipeline, case.data


LEARNED = ("train.logit_scale=null", "train.text_micro_batch_size=1", "train.keep_activations=1")
OF_2, OF_4, OF_8 = cases_of(2), cases_of(4), cases_of(8)
HALVES_OF_2, HALVES_OF_4, HALVES_OF_8 = (
    [case for case in cases if case.sequence and case.batch // case.data // case.micro_batch == 2]
    for cases in (OF_2, OF_4, OF_8)
)
"""Each factorisation with two micro-batches a replica."""
ALL_AXES = [case for case in HALVES_OF_8 if _layout(case) == (2, 2, 2)]
"""One of each factorisation of 2 and 4 ranks and one of 8; the rest is slow. More micro-batches are in
tests/engine/test_step_options.py, too."""
LAUNCHES = {
    "1rank": [Case(micro_batch=4), Case(micro_batch=8)],
    "1rank-more": [Case(micro_batch=1)],
    "2ranks": [*HALVES_OF_2, *(case for case in OF_2 if not case.sequence)],
    "2ranks-more": [case for case in OF_2 if case.sequence and case not in HALVES_OF_2],
    # Last: local batches that the ranks of a replica cannot share evenly, and a learned scale.
    "4ranks": [*HALVES_OF_4, Case(1, 4, 1, 6, batch=18), Case(2, 1, 2, 2, options=LEARNED)],
    "4ranks-more": [case for case in OF_4 if case not in HALVES_OF_4],
    "8ranks": ALL_AXES,
    "8ranks-more": [
        *(case for case in OF_8 if case not in ALL_AXES),
        Case(2, 4, 1, 10, batch=20),
        Case(2, 2, 2, 2, options=LEARNED),
    ],
}
SLOW = tuple(launch for launch in LAUNCHES if launch.endswith("-more"))


def steps_of(launch: str) -> int:
    """Steps of a launch's cases."""
    return STEPS if launch in SLOW else FAST_STEPS


def random_pairs(config: Config, step: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [B, 3, h, w] and captions of all lengths, int64 [B, context]; the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    batch, side, text = config.train.global_batch_size, config.model.vision.image_size, config.model.text
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator)
    end = text.vocab_size - 1
    ids = torch.randint(1, end, (batch, text.context_length), generator=generator)
    ends = torch.randint(2, text.context_length, (batch, 1), generator=generator)
    place = torch.arange(text.context_length)
    return images, ids.masked_fill(place == ends, end).masked_fill(place > ends, 0)


def run(case: Case, mesh: Mesh, steps: int) -> dict[str, Any]:
    """The first `steps`: losses; on rank 0 also the weights after them and a digest of the fresh ones."""
    config = case.config()
    assert check_layout(config, case.ranks) == case.data
    trainer = Trainer(first_phase(config), mesh, prepare())
    fresh = _digest(whole_weights(trainer))
    losses = []
    for step in range(steps):
        images, ids = random_pairs(config, step)
        outcome = trainer.step(local_batch(images, ids, mesh, start_position=step * case.batch))
        losses.append(float(outcome.loss))
    return {"losses": losses, "fresh": fresh, "weights": whole_weights(trainer)}


def _digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].numpy().tobytes())
    return digest.hexdigest()


def run_all(launch: str) -> list[dict[str, Any]]:
    """All cases of a launch."""
    mesh = cache(lambda tensor, pipeline: build_mesh(tensor, pipeline, world()))
    return [run(case, mesh(case.tensor, case.pipeline), steps_of(launch)) for case in LAUNCHES[launch]]


class Outcomes:
    """Starts a launch when its first case is asked for."""

    def __init__(self, mesh: Mesh):
        """mesh: of this process alone."""
        self.mesh = mesh
        self.alone = cache(lambda case, steps: run(case, mesh, steps))
        self._of_launch = cache(self._start)

    def _start(self, launch: str) -> dict[Case, list[dict[str, Any]]]:
        cases = LAUNCHES[launch]
        if cases[0].ranks == 1:
            return {case: [self.alone(case, steps_of(launch))] for case in cases}
        results = run_distributed(run_all, cases[0].ranks, launch=launch, timeout_s=MANY_CASES_S)
        return dict(zip(cases, map(list, zip(*results, strict=True)), strict=True))

    def of(self, launch: str, case: Case) -> list[dict[str, Any]]:
        """What each rank returned."""
        return self._of_launch(launch)[case]


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Outcomes]:
    with job(ParallelConfig()) as (mesh, _):
        yield Outcomes(mesh)


EVERY_CASE = [
    pytest.param(launch, case, id=f"{launch}-{case}", marks=[pytest.mark.slow] if launch in SLOW else [])
    for launch, cases in LAUNCHES.items()
    for case in cases
]


def test_every_factorisation_is_here_with_two_micro_batch_sizes() -> None:
    assert [len(factorisations(ranks)) for ranks in (1, 2, 4, 8)] == [1, 3, 6, 10]
    assert [len({_layout(case) for case in cases}) for cases in (HALVES_OF_2, HALVES_OF_4)] == [3, 6]
    every = {case for cases in LAUNCHES.values() for case in cases}
    for ranks in (1, 2, 4, 8):
        for layout in factorisations(ranks):
            found = {case.micro_batch for case in every if _layout(case) == layout and case.sequence}
            assert len(found) >= 2, layout


def test_the_curve_moves(outcomes: Outcomes) -> None:
    losses = outcomes.alone(Case(), FAST_STEPS)["losses"]
    assert all(abs(after - before) > 1e-3 * before for before, after in pairwise(losses))


@pytest.mark.parametrize(("launch", "case"), EVERY_CASE)
def test_the_one_process_curve(launch: str, case: Case, outcomes: Outcomes) -> None:
    expected = pytest.approx(outcomes.alone(case.alone, steps_of(launch))["losses"], rel=LOSS_TOLERANCE)
    for rank, result in enumerate(outcomes.of(launch, case)):
        assert result["losses"] == expected, f"rank {rank}"


@pytest.mark.parametrize(("launch", "case"), EVERY_CASE)
def test_the_one_process_weights(launch: str, case: Case, outcomes: Outcomes) -> None:
    reference, result = outcomes.alone(case.alone, steps_of(launch)), outcomes.of(launch, case)[0]
    assert result["fresh"] == reference["fresh"], "fresh weights differ"
    found = {name: deviation(value, reference["weights"][name]) for name, value in result["weights"].items()}
    assert found.keys() == reference["weights"].keys()
    worst = max(found, key=lambda name: found[name])
    assert found[worst] < WEIGHT_TOLERANCE, f"{worst}: {found[worst]:.1e}"


# --- the same through tar shards --------------------------------------------------------------------------------------


class _Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, record: Record) -> None:
        self.losses.append(record["loss"])


def fit_on_shards(case: Case, mesh: Mesh, folder: str) -> list[float]:
    """Losses of the trainer's own loop, reading, shuffling, cropping and tokenising included.

    Without reader processes: a rank of a test may not have children (tests/engine/test_resume.py has them).
    """
    run_dir, shards = f"run_dir={folder}/{case}", f"data.shards={folder}/shards"
    recorder = _Losses()
    Trainer(
        first_phase(case.config(run_dir, shards, "data.workers=0", "model.text.vocab_size=49408")), mesh, prepare()
    ).fit([recorder])
    return recorder.losses


SHARD_CASES = [Case(2, 2, 1, 4), Case(1, 2, 2, 4), Case(4, 1, 1, 8), Case(1, 1, 4, 2)]


def fit_all_on_shards(folder: str) -> list[list[float]]:
    """The cases with real input of four ranks."""
    return [fit_on_shards(case, build_mesh(case.tensor, case.pipeline, world()), folder) for case in SHARD_CASES]


@pytest.mark.slow  # the quickstart of every CI run is such a run, too
def test_real_input_gives_the_one_process_curve(tmp_path: Path, outcomes: Outcomes) -> None:
    (tmp_path / "shards").mkdir()
    make_shards(tmp_path / "shards", [13, 12, 10])  # 35 samples: three steps of 16 run into the second epoch
    expected = fit_on_shards(Case(), outcomes.mesh, str(tmp_path))
    for rank, curves in enumerate(run_distributed(fit_all_on_shards, 4, folder=str(tmp_path))):
        for case, losses in zip(SHARD_CASES, curves, strict=True):
            assert losses == pytest.approx(expected, rel=LOSS_TOLERANCE), f"{case}, rank {rank}"
