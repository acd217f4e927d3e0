"""What a run shows to the outside: its history, the endpoint for Prometheus, the JSON log; and what is refused."""

import itertools
import json
import logging
import math
import os
import socket
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from engine.callbacks import history
from engine.callbacks.endpoint import MetricsEndpoint, as_text
from engine.callbacks.history import History, read_history, toll
from engine.callbacks.json_log import JsonLog
from engine.callbacks.metrics import MetricsFile, read_metrics
from engine.config.errors import ConfigError
from engine.config.read import resolve
from engine.config.sections import log as log_section
from tests.engine.test_callbacks import record, run_info
from tools.report.page import render
from tools.report.runs import load_runs


def one_start(run_dir: Path, first: int, last: int, *, killed: bool = False, **more: float) -> None:
    events, metrics = History(), MetricsFile()
    for callback in (events, metrics):
        callback.on_start(run_info(run_dir, start_step=first))
    for step in range(first, last):
        for callback in (events, metrics):
            callback.on_step(record(step, **more))
    metrics.on_end({})
    if not killed:
        events.on_end({})


@pytest.fixture(params=["another id", "the same id in a container of the same name"])
def other_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The next start runs in a process of its own."""
    numbers = itertools.count(100)

    def begin() -> None:
        number = next(numbers)
        if request.param == "another id":
            monkeypatch.setattr(os, "getpid", lambda: number)
        else:
            monkeypatch.setattr(history, "_DRAWN", str(number))

    return begin


def test_steps_before_the_first_checkpoint_are_lost_too(tmp_path: Path, other_process) -> None:
    for steps in (3, 5):
        other_process()
        one_start(tmp_path, 0, steps, killed=steps == 3)
    cost = toll(tmp_path, read_metrics(tmp_path / "metrics.jsonl"))
    assert cost is not None and (cost.starts, cost.steps_again, cost.lost_s) == (2, 3, pytest.approx(1.5))


def test_work_that_is_done_again_is_counted_with_its_seconds(tmp_path: Path, other_process) -> None:
    other_process()
    one_start(tmp_path, 0, 7, killed=True)
    other_process()
    one_start(tmp_path, 4, 9, rewinds=1, slowest_rank=3, slowest_over_median=1.8)
    cost = toll(tmp_path, read_metrics(tmp_path / "metrics.jsonl"))
    assert cost is not None
    assert (cost.starts, cost.steps_again, cost.rewinds, cost.slow_ranks) == (2, 3, 1, (3,))
    assert cost.lost_s == pytest.approx(3 * 0.5) and cost.steps_s == pytest.approx(9 * 0.5)
    assert cost.wall_s >= cost.down_s >= 0
    assert [event["event"] for event in read_history(tmp_path)] == ["start", "start", "rewind", "slow rank", "end"]
    page = render(load_runs([tmp_path]))
    assert "Starts and losses" in page
    for line in ("starts", "2"), ("steps done again", "3"), ("their time", "1.5 s"), ("rewinds", "1"):
        assert "".join(f"<td>{cell}</td>" for cell in line) in page


def test_goodput_is_of_the_time_since_the_first_start(tmp_path: Path) -> None:
    events = [
        {"time": 1000.0, "event": "start", "step": 0, "reached": 0},
        {"time": 1100.0, "event": "start", "step": 5, "reached": 8, "lost_s": 30.0, "alive": 1080.0},
        {"time": 1200.0, "event": "end", "step": 10},
    ]
    text = "".join(json.dumps(event) + "\n" for event in events) + '{"time": 12'  # of a killed writer
    (tmp_path / "history.jsonl").write_text(text)
    cost = toll(tmp_path, [{"step": step, "step_time_s": 10.0} for step in range(10)])
    assert cost is not None
    assert (cost.goodput, cost.down_s, cost.lost_s) == (0.5, 20.0, 30.0)
    assert toll(tmp_path / "none", []) is None


def test_durations_are_not_of_a_clock_that_is_set_while_the_job_runs(
    tmp_path: Path, other_process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours forwards in the first start, which was killed, and days back between it and the next one."""
    hours = iter([0.0, *[5.0] * 2, *[-48.0] * 9])
    monkeypatch.setattr(history.time, "time", lambda: 1e9 + 3600 * next(hours))
    seconds = iter([100.0, 101.0, 110.0, 111.0])  # two starts and their events
    monkeypatch.setattr(history.time, "clock_gettime", lambda _: next(seconds))
    other_process()
    one_start(tmp_path, 0, 4, killed=True, rewinds=1, eval_time_s=1.0)
    os.utime(tmp_path / "metrics.jsonl", (9e9, 9e9))  # the clock of a file server
    other_process()
    one_start(tmp_path, 2, 4)
    cost = toll(tmp_path, read_metrics(tmp_path / "metrics.jsonl"))
    assert cost is not None
    work_s = 4 * (0.5 + 1.0)
    assert (cost.down_s, cost.wall_s) == (pytest.approx(10 - work_s), pytest.approx(10 + 1))
    assert 0 < cost.goodput < 1


