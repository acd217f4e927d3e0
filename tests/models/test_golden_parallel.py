"""The same fixtures through the engine's schedule, cut by tensor, pipeline and data parallelism.

One launch a number of ranks runs all its cases. Features come from the schedule's own encode phase, gradients from its
replay, after the reductions of the trainer.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.phases import first_phase
from engine.config.read import Config, ConfigError, ParallelConfig
from engine.feed import LocalBatch
from engine.objectives.contrastive.passes import LossResult
from engine.objectives.contrastive.step import ContrastiveStep
from engine.objectives.contrastive.towers import KeptPatches
from engine.parallel.device import prepare
from engine.parallel.launch import job
from engine.parallel.mesh import Mesh, build_mesh
from engine.trainer import Trainer
from tests.distributed import run_distributed, world
from tests.gather import backward_only, contrastive_step, gather_objects, whole_gradients
from tests.golden import (
    ARCHITECTURES,
    PATCH_DROPOUT_GRADIENTS,
    TOLERANCE,
    config_of,
    deviation,
    deviations,
    load_io,
    load_weights,
    local_batch,
    logical,
    noise,
)

pytestmark = pytest.mark.dist


@dataclass(frozen=True)
class Case:
    """One fixture at one layout."""

    fixture: str
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = True
    micro_batch: int = 4
    dropout: bool = False
    keep: int = 0
    width: int = 0
    """Another width of the vision tower (so another number of heads), with weights of noise: no fixture has it."""

    def __str__(self) -> str:
        parts = [self.fixture, f"tp{self.tensor}", f"pp{self.pipeline}", "sp" if self.sequence else "nosp"]
        return "-".join([*parts, f"mb{self.micro_batch}", f"keep{self.keep}"]) + ("-dropout" if self.dropout else "")

    def config(self) -> Config:
        """The job of this case."""
        return config_of(
            self.fixture,
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.sequence={self.sequence}",
            f"train.micro_batch_size={self.micro_batch}",
            f"train.keep_activations={self.keep}",
            f"train.patch_dropout={0.5 if self.dropout else 0.0}",
            *([f"model.vision.width={self.width}"] if self.width else []),
        )


# Even heads: both towers at TP 2. Three heads (tiny-bigE, tiny-eva02-B) cannot; see the tests below and the 3 ranks.
EVEN = ("tiny-18b", "tiny-8b")
CASES = {
    2: [
        *(Case(f, tensor=2, sequence=s, dropout=d) for f in EVEN for s in (True, False) for d in (False, True)),
        *(Case(f, pipeline=2, dropout=d) for f in ARCHITECTURES for d in (False, True)),
        Case("tiny-18b", pipeline=2, micro_batch=1, keep=3),
        Case("tiny-18b", tensor=2, micro_batch=2, keep=-1),
        *(Case("tiny-eva02-B", tensor=2, sequence=s, dropout=s, width=64) for s in (True, False)),
    ],
    3: [
        # 360 MLP channels and 3 heads divide by 3; 8 x 9 kept tokens do, 8 x 17 do not: no sequence parallelism there.
        Case("tiny-bigE", tensor=3, sequence=False),
        Case("tiny-bigE", tensor=3, micro_batch=8, dropout=True),
        Case("tiny-eva02-B", pipeline=3),
    ],
    4: [
        *(Case(f, tensor=2, pipeline=2, sequence=s, dropout=s) for f in EVEN for s in (True, False)),
        Case("tiny-18b", tensor=2, pipeline=2),
        Case("tiny-18b", tensor=4),
        Case("tiny-8b", tensor=2, sequence=True, micro_batch=2),
        Case("tiny-eva02-B", tensor=4, width=64),
        Case("tiny-eva02-B", tensor=2, pipeline=2, width=64, dropout=True),
        *(Case(f, pipeline=4, micro_batch=2) for f in ARCHITECTURES),
        *(Case(f, pipeline=2, micro_batch=2, dropout=True) for f in ARCHITECTURES),
    ],
}


FAST = {
    2: [
        Case("tiny-18b", tensor=2, dropout=True),
        Case("tiny-18b", tensor=2, sequence=False),
        Case("tiny-8b", tensor=2),
        Case("tiny-8b", pipeline=2, dropout=True),
        Case("tiny-eva02-B", pipeline=2),
        Case("tiny-18b", pipeline=2, micro_batch=1, keep=3),
        Case("tiny-18b", tensor=2, micro_batch=2, keep=-1),
        Case("tiny-eva02-B", tensor=2, sequence=False, width=64),
    ],
    3: [Case("tiny-bigE", tensor=3, micro_batch=8, dropout=True), Case("tiny-eva02-B", pipeline=3)],
    4: [
        Case("tiny-18b", tensor=2, pipeline=2, dropout=True),
        Case("tiny-8b", tensor=2, pipeline=2, sequence=False),
        Case("tiny-18b", tensor=4),
        Case("tiny-eva02-B", tensor=2, pipeline=2, width=64, dropout=True),
        Case("tiny-bigE", pipeline=4, micro_batch=2),
        Case("tiny-eva02-B", pipeline=2, micro_batch=2, dropout=True),
    ],
}
"""Each architecture on each axis, with and without what can be switched; the other pairs are slow."""


class _FixturePatches(KeptPatches):
    """The patches that the fixture kept, in place of drawn ones."""

    def __init__(self, kept: Tensor):
        self.fixture, self.frames = kept, 1

    def of(self, batch: LocalBatch, samples: slice) -> Tensor:
        return self.fixture[torch.from_numpy(batch.positions[samples])]


def one_pass(case: Case, mesh: Mesh) -> dict[str, Any]:
    """Schedule and reductions on the fixture's batch: loss; on rank 0 also all embeddings and whole gradients."""
    io = load_io(case.fixture)
    trainer = Trainer(first_phase(case.config()), mesh, prepare())
    load_weights(trainer.towers, noise(trainer.towers) if case.width else logical(case.fixture, "weights"))
    step = contrastive_step(trainer)
    if case.dropout:
        _keep_patches_of_fixture(step, io["pd.keep_indices"])
    rows: list[tuple[Tensor, Tensor]] = []

    def loss(image_rows: Tensor, text_rows: Tensor) -> LossResult:
        rows.append((image_rows, text_rows))
        return step.loss(image_rows, text_rows)

    result = backward_only(step, local_batch(io["images_u8"], io["text"], mesh), loss)
    return {"loss": result.loss, "gradients": whole_gradients(trainer)} | _all_rows(*rows[0], mesh)


