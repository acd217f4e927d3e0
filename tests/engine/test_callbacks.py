"""The logging callbacks against real files, real event files and a real rich console."""

import io
import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.sources import SourceSize
from engine.callbacks.console import ConsoleProgress, start_line
from engine.callbacks.metrics import MetricsFile, read_metrics
from engine.callbacks.speed import Speed
from engine.callbacks.tensorboard import TensorBoard
from engine.model_flops import model_flops
from engine.parallel.device import PEAK_TFLOPS
from engine.record import RunInfo
from tests.checkpoint.jobs import BATCH, alone, build, job_config
from tools.cost.hardware import load_hardware


def run_info(run_dir: Path, *, start_step: int = 0, total_steps: int = 100) -> RunInfo:
    return RunInfo(
        run_dir=run_dir,
        config={"train": {"steps": total_steps}},
        total_steps=total_steps,
        start_step=start_step,
        world_size=4,
        layout="TP 2 × PP 2 × DP 1",
        parameters=17_534_112_000,
        global_batch_size=256,
    )


def record(step: int, **changes: Any) -> dict[str, Any]:
    values = {
        "step": step, "loss": 5.0 - 0.01 * step, "lr_vision": 4e-4, "lr_text": 4e-5, "grad_norm": 0.5,
        "samples_seen": 256 * (step + 1), "step_time_s": 0.5, "data_time_s": 0.05,
        "i2t_top1": 0.25, "t2i_top1": 0.5,
    }  # fmt: skip
    return values | changes


def write_steps(run_dir: Path, start: int, stop: int, **changes: float) -> None:
    metrics = MetricsFile()
    metrics.on_start(run_info(run_dir, start_step=start))
    for step in range(start, stop):
        metrics.on_step(record(step, **changes))
    metrics.on_end({})


def steps_of(run_dir: Path) -> list[int]:
    return [entry["step"] for entry in read_metrics(run_dir / "metrics.jsonl")]


def test_bad_samples_are_said_with_the_steps_and_at_the_end(tmp_path: Path) -> None:
    for counts, end in (([0, 2, 3], "3 bad samples were"), ([0, 1, 1], "1 bad sample was"), ([0, 0, 0], "")):
        out = io.StringIO()
        console = ConsoleProgress(log_every_steps=1, console=Console(file=out, width=300))
        console.on_start(run_info(tmp_path, total_steps=3))
        for step, bad in enumerate(counts):
            console.on_step(record(step, bad_samples=bad))
        console.on_end({})
        lines = out.getvalue().splitlines()
        assert [f"bad {bad}" in line for line, bad in zip(lines[3:6], counts, strict=True)] == [
            bad > 0 for bad in counts
        ]
        assert lines[6:] == ([f"{end} replaced so far: {tmp_path / 'quarantine.jsonl'}"] if end else [])


def test_a_disk_that_refuses_a_line_does_not_end_the_run_and_no_line_is_lost(tmp_path, capfd) -> None:
    metrics = MetricsFile()
    metrics.on_start(run_info(tmp_path))
    assert metrics._file is not None
    with open("/dev/full", "ab", buffering=0) as full:
        os.dup2(full.fileno(), metrics._file.fileno())
    for step in range(2):
        metrics.on_step(record(step))
    with (tmp_path / "room.jsonl").open("ab") as room:
        os.dup2(room.fileno(), metrics._file.fileno())
    metrics.on_step(record(2))
    metrics.on_end({})
    assert [entry["step"] for entry in read_metrics(tmp_path / "room.jsonl")] == [0, 1, 2]
    said = capfd.readouterr().err
    assert said.count("cannot be written (No space left on device)") == 1 and "is written again" in said


def test_what_the_disk_never_takes_is_counted_and_a_start_on_it_names_the_file(tmp_path, capfd) -> None:
    metrics = MetricsFile()
    metrics.on_start(run_info(tmp_path))
    with open("/dev/full", "ab", buffering=0) as full:
        assert metrics._file is not None
        os.dup2(full.fileno(), metrics._file.fileno())
    for step in range(3):
        metrics.on_step(record(step))
    metrics.on_end({})
    assert "metrics.jsonl lacks the last 3 steps (No space left on device)" in capfd.readouterr().err
    (tmp_path / "run.json").unlink()
    (tmp_path / "run.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot be written: No space left on device; free some space or set another run"):
        MetricsFile().on_start(run_info(tmp_path))


def test_a_folder_that_is_removed_while_the_run_writes_is_said_and_made_anew(tmp_path, capfd) -> None:
    metrics = MetricsFile()
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    metrics.on_start(run_info(run_dir))
    metrics.on_step(record(0))
    shutil.rmtree(run_dir)
    metrics.on_step(record(1))
    metrics.on_end({})
    assert steps_of(run_dir) == [1]
    assert "was removed while the run was writing it: a new one begins at step 1" in capfd.readouterr().err


