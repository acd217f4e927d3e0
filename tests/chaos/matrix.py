"""Every fault in every phase of a step, and what came of it, as the table of docs/results/reliability.md.

    python -m tests.chaos.matrix --out matrix.jsonl [--faults TEXT] [--phases encode,save] [--write]

Cases that the file already holds are not run again; --write puts the table into the docs. Two data-parallel ranks, the
second is disturbed in the sixth of eight steps, a checkpoint every two. Then the job is started again on as many ranks,
and a copy of it on one. Faults of a disk need the right to mount a tmpfs, and are left out without it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from re import search
from typing import Any

from engine.callbacks.metrics import read_metrics
from engine.resilience.exit import STOPPED
from engine.resilience.status import read_status
from engine.resilience.watch import HUNG
from tests.chaos.faults import FAULTS, PARTS, Fault, Place, as_dict, disturb, named, note_first_step
from tests.chaos.ranks import TINY, Start, launch
from tests.data.shard_factory import make_shards

CONFIG = "examples/quickstart/train.yaml"
STEPS, EVERY, STEP, RANKS = 8, 2, 5, 2
CLOSE = 1e-5
"""Relative difference of a loss on other numbers of ranks."""
DISK_MB = 200
PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "reliability.md"
BEGIN, END = "<!-- table of tests/chaos/matrix.py -->\n", "<!-- end of that table -->\n"
Curve = list[tuple[Any, ...]]


class Lab:
    """Folders, shards and the undisturbed curve of all cases."""

    def __init__(self, root: Path, *settings: str):
        """settings: of every job, beside those of its case."""
        self.root, self.settings = root, settings
        (root / "shards").mkdir()
        make_shards(root / "shards", [20, 28])
        place = self.place("undisturbed", "encode")
        start = self.start(place, ())
        assert start.end() == [0] * RANKS, start.text
        self.undisturbed = curve(place.run_dir)
        assert len(self.undisturbed) == STEPS

    def place(self, name: str, phase: str) -> Place:
        """A folder of its own for a case."""
        folder = Path(tempfile.mkdtemp(dir=self.root, prefix=name.replace(" ", "_").replace("`", "")[:20]))
        shutil.copytree(self.root / "shards", folder / "shards")
        for part in ("disk", "scratch"):
            (folder / part).mkdir()
        step = STEP + 1 if phase == "save" else STEP
        return Place(1, step, phase, folder / "disk" / "run", folder / "shards", folder / "scratch")

    def start(
        self,
        place: Place,
        overrides: tuple[str, ...],
        prepare: Callable[..., None] | None = None,
        *,
        ranks: int = RANKS,
        run_dir: Path | None = None,
        log: str = "log",
    ) -> Start:
        """Start the job of a case."""
        shards = ",".join(str(path) for path in sorted(place.shards.glob("*.tar")))
        own = [f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY}", f"run_dir={run_dir or place.run_dir}"]
        if not any(setting.startswith("data.workers") for setting in overrides):
            own.append("data.workers=0")
        settings = [*TINY, f"data.shards=[{shards}]", *own, *self.settings, *overrides]
        return launch(CONFIG, settings, ranks, place.scratch / log, prepare=prepare)


def curve(run_dir: Path) -> Curve:
    """What must be equal to the bit, a row a step."""
    names = ("step", "loss", "grad_norm", "samples_seen", "logit_scale")
    return [tuple(record[name] for name in names) for record in read_metrics(run_dir / "metrics.jsonl")]


def run_case(lab: Lab, fault: Fault, phase: str) -> dict[str, Any]:
    """Disturb a job, look at what it says and leaves, start it again; a row of the table. Raises AssertionError."""
    place = lab.place(f"{fault.name} {phase}", phase)
    with _disk(place, fault):
        start = lab.start(place, fault.overrides, partial(_disturb, fault.name, as_dict(place)))
        statuses = start.end()
        ended = time.monotonic()
        fired = place.scratch / "fired"
        assert fired.exists(), f"the phase did not come: {start.text}"
        row: dict[str, Any] = {"fault": fault.name, "phase": phase, "known_s": ended - float(fired.read_text())}
        row |= _judge(lab, fault, place, start, statuses)
        fault.mend(place)
        if any(statuses):
            row |= _start_again(lab, fault, place, len(row.pop("left")))
    row.pop("left", None)
    shutil.rmtree(place.scratch.parent)
    return row


def _disturb(name: str, place: dict[str, Any], rank: int) -> None:
    disturb(rank, name, place)


def _judge(lab: Lab, fault: Fault, place: Place, start: Start, statuses: list[int]) -> dict[str, Any]:
    said, text = start.own_errors(), start.text
    left = curve(place.run_dir)
    line = said[0].replace(str(place.run_dir), "run_dir")[:120] if said else ""
    row = {"said": line, "left": left}
    if not any(statuses):
        assert fault.comes != "stops", text
        if left == lab.undisturbed:
            if fault.name.startswith("two jobs"):
                assert "is in use by" in (place.scratch / "second").read_text()
            return row | {"outcome": "goes on", "same": "equal to the bit"}
        assert fault.comes == "counted", text
        bad = read_metrics(place.run_dir / "metrics.jsonl")[-1]["bad_samples"]
        warned = [said for said in text.splitlines() if "WARNING" in said and "removed" in said]
        assert bad or warned, text
        return row | {"outcome": "goes on", "same": f"{bad} bad samples counted" if bad else "its loss is said"}
    if fault.comes == "stops":
        assert statuses == [STOPPED] * RANKS and read_status(place.run_dir)["outcome"] == "stopped", text
    else:
        assert fault.comes in ("ends", "counted") and statuses != [STOPPED] * RANKS, text
    if HUNG in statuses:
        status = read_status(place.run_dir)
        assert status["outcome"] == "failed" and status["reason"] in said[0], status
    assert len(said) == 1 and search(fault.says, said[0]) and fault.leaves in text, text
    return row | {"outcome": "stops in order" if fault.comes == "stops" else "ends"}


def _start_again(lab: Lab, fault: Fault, place: Place, reached: int) -> dict[str, Any]:
    fewer = place.run_dir.with_name("fewer")
    shutil.copytree(place.run_dir, fewer)
    if fault.comes == "counted":
        return {"same": "–"}
    began = time.monotonic()
    start = lab.start(place, (), partial(note_first_step, str(place.scratch)))
    alone = lab.start(place, (), ranks=1, run_dir=fewer, log="log_of_one")
    assert start.end() == [0] * RANKS, start.text
    first_step = place.scratch / "trained"
    trained = float(first_step.read_text()) if first_step.exists() else began  # all steps were done
    went_on = search(r"resumed from .*\(step (\d+)\)", start.text)
    lost = reached - (int(went_on[1]) if went_on else 0)
    assert curve(place.run_dir) == lab.undisturbed, start.text
    assert alone.end() == [0], alone.text
    off = _off(curve(fewer), lab.undisturbed)
    assert off < CLOSE, alone.text
    return {"same": "equal to the bit", "fewer": f"{off:.0e}", "lost": lost, "again_s": trained - began}


def _off(one: Curve, other: Curve) -> float:
    """Largest relative difference of a loss."""
    assert [row[0] for row in one] == [row[0] for row in other], "a step is missing or twice there"
    return max(abs(a[1] - b[1]) / abs(b[1]) for a, b in zip(one, other, strict=True))


@contextmanager
def _disk(place: Place, fault: Fault) -> Iterator[None]:
    """A small disk for the run folder, where the fault is about one."""
    if not fault.name.startswith("disk"):
        yield
        return
    disk = str(place.run_dir.parent)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def may_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
        return done.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


# --- the table -------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """A line a fault: phases, outcome, what was said, times, and the curve after going on."""
    head = (
        "| what was done to a rank | in the phases | outcome | seconds until all ended | until the next start trained "
        "| steps done again | curve on as many ranks | loss on one rank |\n" + "| --- " * 8 + "|\n"
    )
    lines = []
    for fault in FAULTS:
        of_fault = [row for row in rows if row["fault"] == fault.name]
        for outcome in dict.fromkeys((row["outcome"], row["same"]) for row in of_fault):
            same = [row for row in of_fault if (row["outcome"], row["same"]) == outcome]
            phases = [phase for phase in PARTS if any(row["phase"] == phase for row in same)]
            where = "all" if len(phases) == len(PARTS) else ", ".join(phases)
            numbers = (_range(same, "known_s"), _range(same, "again_s"), _range(same, "lost"))
            off = [float(row["fewer"]) for row in same if "fewer" in row]
            alike = (max(row["same"] for row in same), f"within {max(off):.0e}" if off else "–")
            cells = (fault.name, where, _outcome(same), *numbers, *alike)
            lines.append(f"| {' | '.join(cells)} |\n")
    return head + "".join(lines)


def _outcome(rows: list[dict[str, Any]]) -> str:
    said = next((row["said"] for row in rows if row["said"]), "")
    return f"{rows[0]['outcome']}: `{said.removeprefix('error: ')[:70]}`" if said else rows[0]["outcome"]


def _range(rows: list[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows if name in row]
    if not values or (name == "known_s" and rows[0]["outcome"] == "goes on"):
        return "–"
    low, high = round(min(values)), round(max(values))
    return f"{low}" if low == high else f"{low} to {high}"


def write(rows: list[dict[str, Any]], failed: int) -> None:
    """Put the table into the docs."""
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    counted = f"{len(rows)} cases of {len({row['fault'] for row in rows})} faults, {failed} of them not as wanted.\n\n"
    PAGE.write_text(before + BEGIN + counted + table(rows) + END + after, encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Run what is missing; 1 if any case is not as wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--faults", default="", help="those whose name holds this")
    parser.add_argument("--phases", default=",".join(PARTS))
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    known = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    done = {(row["fault"], row["phase"]) for row in known if "outcome" in row}
    phases = list(PARTS)
    cases = [
        (fault.name, phases[(number + turn) % len(phases)])
        for turn in range(len(phases))  # every fault once before any of them twice
        for number, fault in enumerate(FAULTS)
        if given.faults in fault.name
    ]
    cases = [case for case in cases if case not in done and case[1] in given.phases.split(",")]
    if not may_mount():
        cases = [case for case in cases if not case[0].startswith("disk")]
        print("no right to mount: the faults of a disk are left out")
    if cases:
        _run_all(cases, given.out, given.jobs)
    rows = [json.loads(line) for line in given.out.read_text().splitlines()]
    last = {(row["fault"], row["phase"]): row for row in rows}
    good = [row for row in last.values() if "outcome" in row]
    if given.write:
        write(good, len(last) - len(good))
    return int(len(good) < len(last))


def _run_all(cases: list[tuple[str, str]], out: Path, jobs: int) -> None:
    with tempfile.TemporaryDirectory(prefix="chaos-") as root, ThreadPoolExecutor(jobs) as pool:
        lab = Lab(Path(root))

        def run(case: tuple[str, str]) -> None:
            fault, phase = case
            try:
                row = run_case(lab, named(fault), phase)
            except Exception as problem:  # the others are run all the same
                row = {"fault": fault, "phase": phase, "problem": f"{type(problem).__name__}: {str(problem)[-6000:]}"}
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{fault}, {phase}: {row.get('outcome', 'NOT AS WANTED')}", flush=True)

        list(pool.map(run, cases))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
