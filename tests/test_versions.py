"""Versions outside the ranges: one line that names range and cure, refused below, told and used above."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.pixels import video
from data.pixels.decode import dali
from models import versions
from models.versions import MEGATRON_CORE, TORCH, Supported, megatron_core_version, required

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("supported", "found", "refused", "told"),
    [
        (TORCH, "2.10.1+cu128", True, False),
        (TORCH, "2.11.0a0+git99", False, False),
        (TORCH, "2.15.3+cpu", False, False),
        (TORCH, "2.16.0", False, True),
        (TORCH, "3.0", False, True),
        (MEGATRON_CORE, "0.16.0", True, False),
        (MEGATRON_CORE, "0.16.1", False, False),
        (MEGATRON_CORE, "0.19.12+abc", False, False),
        (MEGATRON_CORE, "0.20.0rc1", False, True),
        (MEGATRON_CORE, None, False, False),
        (versions.NUMPY, "1.25.9", True, False),
        (versions.NUMPY, "2.5.5", False, False),
        (versions.PILLOW, "14.0.1", False, True),
        (versions.TRANSFORMER_ENGINE, "2.8.0+abc", True, False),
        (versions.TRANSFORMER_ENGINE, "2.20.2", False, False),
        (versions.FLASH_ATTN_2, "2.8.3.post2", False, False),
        (versions.FLASH_ATTN_2, "1.0.9", True, False),
        (versions.FLASH_ATTN_3, "3.0.0b1", False, False),
        (versions.FLASH_ATTN_4, "4.0.0b36", False, False),
        (versions.FLASH_ATTN_4, "4.1.0", False, True),
    ],
)
def test_below_is_refused_and_above_is_told(supported: Supported, found: str | None, refused: bool, told: bool) -> None:
    assert (bool(supported.refusal(found)), bool(supported.warning(found))) == (refused, told)
    for line in filter(None, (supported.refusal(found), supported.warning(found))):
        assert "\n" not in line and str(found) in line and supported.text in line and supported.cure in line


@pytest.mark.parametrize("path", ["engine/__init__.py", "models/versions.py"])
def test_an_old_python_reads_the_line_about_itself(path: str) -> None:
    """Both files are valid for Python 3.8, which evaluates none of their annotations."""
    tree = ast.parse((ROOT / path).read_text(), feature_version=(3, 8))
    first = next(node for node in tree.body if isinstance(node, ast.ImportFrom))
    assert (first.module, [name.name for name in first.names]) == ("__future__", ["annotations"])


def test_what_is_not_installed_is_named_at_once_by_the_first_rank() -> None:
    """-S leaves out what is installed. The other ranks leave the word to the first, whose end ends them."""
    command = [sys.executable, "-S", "-m", "engine.train", "--help"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(command, env=clean | {"RANK": "1"}, **pipes) as second:
        first = subprocess.run(command, env=clean | {"RANK": "0"}, **pipes, timeout=300)
        (line,) = first.stderr.splitlines()
        assert "lacks torch, numpy" in line and "megatron-core: " in line and f"pip install -e {ROOT}" in line
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(timeout=0.3)
        second.kill()


def test_what_runs_here_is_known_and_in_range() -> None:
    for supported, found in required():
        assert found is not None and not supported.refusal(found) and not supported.warning(found)


def test_pip_is_asked_for_the_ranges() -> None:
    text = (ROOT / "setup.cfg").read_text()
    ranges = (TORCH, MEGATRON_CORE, versions.NUMPY, versions.PILLOW, versions.TRANSFORMER_ENGINE)
    for cure in [*(supported.cure for supported in ranges), dali.CURE, f"pip install 'av>={video._OLDEST_AV}'"]:
        assert f"    {cure.split(chr(39))[1]}\n" in text


def test_the_image_pins_versions_of_the_ranges() -> None:
    text = (ROOT / "examples" / "docker" / "Dockerfile").read_text()
    pins = dict(re.findall(r"\b([a-z-]+)(?:\[[\w,]+\])?==([\d.]+)", text)) | {"Python": "3.12.0"}
    assert "python3.12 -m venv" in text
    for supported in (versions.PYTHON, TORCH, MEGATRON_CORE, versions.TRANSFORMER_ENGINE):
        found = pins[supported.name]
        assert not supported.refusal(found) and not supported.warning(found)


def _megatron(folder: Path, minor: int) -> Path:
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text(f"MAJOR = 0\nMINOR = {minor}\nPATCH = 3\n")
    return folder


def test_the_version_is_that_of_the_files_that_would_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "find_spec", lambda _: None)
    assert megatron_core_version() is None
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path), str(_megatron(tmp_path, 7) / "megatron")]})
    monkeypatch.setattr(versions, "find_spec", lambda _: spec)
    assert megatron_core_version() == "0.7.3"


def test_what_is_asked_or_mistyped_waits_for_no_torch() -> None:
    modules = ("engine.train", "engine.config.help.command", "tools.plan.__main__", "tools.report.__main__")
    code = f"import sys, {', '.join(modules)}; print([name for name in ('torch', 'megatron') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize("module", ["engine.train", "tools.plan", "tools.evaluate"])
def test_an_old_megatron_core_ends_every_command_with_one_line(module: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(_megatron(tmp_path, 15)), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "megatron-core 0.15.3 is here" in line and MEGATRON_CORE.cure in line