def test_every_step_is_in_the_file_at_once(tmp_path):
    metrics = MetricsFile()
    metrics.on_start(run_info(tmp_path))
    for step in range(3):
        metrics.on_step(record(step))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [record(done) for done in range(step + 1)]
    metrics.on_end(record(2))


def test_resume_cuts_back_to_the_checkpoint_and_goes_on(tmp_path):
    write_steps(tmp_path, 0, 8, loss=1.0)
    write_steps(tmp_path, 5, 10, loss=2.0)
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == list(range(10))
    assert [entry["loss"] for entry in entries] == [1.0] * 5 + [2.0] * 5
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "run.json"]


def test_resume_drops_a_half_written_line(tmp_path):
    write_steps(tmp_path, 0, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 3.')
    assert steps_of(tmp_path) == [0, 1, 2, 3]
    write_steps(tmp_path, 4, 6)
    assert steps_of(tmp_path) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("start_step", [4, 0])
def test_lines_that_a_host_lost_do_not_end_the_start_after_it(tmp_path, capsys, start_step):
    write_steps(tmp_path, 0, 4)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([lines[0], b"\0" * 40 + b"\n", *lines[2:]]))
    write_steps(tmp_path, start_step, 6)
    assert steps_of(tmp_path) == ([0, 2, 3, 4, 5] if start_step else list(range(6)))
    said = capsys.readouterr().err
    assert ("had 1 lines that are no records, the first line 2" if start_step else "made 3 steps") in said


def write_and_be_killed(folder):
    metrics = MetricsFile()
    metrics.on_start(run_info(folder))
    for step in range(7):
        metrics.on_step(record(step))
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_writer_leaves_whole_lines(tmp_path):
    """SIGKILL right after a step: nothing of the finished steps is in a buffer."""
    writer = multiprocessing.get_context("fork").Process(target=write_and_be_killed, args=(tmp_path,))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")
    assert steps_of(tmp_path) == list(range(7))


def test_fresh_run_keeps_older_curves_beside_it_and_says_so(tmp_path, capsys):
    write_steps(tmp_path, 0, 3)
    assert capsys.readouterr().err == ""
    write_steps(tmp_path, 0, 2)
    assert "made 3 steps" in (said := capsys.readouterr().err) and "kept as metrics.previous.jsonl" in said
    write_steps(tmp_path, 0, 1)
    assert steps_of(tmp_path) == [0]
    assert len(read_metrics(tmp_path / "metrics.previous.jsonl")) == 3
    assert len(read_metrics(tmp_path / "metrics.previous2.jsonl")) == 2


def test_damaged_line_in_the_middle_is_named(tmp_path):
    write_steps(tmp_path, 0, 3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:9], lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_non_finite_numbers_stay_valid_json(tmp_path):
    write_steps(tmp_path, 0, 1, loss=float("nan"), grad_norm=float("inf"))
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    assert json.loads(line)["grad_norm"] is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("when", ["start", "step", "end"])
def test_a_disk_that_refuses_the_curves_does_not_end_the_run(tmp_path, capfd, when):
    board = TensorBoard()
    if when == "start":
        (tmp_path / "tensorboard").write_text("a file")
    board.on_start(run_info(tmp_path))
    if when != "start":
        (events,) = (tmp_path / "tensorboard").iterdir()
        events.unlink()
        events.symlink_to("/dev/full")
    if when == "step":
        writer: Any = board._writer
        worker = writer.file_writer.event_writer._async_writer._worker
        worker._next_flush_time = 0
        board.on_step(record(0))
        worker.join()
    board.on_step(record(1))
    board.on_end({})
    assert capfd.readouterr().err.count("its curves end here until the next start") == 1


def test_tensorboard_curve_is_clean_after_resume(tmp_path):
    for start, stop, loss in ((0, 8, 1.0), (5, 10, 2.0)):
        board = TensorBoard()
        board.on_start(run_info(tmp_path, start_step=start))
        for step in range(start, stop):
            board.on_step(record(step, loss=loss) | {"eval_zero_shot_top1": 0.5, "mfu": 0.4, "samples_per_s": 9.0})
        board.on_end({})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"evaluation/zero_shot_top1", "speed/mfu", "speed/samples_per_s", "speed/step_time_s"} <= tags
    assert not {"train/step", "train/eval_zero_shot_top1", "train/step_time_s"} & tags
    curve = events.Scalars("train/loss")
    assert [event.step for event in curve] == list(range(10))
    assert [event.value for event in curve] == [1.0] * 5 + [2.0] * 5
    assert [event.step for event in events.Scalars("train/lr_text")] == list(range(10))


