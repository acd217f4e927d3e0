"""The doctor's report: what it looks at, what it finds wrong, and that it goes on after a check that raises."""

import json
import os
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.read import load_config
from engine.parallel import preflight
from engine.parallel.device import prepare
from engine.parallel.mesh import build_mesh
from models.blocks import kernels as chosen
from models.blocks.packages import Package
from models.versions import MEGATRON_CORE
from tests.distributed import run_distributed, world
from tools.doctor import kernels, libraries, machine
from tools.doctor import ranks as rank_checks
from tools.doctor.__main__ import main
from tools.doctor.rows import NOTE, OK, WRONG


def _two_ranks(folder: str) -> dict[str, Any]:
    """Rows of a sound job, and of the start of one, which says what it found."""
    device, mesh = prepare(), build_mesh(2, 1, world())
    rows = rank_checks.rank_rows(mesh, device, Path(folder))
    preflight.preflight(mesh, device, Path(folder))
    return {"rows": [(row.what, row.verdict, row.found) for row in rows]}


@pytest.mark.dist
def test_every_rank_is_compared_with_the_others(tmp_path: Path) -> None:
    for found in run_distributed(_two_ranks, 2, folder=str(tmp_path)):
        whats = [what for what, _, _ in found["rows"]]
        starts = ("product 512", "copy of", "sum of 1 MiB, gloo, tensor", "sum of 1 MiB, gloo, world", "writing to")
        for what, start in zip(whats, (*starts, "clocks", "free shared", "open files"), strict=True):
            assert what.startswith(start)
        assert WRONG not in {verdict for _, verdict, _ in found["rows"]}
        assert "GB/s" in found["rows"][4][2] and " s apart" in found["rows"][5][2]
    assert list(tmp_path.iterdir()) == []


def _verdict(*ranks: tuple[str, float | None, bool]) -> tuple[str, str, str]:
    row = rank_checks.row_of(preflight.compare("sum", "GB/s", ranks))
    return row.verdict, row.found, row.advice


def test_whoever_stands_out_is_named_with_its_host() -> None:
    usual = [("a", 1.0, True), ("a", 1.1, True), ("b", 0.9, True)]
    assert _verdict(*usual)[0] == OK
    slow, found, advice = _verdict(*usual, ("b", 0.1, True))
    assert slow == NOTE and found == "0.95 GB/s, 0.1 to 1.1 on 4 rank(s)"
    assert advice == "rank 3 on b below 70% of the median: a step waits for its slowest rank"
    assert _verdict(*usual, ("c", 1.0, False))[:2] == (WRONG, "wrong numbers on rank 3 on c")
    assert _verdict(*usual, ("c", None, True))[1] == "1 GB/s, 0.9 to 1.1 on 3 rank(s)"
    together = preflight.clocks([("a", 100.0), ("b", 100.2)])
    assert (together.found, together.advice) == ("0.200 s apart", "")
    assert preflight.clocks([("a", 0.0), ("b", 0.1), ("c", 3600.0)]).advice == "rank 2 on c: set them by NTP"
    little = preflight._least("open files", [65536, 1024], 4096, "", ["a", "b"], "ulimit")
    assert little.advice.startswith("rank 1 on b below 4096")


def test_a_start_with_a_rank_that_computes_wrongly_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = preflight.Finding("product", "1 TFLOP/s", wrong="rank 3 on b")
    monkeypatch.setattr(preflight, "look_over", lambda *_: [bad])
    mesh: Any = types.SimpleNamespace(world=types.SimpleNamespace(rank=0))
    with pytest.raises(preflight.UnfitRank, match="before the first step: product: rank 3 on b"):
        preflight.preflight(mesh, prepare(), Path())


def test_the_known_product_tells_a_wrong_one() -> None:
    product, expected = preflight.known_product(512, torch.bfloat16, torch.device("cpu"))
    assert bool((product() == expected).all()) and 64 < expected <= 256


def test_what_is_too_small_is_noted_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SHARED_MEMORY_GB", 1e9)
    monkeypatch.setattr(preflight, "OPEN_FILES", 1 << 40)
    monkeypatch.setattr(machine.socket, "gethostname", lambda: "no-such-host.invalid")
    rows = {row.what: row for row in [*machine.machine_rows(), *machine.limit_rows()]}
    for what, cure in (("shared memory", "--shm-size"), ("open files", "ulimit -n"), ("host name", "SOCKET_IFNAME")):
        assert rows[what].verdict == NOTE and cure in rows[what].advice


def test_versions_outside_the_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, verdict in (("0.16.0", WRONG), ("0.16.1", OK), ("0.20.1", NOTE)):
        row = libraries._in_range(MEGATRON_CORE, found)
        assert row.verdict == verdict and found in row.found and "0.16.1 to 0.19" in row.found
    optional = libraries._in_range(libraries._DALI, "1.53.0", older=NOTE)
    assert (optional.verdict, "2.3 to 2.4" in optional.found, "nvidia-dali" in optional.advice) == (NOTE, True, True)


def test_what_a_job_asks_for_and_cannot_have_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("examples/quickstart/train.yaml", ["data.decoder=pillow"])
    assert [(row.found, row.verdict) for row in kernels.job_rows(config)] == [
        ("local linears, sdpa attention, torch norms", OK),
        ("PillowDecoder", OK),
    ]
    lacking = Package("no-such-kernels", "no_such_kernels", "model.norm_kernel=apex", "a source that nobody has")
    monkeypatch.setattr(chosen, "APEX", lacking)
    asks = replace(config, model=replace(config.model, norm_kernel="apex"))
    wrong = kernels.job_rows(asks)[0]
    assert wrong.verdict == WRONG and "no-such-kernels, which cannot be imported" in wrong.found


def test_the_report_of_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "doctor.json"
    assert main(["--out", str(out), "--config", "examples/quickstart/train.yaml"]) == 0
    text = capsys.readouterr().out
    rows = {row["what"]: row for row in json.loads(out.read_text())}
    expected = ("Python", "torch", "megatron-core", "numpy", "shared memory", "open files", "kernels in bf16")
    for what in (*expected, "the job's kernels", "the job's decoder"):
        assert what in rows and f"{what} " in text
    assert "nothing is wrong" in text
    monkeypatch.setattr(libraries, "library_rows", lambda: 1 / 0)
    monkeypatch.setitem(sys.modules, "tools.doctor.kernels", None)  # as where megatron-core cannot be imported
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert main(["--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "libraries                    ZeroDivisionError: division by zero  [wrong]" in said.out
    assert "kernels                      ModuleNotFoundError" in said.out and "product 512" in said.out
    assert said.err.count("\n") == 1 and "libraries" in said.err
