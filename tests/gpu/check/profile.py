"""From what was measured to a hardware profile that tools.plan reads with --gpu FILE."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from tools.cost.hardware import Hardware, load_hardware

BASE = "h200"
"""The profile whose numbers stay where nothing was measured (networks, decoding)."""


def saturation(products: list[dict[str, float]], peak: float) -> dict[str, float]:
    """Least squares of 1 / rate = (1 + half_rows / rows) (1 + half_width / width) / (limit × peak)."""
    rows, widths, rates = (np.array([p[key] for p in products]) for key in ("rows", "width", "flops_per_s"))
    terms = np.stack([np.ones_like(rates), 1 / rows, 1 / widths, 1 / (rows * widths)], axis=1) * rates[:, None]
    (flat, by_rows, by_width, _), *_ = np.linalg.lstsq(terms, np.ones_like(rates), rcond=None)
    limit = min(1.0, 1 / (flat * peak)) if flat > 0 else max(rates) / peak
    return {
        "gemm_limit": float(limit),
        "gemm_half_rows": float(max(0.0, by_rows / flat)) if flat > 0 else 0.0,
        "gemm_half_width": float(max(0.0, by_width / flat)) if flat > 0 else 0.0,
    }


def measured(found: dict[str, dict[str, Any]], base: Hardware) -> dict[str, float]:
    """Fields of the profile that the parts' results settle; found: part -> its numbers."""
    values: dict[str, float] = {}
    if "products" in found.get("gemm", {}):
        gemm = found["gemm"]
        values |= saturation(gemm["products"], base.bf16_flops)
        values["memory_efficiency"] = min(1.0, gemm["memory_bytes_per_s"] / (base.memory_gb_s * 1e9))
        if "memory_bytes" in gemm:
            values["memory_gb"] = gemm["memory_bytes"] / 1e9
    if "out_gb_per_s" in found.get("copies", {}):
        copies = found["copies"]
        values["pcie_gb_s"] = min(copies["out_gb_per_s"], copies["in_gb_per_s"])
    return values


def write(folder: Path, path: Path) -> dict[str, float]:
    """Write the profile from the JSON files of `folder`; what was measured."""
    found = {}
    for name in ("gemm", "copies"):
        file = folder / f"{name}.json"
        found[name] = json.loads(file.read_text())["found"] if file.is_file() else {}
    base = load_hardware(BASE)
    values = measured(found, base)
    lines = [f"# Written by tests/gpu/check.sh; lines without `measured` are those of {BASE}.yaml, with its sources."]
    for name in (field.name for field in fields(Hardware) if field.name != "name"):
        number = values.get(name, getattr(base, name))
        lines.append(f"{name}: {number:.6g}" + ("  # measured" if name in values else ""))
    path.write_text("\n".join(lines) + "\n")
    load_hardware(str(path))
    return values
