"""tools.evaluate as a user calls it, in the process of the test."""

from pathlib import Path
from typing import Any

from tools.evaluate.__main__ import main

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "one"]


def evaluated(checkpoint: Path, data: Path, out: Path, *more: str, suite: str = "suite.yaml") -> int:
    return main([str(checkpoint), "--suite", str(data / suite), "--data", str(data), "--out", str(out), *more])


def row(results: dict[str, Any], name: str, transform: str = "squash", frames: int = 1) -> dict[str, Any]:
    found = [r for r in results["sets"] if (r["name"], r["transform"], r["frames"]) == (name, transform, frames)]
    assert len(found) == 1
    return found[0]
