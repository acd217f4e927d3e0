"""Every fault once, each in another phase of a step; all of them in all phases: python -m tests.chaos.matrix."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.faults import FAULTS, PARTS, named
from tests.chaos.matrix import CONFIG, Lab, may_mount, run_case, table
from tests.chaos.ranks import TINY, launch
from tests.chaos.soak import IN_USE, growth, is_flat
from tests.data.shard_factory import make_shards

QUICK = {"SIGTERM to all ranks"}

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    yield Lab(tmp_path_factory.mktemp("chaos"))


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        pytest.param(
            fault.name,
            list(PARTS)[number % len(PARTS)],
            id=fault.name,
            marks=[] if fault.name in QUICK else [pytest.mark.slow],
        )
        for number, fault in enumerate(FAULTS)
    ],
)
def test_what_comes_of_a_fault(name: str, phase: str, lab: Lab) -> None:
    if name.startswith("disk") and not may_mount():
        pytest.skip("no right to mount a tmpfs")
    assert run_case(lab, named(name), phase)["fault"] == name


@pytest.fixture(scope="module")
def lab_of_adamw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    yield Lab(tmp_path_factory.mktemp("adamw"), "optim.name=adamw")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["encode", "optimizer", "save"])
@pytest.mark.parametrize("name", ["flipped weight", "flipped moment", "NaN master weight"])
def test_what_comes_of_state_that_forgets_with_adamw(name: str, phase: str, lab_of_adamw: Lab) -> None:
    """Its weights have moved when that is told."""
    assert run_case(lab_of_adamw, named(name), phase)["fault"] == name


OTHERWISE = {
    "optim.lr_vision=1e-3": "rank 1 on .* has optim.lr_vision 0.001, others ",
    "train.seed=5": "rank 1 on .* has train.seed 5, others ",
    "train.patch_dropout=0.25": "rank 1 on .* has train.patch_dropout 0.25",
    "train.precision=bf16": "rank 1 on .* has train.precision 'bf16'",
    "parallel.tensor=2": "rank 1 on .* has parallel.tensor 2, others 1",
    "train.steps=3": "rank 1 on .* has train.steps 3",
    "health.on_nonfinite=skip": "rank 1 on .* has health.on_nonfinite 'skip'",
    "run_dir=elsewhere": "rank 1 on .* has run_dir 'elsewhere'",
    "train.global_batch_size=7": "rank 1 on .*global_batch_size 7",  # which it finds itself, as no other rank does
}


@pytest.mark.slow
@pytest.mark.parametrize("override", OTHERWISE)
def test_one_rank_with_another_config_is_one_line_before_any_step(override: str, tmp_path: Path) -> None:
    shards = ",".join(make_shards(tmp_path, [20]))
    settings = [*TINY, f"data.shards=[{shards}]", "train.steps=2", f"run_dir={tmp_path / 'run'}"]
    usual = [setting for setting in settings if setting.partition("=")[0] == override.partition("=")[0]]
    settings = [setting for setting in settings if setting not in usual]
    start = launch(CONFIG, settings, 2, tmp_path / "log", overrides_of={0: usual, 1: [override]})
    assert all(start.end()), start.text
    said = start.own_errors()
    assert len(said) == 1 and re.search(OTHERWISE[override], said[0]), start.text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_table_has_a_line_for_each_outcome_of_a_fault() -> None:
    base = {"fault": "NaN gradient", "same": "equal to the bit", "said": "", "known_s": 2.4}
    rows = [base | {"phase": phase, "outcome": "goes on"} for phase in ("loss", "gather")]
    ended = {"phase": "reduce", "outcome": "ends", "said": "error: step 5", "fewer": "2e-07", "lost": 1, "again_s": 9.6}
    lines = table([*rows, base | ended]).splitlines()[2:]
    assert lines == [
        "| NaN gradient | loss, gather | goes on | – | – | – | equal to the bit | – |",
        "| NaN gradient | reduce | ends: `step 5` | 2 | 10 | 1 | equal to the bit | within 2e-07 |",
    ]


def test_a_soak_is_flat_while_holes_grow_and_is_not_when_what_is_in_use_does(tmp_path: Path) -> None:
    """Growth begins once a start is warm: what the first save and the first collectives take stays out."""
    for rank, of_step in ((0, 0.5), (1, 40.0)):
        folder = tmp_path / str(rank)
        folder.mkdir()
        rows = ((step, 200_000 + 40 * step, 150_000 + max(60, step) * of_step, *[7] * 5) for step in range(0, 200, 10))
        lines = [" ".join(f"{number:.0f}" for number in row) for row in rows]
        (folder / f"samples_{rank}_1").write_text("\n".join(lines))
        slopes = growth(folder)
        assert slopes[IN_USE] == [pytest.approx(of_step, abs=0.01)] and slopes["threads"] == [pytest.approx(0)]
        assert is_flat(slopes) == (of_step < 1)


def test_faults_have_names_of_their_own() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 21
