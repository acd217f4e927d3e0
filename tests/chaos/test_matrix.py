"""Every fault once, each in another phase of a step; all of them in all phases: python -m tests.chaos.matrix."""

from collections.abc import Iterator

import pytest

from tests.chaos.faults import FAULTS, PARTS, named
from tests.chaos.matrix import Lab, may_mount, run_case, table

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


def test_the_table_has_a_line_for_each_outcome_of_a_fault() -> None:
    base = {"fault": "NaN gradient", "same": "equal to the bit", "said": "", "known_s": 2.4}
    rows = [base | {"phase": phase, "outcome": "goes on"} for phase in ("loss", "gather")]
    ended = {"phase": "reduce", "outcome": "ends", "said": "error: step 5", "fewer": "2e-07", "lost": 1, "again_s": 9.6}
    lines = table([*rows, base | ended]).splitlines()[2:]
    assert lines == [
        "| NaN gradient | loss, gather | goes on | – | – | – | equal to the bit | – |",
        "| NaN gradient | reduce | ends: `step 5` | 2 | 10 | 1 | equal to the bit | within 2e-07 |",
    ]


def test_faults_have_names_of_their_own() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 21
