"""run_dir/status.json: how a run ended, for scripts. torchrun makes 1 of every exit status but 0."""

import json
import os
import sys
import time
from pathlib import Path

STATUS_FILE = "status.json"
STARTING, RUNNING, FINISHED, STOPPED_IN_ORDER, FAILED = "starting", "running", "finished", "stopped", "failed"


def write_status(run_dir: Path, outcome: str, *, step: int | None = None, reason: str = "") -> None:
    """World rank 0 only. step: steps done so far. reason: why it stopped or failed."""
    content = {"outcome": outcome, "step": step, "reason": reason, "time": time.time(), "start": _start()}
    text, path, hidden = json.dumps(content) + "\n", run_dir / STATUS_FILE, run_dir / f".{STATUS_FILE}"
    try:
        hidden.write_text(text, encoding="utf-8")
        hidden.replace(path)
    except OSError as error:  # a full disk has no room for another file, but for what this one has
        try:
            hidden.unlink(missing_ok=True)
            with path.open("r+", encoding="utf-8") as file:
                file.write(text)
                file.truncate()
        except OSError:  # the run does not end for it
            print(f"WARNING: {path} could not be written: {error.strerror}", file=sys.stderr, flush=True)


def read_status(run_dir: Path) -> dict:
    """Content of the status file; empty where there is none."""
    try:
        status = json.loads((run_dir / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def stopped_in_this_start(run_dir: Path) -> bool:
    """Whether torchrun (--max-restarts) starts ranks again that have stopped because they were asked to."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    status = read_status(run_dir) if again else {}
    return status.get("outcome") == STOPPED_IN_ORDER and status.get("start") == _start()


def step_of_this_start(run_dir: Path) -> int | None:
    """Steps done when torchrun started the ranks of this start again; None where none of them had come to train."""
    status = read_status(run_dir)
    return status.get("step") if status.get("start") == _start() else None


def _start() -> str:
    """Name of torchrun's start; the same in all its restarts."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")
