"""The timeline tool on spans made by hand, where every share is known."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.pipeline.clock import Phases, write_spans
from engine.pipeline.program import Unit
from tools.timeline.__main__ import main, table
from tools.timeline.spans import read_step


class _Clock:
    """Reads the given times one after the other."""

    def __init__(self, *times_s: float):
        self.times_s = list(times_s)

    def __call__(self) -> float:
        return self.times_s.pop(0)


def _record(run_dir: Path, rank: int, step: int, spans: list[tuple[Any, ...]], zero_s: float = 100.0, **place: int):
    """Spans (phase, start, stop[, micro-batch, chunk]) through the engine's own recorder."""
    phases = Phases(clock=_Clock(*(zero_s + t for span in spans for t in span[1:3])), record_spans=True)
    for name, _, _, *unit in spans:
        with phases.time(name, Unit(micro_batch=unit[0], chunk=unit[1]) if unit else None):
            pass
    write_spans(run_dir, rank, {"tensor": 0, "pipeline": rank, "data": 0} | place, step, zero_s, phases)


def _two_stages(run_dir: Path, step: int = 3) -> None:
    _record(run_dir, 0, step, [("encode", 0, 2, 0, 0), ("encode", 2, 4, 1, 0), ("exchange", 4, 5), ("loss", 9, 10)])
    _record(run_dir, 1, step, [("encode_text", 0, 1), ("wait", 1, 2), ("encode", 2, 8, 0, 1), ("loss", 8, 9)], 7.0)


def test_the_shares_of_each_rank(tmp_path: Path) -> None:
    _two_stages(tmp_path)
    timeline = read_step(tmp_path)
    assert timeline.seconds == pytest.approx(10)
    assert [timeline.idle(row) for row in timeline.rows] == pytest.approx([0.4, 0.2])
    lines = table(timeline).splitlines()
    assert lines[1].split() == ["0", "PP", "0", "50.0%", "10.0%", "40.0%"]
    assert lines[2].split() == ["1", "PP", "1", "80.0%", "0.0%", "20.0%"]


def test_picture_and_trace_stand_beside_the_spans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _two_stages(tmp_path)
    assert main([str(tmp_path)]) == 0
    png, trace = tmp_path / "timeline" / "step_000003.png", tmp_path / "timeline" / "step_000003.json"
    assert capsys.readouterr().out.splitlines()[-2:] == [str(png), str(trace)]
    with Image.open(png) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=1 << 20) or ()}
    encode, loss, idle = (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73), (0xF0, 0xF2, 0xF5)
    assert {encode, loss, idle} <= colours


def test_the_trace_has_a_process_a_replica_and_a_thread_a_rank(tmp_path: Path) -> None:
    _two_stages(tmp_path)
    _record(tmp_path, 5, 3, [("encode", 0, 2, 0, 0)], pipeline=1, data=1)
    trace = tmp_path / "trace.json"
    assert main([str(tmp_path), "--trace", str(trace)]) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 9
    assert {(event["pid"], event["tid"]) for event in spans} == {(0, 0), (0, 1), (1, 5)}
    second = spans[1]
    assert (second["name"], second["ts"], second["dur"]) == ("encode", pytest.approx(2e6), pytest.approx(2e6))
    assert second["args"] == {"step": 3, "micro_batch": 1, "chunk": 0}
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {0: "rank 0 · DP 0 · PP 0", 1: "rank 1 · DP 0 · PP 1", 5: "rank 5 · DP 1 · PP 1"}


def test_the_last_step_that_all_ranks_recorded(tmp_path: Path) -> None:
    for step in (3, 7):
        _two_stages(tmp_path, step)
    _record(tmp_path, 0, 9, [("encode", 0, 1, 0, 0)])
    assert read_step(tmp_path).step == 7
    assert read_step(tmp_path, 3).step == 3


def test_of_a_step_recorded_twice_the_later_one_counts(tmp_path: Path) -> None:
    """A resumed run appends to the same files."""
    _record(tmp_path, 0, 3, [("encode", 0, 2, 0, 0), ("encode", 2, 5, 1, 0)])
    _record(tmp_path, 0, 3, [("encode", 0, 1, 0, 0), ("encode", 1, 2, 1, 0)])
    assert [span.stop_s for span in read_step(tmp_path).rows[0].spans] == pytest.approx([1, 2])
    _record(tmp_path, 0, 4, [("encode", 0, 1, 0, 0)])
    _record(tmp_path, 0, 3, [("encode", 0, 7, 0, 0)])
    assert read_step(tmp_path, 3).seconds == pytest.approx(7)


def test_many_ranks_fit_in_a_picture(tmp_path: Path) -> None:
    for rank in range(96):
        _record(
            tmp_path, rank, 0, [("replay", 0, 1, 0, 0), ("backward", 1, 3, 0, 1)], pipeline=rank % 8, data=rank // 8
        )
    png = tmp_path / "many.png"
    assert main([str(tmp_path), "--png", str(png)]) == 0
    with Image.open(png) as picture:
        assert picture.height < 5000


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        (None, [], "no rank_*.jsonl: train with log.timeline_steps"),
        (['{"rank": 0}'], [], "rank_00000.jsonl, line 1: not a span"),
        (["{"], [], "rank_00000.jsonl, line 1: not a span"),
        (["@span", "[]"], [], "line 2: not a span"),
        (["@span"], ["--step", "4"], "step 4 is not recorded by rank_00000; recorded by all ranks: [3]"),
        (["@backwards"], [], "ends at 1.0 before it starts at 2.0"),
        ([], [], "no step in"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lines: list[str] | None,
    arguments: list[str],
    message: str,
) -> None:
    span = {"rank": 0, "tensor": 0, "pipeline": 0, "data": 0, "step": 3, "phase": "loss", "start_s": 0, "stop_s": 1}
    known = {"@span": json.dumps(span), "@backwards": json.dumps(span | {"start_s": 2})}
    if lines is not None:
        (tmp_path / "timeline").mkdir()
        text = "".join(known.get(line, line) + "\n" for line in lines)
        (tmp_path / "timeline" / "rank_00000.jsonl").write_text(text)
    assert main([str(tmp_path), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