def test_a_phase_is_no_start(tmp_path: Path) -> None:
    one_start(tmp_path, 0, 3)
    one_start(tmp_path, 3, 5)
    assert [event["event"] for event in read_history(tmp_path)] == ["start", "end", "phase", "end"]


def _get(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=300) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return answer.read().decode()


def test_prometheus_reads_the_last_step_and_nothing_else(tmp_path: Path) -> None:
    endpoint = MetricsEndpoint("127.0.0.1", 0)
    endpoint.on_start(run_info(tmp_path / 'a"b'))
    endpoint.on_step(record(3, loss=math.nan, phase="warm"))
    text = _get(endpoint.port)
    labels = f'{{run="{tmp_path}/a\\"b"}}'
    assert f"# TYPE eva_megatron_step gauge\neva_megatron_step{labels} 3\n" in text
    assert f"eva_megatron_loss{labels} NaN\n" in text and "phase" not in text
    with pytest.raises(urllib.error.HTTPError, match="404"):
        _get(endpoint.port, "/metrics/../config.yaml")
    taken = endpoint.port
    with pytest.raises(OSError, match=f"log.metrics_port {taken}: Address already in use"):
        MetricsEndpoint("127.0.0.1", taken)
    endpoint.on_end({})
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", taken), timeout=300):
        pass


def test_infinite_numbers_have_their_names() -> None:
    assert as_text({"a b": math.inf, "c": -math.inf, "d": True}, "") == (
        b"# TYPE eva_megatron_a_b gauge\neva_megatron_a_b +Inf\n# TYPE eva_megatron_c gauge\neva_megatron_c -Inf\n"
    )


def _job(**log: object) -> None:
    resolve({"data": {"shards": ["-"]}, "log": log}, [])


def test_what_would_listen_everywhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _job(metrics_port=9400)
    _job(metrics_port=9400, metrics_address="10.0.0.7")
    for address in ("0.0.0.0", "::", "[::]", "*", ""):
        with pytest.raises(ConfigError, match="would listen on every interface"):
            _job(metrics_port=9400, metrics_address=address)
    with pytest.raises(ConfigError, match=r"no effect without log.metrics_port"):
        _job(metrics_address="10.0.0.7")
    with pytest.raises(ConfigError, match=r"log.metrics_port is 70000"):
        _job(metrics_port=70000)
    monkeypatch.setattr(log_section, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'eva-megatron\[wandb\]'"):
        _job(wandb="eva")


def test_every_line_of_a_rank_has_its_rank_and_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = JsonLog(rank=2)
    log.on_start(run_info(tmp_path, start_step=5))
    log.on_step(record(5))
    print("WARNING: half", end="", file=sys.stderr)
    print(" a line", file=sys.stderr)
    logging.getLogger("data.feed").warning("epoch 2 begins")
    print("error: it ends", file=sys.stderr)
    log.on_end({})
    print("not taken down", file=sys.stderr)
    entries = [json.loads(line) for line in (tmp_path / "log" / "rank_00002.jsonl").read_text().splitlines()]
    assert [(entry["level"], entry["step"], entry["message"]) for entry in entries] == [
        ("info", 5, "starts at step 5 as TP 2 × PP 2 × DP 1"),
        ("warning", 6, "WARNING: half a line"),
        ("warning", 6, "epoch 2 begins"),
        ("error", 6, "error: it ends"),
        ("info", 6, "ends"),
    ]
    assert {entry["rank"] for entry in entries} == {2} and entries[2]["logger"] == "data.feed"
    assert "WARNING: half a line\n" in capsys.readouterr().err


def test_the_first_rank_logs_every_step_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    log = JsonLog(rank=0)
    log.on_start(run_info(tmp_path))
    log.on_step(record(0, loss=math.inf))
    log.on_end({})
    entry = json.loads((tmp_path / "log" / "rank_00000.jsonl").read_text().splitlines()[1])
    assert (entry["message"], entry["step"], entry["record"]["loss"], entry["record"]["grad_norm"]) == (
        "step", 1, None, 0.5,
    )  # fmt: skip


def test_weights_and_biases_goes_on_in_the_run_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    run = types.SimpleNamespace(
        log=lambda numbers, step: calls.append(("log", step, numbers)), finish=lambda: calls.append(("finish",))
    )

    def init(**settings: Any) -> Any:
        calls.append(("init", settings))
        return run

    stand_in = types.SimpleNamespace(init=init)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    from engine.callbacks.wandb import WeightsAndBiases

    for _ in range(2):
        callback = WeightsAndBiases("eva")
        callback.on_start(run_info(tmp_path))
        callback.on_step(record(4, phase="warm"))
        callback.on_end({})
    inits = [call[1] for call in calls if call[0] == "init"]
    assert inits[0] == inits[1] and inits[0]["resume"] == "allow" and inits[0]["project"] == "eva"
    assert calls[1][1] == 4 and "phase" not in calls[1][2] and calls[2] == ("finish",)