def _keep_patches_of_fixture(step: ContrastiveStep, kept: Tensor) -> None:
    for runner in step.vision:
        runner.kept = _FixturePatches(kept)


def _all_rows(images: Tensor, text: Tensor, mesh: Mesh) -> dict[str, Tensor]:
    """Embeddings [8, D] of images and captions, on rank 0: replicas in order, within each its ranks in order."""
    everyone = gather_objects((mesh.data.rank, mesh.replica.rank, images, text), mesh.world)
    if not everyone:
        return {}
    everyone.sort(key=lambda entry: entry[:2])
    return {"images": torch.cat([entry[2] for entry in everyone]), "text": torch.cat([entry[3] for entry in everyone])}


def run_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """All cases on the ranks of this launch."""
    mesh = cache(lambda tensor, pipeline: build_mesh(tensor, pipeline, world()))
    return [one_pass(case, mesh(case.tensor, case.pipeline)) for case in cases]


Outcomes = dict[tuple[int, bool], dict[Case, dict[str, Any]]]
"""(ranks, whether fast) -> case -> what rank 0 returned."""


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    """Filled by the first test of each launch."""
    return {}


def _outcome(ranks: int, case: Case, outcomes: Outcomes) -> dict[str, Any]:
    launch = ranks, case in FAST[ranks]
    if launch not in outcomes:
        cases = [one for one in CASES[ranks] if (one in FAST[ranks]) == launch[1]]
        outcomes[launch] = dict(zip(cases, run_distributed(run_cases, ranks, cases=cases)[0], strict=True))
    return outcomes[launch][case]


def _cases(*, with_fixture: bool) -> list:
    pairs = [(n, case) for n, cases in CASES.items() for case in cases if with_fixture != bool(case.width)]
    return [
        pytest.param(n, case, id=f"{n}ranks-{case}", marks=[] if case in FAST[n] else [pytest.mark.slow])
        for n, case in pairs
    ]


def test_the_fast_cases_are_cases_and_each_architecture_is_among_them() -> None:
    assert all(case in CASES[ranks] for ranks, cases in FAST.items() for case in cases)
    assert {case.fixture for cases in FAST.values() for case in cases if not case.width} == set(ARCHITECTURES)


@pytest.mark.parametrize(("ranks", "case"), _cases(with_fixture=True))
def test_embeddings_loss_and_every_gradient(ranks: int, case: Case, outcomes: dict) -> None:
    outcome, io = _outcome(ranks, case, outcomes), load_io(case.fixture)
    loss = io["pd.learned.loss" if case.dropout else "learned.loss"]
    torch.testing.assert_close(outcome["loss"].float(), loss, rtol=1e-5, atol=0)
    images = io["pd.image_features_norm" if case.dropout else "image_features_norm"]
    assert deviation(outcome["images"], images) < TOLERANCE
    assert deviation(outcome["text"], io["text_features_norm"]) < TOLERANCE
    if not case.dropout:
        assert not deviations(outcome["gradients"], logical(case.fixture, "grads"))
    elif case.fixture in PATCH_DROPOUT_GRADIENTS:
        assert not deviations(outcome["gradients"], logical(case.fixture, "grads_patch_dropout"))


@pytest.mark.parametrize(("ranks", "case"), _cases(with_fixture=False))
def test_the_eva02_switches_equal_their_own_one_process_run(ranks: int, case: Case, outcomes: dict) -> None:
    """Sub-LN over split channels, SwiGLU, separate q/k/v and rope, which no fixture with an even head number has."""
    with job(ParallelConfig()) as (mesh, _):
        alone = one_pass(replace(case, tensor=1, pipeline=1), mesh)
    outcome = _outcome(ranks, case, outcomes)
    torch.testing.assert_close(outcome["loss"], alone["loss"], rtol=1e-5, atol=0)
    assert deviation(outcome["images"], alone["images"]) < TOLERANCE
    assert not deviations(outcome["gradients"], alone["gradients"])


@pytest.mark.parametrize("fixture", ["tiny-bigE", "tiny-eva02-B"])
def test_three_heads_at_tp_2_are_refused_with_the_reason(fixture: str) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor 2 does not divide the 3 attention heads"):
        Case(fixture, tensor=2).config()


def test_an_mlp_width_that_does_not_divide_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor 3 does not divide the MLP width 128"):
        Case("tiny-eva02-B", tensor=3).config()
