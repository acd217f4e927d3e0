"""What all commands share: outputs are looked at before the work, one line says what is refused, help is complete."""

import argparse
import importlib
import os
import pty
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from tools.cli import (
    CommandError,
    amount,
    answer,
    check_file,
    check_folder,
    counted,
    positive,
    progress,
    ranks,
    whole,
)

ROOT = Path(__file__).parents[2]
COMMANDS = ["plan", "dryrun", "simulate", "timeline", "benchmark", "benchmark sweep", "benchmark compare"]
COMMANDS += ["benchmark table", "report", "reshard", "inspect", "prepare_emoji", "elastic", "doctor", "index_shards"]
COMMANDS += ["inspect_shards", "embed", "evaluate", "convert"]
BENCHMARKS = ["checkpoint", "contrastive_loss", "data", "evaluation", "evaluation_speed", "layouts", "memory"]
BENCHMARKS += ["operators", "sharded", "simulator", "step", "watching"]
QUICKSTART = str(ROOT / "examples" / "quickstart" / "train.yaml")
WRITERS = {
    "plan": ["--model", "b16", "--gpus", "8", "--gpu", "h100", "--global-batch", "1024", "--write"],
    "dryrun": [QUICKSTART, "--world-size", "4", "--json"],
    "simulate": ["--stages", "2", "--micro-batches", "4", "--encode-ms", "1", "--png"],
    "prepare_emoji": ["--out"],
    "benchmark": [QUICKSTART, "parallel.tensor=1", "parallel.pipeline=1", "--out"],
    "benchmark sweep": [QUICKSTART, "--ranks", "1", "--out"],
}
"""Command -> arguments of work that takes long, up to the place of its result."""


@contextmanager
def _full_disk() -> Iterator[None]:
    """No file can grow beyond 1 KiB: a write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _refused(check, path: Path) -> str:
    with pytest.raises(CommandError) as refused:
        check(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    return str(refused.value)


def test_a_place_that_takes_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    assert "is a folder where a file is to be written" in _refused(check_file, tmp_path)
    assert f"mkdir -p '{tmp_path}/no folder'" in _refused(check_file, tmp_path / "no folder" / "x.json")
    assert "a file is a file" in _refused(check_file, tmp_path / "a file" / "x.json")
    assert "a file is a file" in _refused(check_folder, tmp_path / "a file" / "runs" / "x")
    assert "a file is a file" in _refused(check_folder, tmp_path / "a file")
    for check in (check_file, check_folder):
        assert "cannot be written" in _refused(check, Path("/proc/x"))  # a file system that takes no files
        with _full_disk():
            assert "File too large" in _refused(check, tmp_path / "x")
        with pytest.raises(CommandError, match=r"1000000000\.00 GB are needed"):
            check(tmp_path / "x", 10**18)


def test_a_good_place_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    check_file(tmp_path / "old.json")
    check_file(tmp_path / "new.json")
    check_file(Path("/dev/null"))
    check_folder(tmp_path)
    check_folder(tmp_path / "runs" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


def test_what_is_refused_is_one_line_and_faults_are_not(capsys: pytest.CaptureFixture) -> None:
    def fail(error: BaseException) -> int:
        raise error

    errors = [CommandError("no"), FileNotFoundError(2, "No such file or directory", "x.json"), KeyboardInterrupt()]
    assert [answer(partial(fail, error)) for error in errors] == [1, 1, 130]
    lines = ["error: no", "error: x.json: No such file or directory", "error: interrupted"]
    assert capsys.readouterr().err.splitlines() == lines
    assert answer(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        answer(lambda: fail(ZeroDivisionError("a fault")))


def test_progress_is_quiet_where_nobody_looks(capfd: pytest.CaptureFixture) -> None:
    with progress("reading", 10, "files") as done:
        for _ in range(10):
            done(1)
    assert capfd.readouterr() == ("", "")


def _pieces(terminal: int) -> Iterator[str]:
    """What was written to the other end of a terminal, which is closed."""
    with suppress(OSError):
        while piece := os.read(terminal, 1 << 16):
            yield piece.decode()


@pytest.mark.parametrize("items", [0, 7, 64, 100])
def test_counted_items_come_whole_and_show_rate_and_time_left_on_a_terminal(
    items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert list(counted("filling memory", range(items), "layouts")) == list(range(items))
    shown = "".join(_pieces(ours))
    os.close(ours)
    assert f"{items} of {items} layouts" in shown and "filling memory" in shown
    assert items < 32 or re.search(r"layouts/s.*0:00:00", shown)


def _main(command: str) -> Callable[[list[str]], int]:
    """The command in this process: importing torch again for each takes longer than what is tested."""
    name, *rest = command.split()
    package = importlib.import_module(f"tools.{name}")
    module = importlib.import_module(f"tools.{name}.__main__") if hasattr(package, "__path__") else package
    return lambda arguments: module.main([*rest, *arguments])


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (positive, "0", "0 is below 1"),
        (positive, "20000000000", "20000000000 is above 10,000,000,000"),
        (whole, "-1", "-1 is below 0"),
        (ranks, "8000000", "8000000 is above 1,048,576"),
        (amount, "-1", "not a finite number from 0 up"),
        (amount, "nan", "not a finite number from 0 up"),
    ],
)
def test_an_option_that_is_no_size_is_refused(kind: Callable[[str], float], text: str, said: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        kind(text)
    assert kind("7") == 7


def _check_help(said: str, name: str) -> None:
    """Usage, each argument with its meaning, defaults that are values, two examples."""
    assert said.startswith(f"usage: python -m {name} ")
    body, examples = said.split("\nexamples:\n")
    assert len([line for line in examples.splitlines() if f"-m {name}" in line]) >= 2
    arguments = body[min(body.find(title) % len(body) for title in ("\npositional arguments:\n", "\noptions:\n")) :]
    entries = re.split(r"\n  (?=\S)", arguments)[1:]
    told = [re.search(r"(\S  +|\n {4,})\S", entry.partition("\n\n")[0]) for entry in entries]
    assert len(entries) >= 2 and all(told), f"an argument without its meaning: {entries[told.index(None)]}"
    assert not re.search(r"default: (None|False|\)|$)", arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_everything(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        _main(command)(["--help"])
    said = capsys.readouterr()
    assert (ended.value.code, said.err) == (0, "")
    _check_help(said.out, f"tools.{command}")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_of_a_benchmark_says_everything(
    name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 0
    _check_help(capsys.readouterr().out, f"benchmarks.{name}")


@pytest.mark.parametrize("command", WRITERS)
def test_an_output_that_cannot_be_written_is_found_before_the_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert _main(command)([*WRITERS[command], str(tmp_path / "file" / "out")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert "is a file" in said.err


def test_a_reader_that_has_seen_enough_is_no_fault(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tools.plan", *WRITERS["plan"][:-1], "--json"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
