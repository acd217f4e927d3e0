"""The hardware profile that the GPU check writes, from numbers whose constants are known, and what the script needs."""

import json
import re
from pathlib import Path

import pytest

from tests.gpu.check import profile
from tools.cost.hardware import load_hardware


def test_a_profile_gives_back_what_its_numbers_were_made_of(tmp_path: Path) -> None:
    base = load_hardware(profile.BASE)
    products = [
        {"rows": rows, "width": width, "flops_per_s": base.gemm_flops(rows, width)}
        for rows in (512, 2048, 16384)
        for width in (640, 2560, 5120)
    ]
    gemm = {"products": products, "memory_bytes_per_s": 4.0e12, "memory_bytes": 1.5e11}
    for name, found in (("gemm", gemm), ("copies", {"out_gb_per_s": 50.0, "in_gb_per_s": 44.0})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"found": found}))
    (tmp_path / "blocks.json").write_text(json.dumps({"status": "running", "found": {}}))
    path = tmp_path / "h200-measured.yaml"
    profile.write(tmp_path, path)
    got = load_hardware(str(path))
    for name in ("gemm_limit", "gemm_half_rows", "gemm_half_width"):
        assert getattr(got, name) == pytest.approx(getattr(base, name), rel=1e-6)
    assert (got.pcie_gb_s, got.memory_gb) == (44.0, 150.0)
    assert got.memory_efficiency == pytest.approx(4.0e12 / base.memory_bytes_s * base.memory_efficiency, rel=1e-5)
    assert (got.nvlink_gb_s, got.reserved_gb) == (base.nvlink_gb_s, base.reserved_gb)
    assert path.read_text().count("# measured") == 6


def test_without_any_number_the_profile_is_the_data_sheets(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    assert profile.write(tmp_path, path) == {}
    assert load_hardware(str(path)).gemm_limit == load_hardware(profile.BASE).gemm_limit


def test_what_an_image_may_lack_is_gathered_beforehand() -> None:
    """check.sh installs from .whl/ what wheels.sh has downloaded."""
    here = Path(__file__).parent
    asked = re.search(r"names = \{(.*?)\}", (here / "check.sh").read_text(), flags=re.DOTALL)
    gathered = re.search(r"--dest \.whl \\\n(.*?)\nsize_mb", (here / "wheels.sh").read_text(), flags=re.DOTALL)
    assert asked and gathered
    wheels = re.findall(r'": "([^"]+)"', asked[1])
    assert len(wheels) > 20
    assert sorted(wheels) == sorted(word.split("==")[0] for word in gathered[1].replace("\\", " ").split())