def console_output(tmp_path: Path, *, terminal: bool, encoding: str, steps: int = 25, start_step: int = 0) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=stream, force_terminal=terminal, width=200, color_system=None)
    progress = ConsoleProgress(log_every_steps=10, console=console)
    progress.on_start(run_info(tmp_path, start_step=start_step, total_steps=steps))
    for step in range(start_step, steps):
        progress.on_step(record(step))
    progress.on_end(record(steps - 1))
    stream.flush()
    return raw.getvalue().decode(encoding)


def test_the_start_line_says_what_is_trained_on_what(tmp_path):
    plain = SourceSize(name="", shards=8, samples=800, epochs=64.0)
    run = replace(run_info(tmp_path, total_steps=200), model="b16", image_size=224, last_step=200, sources=[plain])
    assert start_line(run) == (
        "model b16: 17.53 B parameters, images of 224 px, global batch 256; "
        "8 shards, 800 samples, 3.12 steps an epoch, 64 epochs"
    )
    laion = SourceSize(name="laion", shards=1, samples=1, epochs=0.0)
    coyo = SourceSize(name="coyo", shards=1000, samples=1_234_567, epochs=0.0123)
    assert start_line(replace(run, sources=[laion, coyo], first_step=100)).split("; ")[1:] == [
        "laion: 1 shard, 1 sample, none of them used",
        "coyo: 1,000 shards, 1,234,567 samples, 8,130 steps an epoch, 0.0123 epochs",
    ]


def test_plain_lines_every_n_steps_and_first_and_last(tmp_path):
    lines = console_output(tmp_path, terminal=False, encoding="utf-8").splitlines()
    assert lines[0] == "TP 2 × PP 2 × DP 1 on 4 ranks"
    assert lines[1] == "17.53 B parameters, global batch 256"
    assert [line.split()[1] for line in lines[3:]] == ["1/25", "10/25", "20/25", "25/25"]
    # 256 pairs in 0.5 s, a tenth of it waiting for data, 15 steps to go.
    assert "loss 4.9100" in lines[4]
    assert "512.0 samples/s  data 10 %  ETA 0:00:08" in lines[4]
    assert lines[-1].endswith("ETA 0:00:00")


def test_resumed_run_counts_from_its_first_step(tmp_path):
    lines = console_output(tmp_path, terminal=False, encoding="utf-8", start_step=13).splitlines()
    assert [line.split()[1] for line in lines[3:]] == ["14/25", "20/25", "25/25"]


@pytest.mark.parametrize("terminal", [False, True])
def test_ascii_output_does_not_stop_the_run(tmp_path, terminal):
    output = console_output(tmp_path / "größe", terminal=terminal, encoding="ascii")
    assert "TP 2 x PP 2 x DP 1" in output
    assert "gr??e" in output


def test_terminal_shows_a_bar_with_loss_and_rate(tmp_path):
    output = console_output(tmp_path, terminal=True, encoding="utf-8")
    assert "25/25" in output and "loss 4.7600" in output and "512.0 samples/s" in output
    assert "step 10/25" not in output


def test_log_every_steps_must_be_positive():
    with pytest.raises(ValueError, match="log_every_steps is 0"):
        ConsoleProgress(log_every_steps=0)


def test_the_speed_of_a_step_is_in_its_record(tmp_path):
    with alone() as mesh:
        trainer = build(job_config(tmp_path), mesh)
        flops = model_flops(trainer.config)
        found = Speed(trainer).measure({"step_time_s": 0.5})
        known = Speed(trainer)
        known._peak_tflops = 2 * found["tflops"]
    assert found["samples_per_s"] == 2 * BATCH and found["tflops"] == pytest.approx(2 * BATCH * flops / 1e12)
    assert found["memory_gb"] > 0 and "mfu" not in found, "nobody knows the peak of this CPU"
    assert known.measure({"step_time_s": 0.5})["mfu"] == pytest.approx(0.5)


def test_known_gpus_have_the_peaks_of_their_data_sheets():
    profiles = {"NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100-SXM4-80GB": "a100-80", "NVIDIA H100 80GB HBM3": "h100"}
    profiles |= {"NVIDIA H200": "h200", "NVIDIA B200": "b200"}
    assert profiles.keys() == PEAK_TFLOPS.keys()
    for name, profile in profiles.items():
        sheet = load_hardware(profile)
        assert PEAK_TFLOPS[name] == {"bf16": sheet.bf16_tflops, "fp32": sheet.fp32_tflops}, name


def test_a_job_with_nothing_left_says_so(tmp_path):
    said = console_output(tmp_path, terminal=False, encoding="utf-8", steps=1, start_step=6)
    assert "nothing is left to train: 6 steps are done and train.steps is 1; raise it" in said and "6 to 1" not in said
