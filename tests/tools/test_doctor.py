"""The doctor's report: what it looks at, what it finds wrong, and that it goes on after a check that raises."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.parallel.device import prepare
from engine.parallel.mesh import build_mesh
from models.versions import MEGATRON_CORE
from tests.distributed import run_distributed
from tools.doctor import libraries, machine
from tools.doctor import ranks as rank_checks
from tools.doctor.__main__ import main
from tools.doctor.rows import NOTE, OK, WRONG


def _two_ranks() -> dict[str, Any]:
    """Verdicts of a sound job, of one whose second rank computes wrongly, and of one whose second rank is slow."""
    device, mesh = prepare(), build_mesh(1, 1, dist.group.WORLD)
    sound = rank_checks.rank_rows(mesh, device)
    axis, second = mesh.world, mesh.world.rank == 1
    wrong = rank_checks._row("sum", "GB/s", 1.0, not second, axis, device.torch_device)
    slow = rank_checks._row("sum", "GB/s", 0.1 if second else 1.0, True, axis, device.torch_device)
    return {
        "sound": [(row.what, row.verdict) for row in sound],
        "wrong": (wrong.verdict, wrong.found),
        "slow": (slow.verdict, slow.advice),
    }


@pytest.mark.dist
def test_every_rank_is_compared_with_the_others() -> None:
    for found in run_distributed(_two_ranks, 2):
        assert [what.split()[0] for what, _ in found["sound"]] == ["product", "sum"]
        assert WRONG not in dict(found["sound"]).values()
        assert found["wrong"] == (WRONG, "wrong numbers on ranks [1]")
        assert found["slow"][0] == NOTE and "ranks [1] are below" in found["slow"][1]


def test_the_known_product_tells_a_wrong_one() -> None:
    product, expected = rank_checks._known_product(512, torch.bfloat16, torch.device("cpu"))
    assert bool((product() == expected).all()) and 64 < expected <= 256


def test_what_is_too_small_is_noted_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SHARED_MEMORY_GB", 1e9)
    monkeypatch.setattr(machine, "OPEN_FILES", 1 << 40)
    monkeypatch.setattr(machine.socket, "gethostname", lambda: "no-such-host.invalid")
    rows = {row.what: row for row in machine.machine_rows()}
    for what, cure in (("shared memory", "--shm-size"), ("open files", "ulimit -n"), ("host name", "SOCKET_IFNAME")):
        assert rows[what].verdict == NOTE and cure in rows[what].advice


def test_versions_outside_the_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, verdict in (("0.16.0", WRONG), ("0.16.1", OK), ("0.20.1", NOTE)):
        row = libraries._required(MEGATRON_CORE, found)
        assert row.verdict == verdict and found in row.found and "0.16.1 to 0.19" in row.found


def test_the_report_of_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "doctor.json"
    assert main(["--out", str(out), "--config", "examples/quickstart/train.yaml"]) == 0
    text = capsys.readouterr().out
    rows = {row["what"]: row for row in json.loads(out.read_text())}
    for what in ("Python", "torch", "megatron-core", "shared memory", "open files", "kernels in bf16"):
        assert what in rows and f"{what} " in text
    assert "nothing is wrong" in text
    monkeypatch.setattr(libraries, "library_rows", lambda: 1 / 0)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert main(["--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "libraries                    ZeroDivisionError: division by zero  [wrong]" in said.out
    assert "kernels in fp32" in said.out and said.err.count("\n") == 1 and "libraries" in said.err
