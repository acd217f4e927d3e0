"""Versions against the ranges that this code was written for; imports of it all no more than torch."""

import torch

from data.pixels.decode import dali
from models.blocks.packages import (
    APEX,
    FLASH_2,
    FLASH_3,
    FLASH_4,
    TRANSFORMER_ENGINE,
    Package,
    flash_2_serves_te,
)
from models.versions import Supported, installed_version, required
from tools.doctor.rows import NOTE, WRONG, Row

_PLAIN = ("eva-megatron", "simplejpeg", "safetensors", "tokenizers", "ftfy", "av", "triton")
_OPTIONAL = (TRANSFORMER_ENGINE, FLASH_2, FLASH_3, FLASH_4, APEX)
_DALI = Supported("NVIDIA DALI", dali.OLDEST, dali.NEWEST, dali.CURE)
_BUILDS_OF_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")


def library_rows() -> list[Row]:
    """What is required, what is optional, what torch brings along."""
    rows = [_in_range(supported, found) for supported, found in required()]
    rows += [Row(name, installed_version(name) or "not installed") for name in _PLAIN]
    rows += [_optional(package) for package in _OPTIONAL]
    found = next(filter(None, map(installed_version, _BUILDS_OF_DALI)), None)
    rows.append(_in_range(_DALI, found, older=NOTE))
    return [*rows, *_cuda_rows()]


def _in_range(supported: Supported, found: str | None, *, older: str = WRONG) -> Row:
    """older: the verdict below the range; what is optional hurts only a job that asks for it (job_rows)."""
    advice, verdict = supported.refusal(found), older
    if not advice:
        advice, verdict = supported.warning(found), NOTE
    text = f"{found or 'not installed'} (for {supported.oldest} to {supported.newest})"
    return Row(supported.name, text, verdict, advice) if advice else Row(supported.name, text)


def _optional(package: Package) -> Row:
    if not package.is_installed:
        return Row(package.name, "not installed")
    if package is FLASH_2 and TRANSFORMER_ENGINE.is_installed and not flash_2_serves_te():
        advice = "Transformer Engine before 2.19 counts it as not installed: 2.8.3 itself, or a newer engine"
        return Row(package.name, f"{package.version}", NOTE, advice)
    if package.supported is None:
        return Row(package.name, package.version or "installed, without a version")
    return _in_range(package.supported, package.version, older=NOTE)


def _cuda_rows() -> list[Row]:
    rows = [Row("torch's CUDA", f"{torch.version.cuda or 'none: a build for CPUs'}")]
    if not torch.cuda.is_available():
        return rows
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [*rows, Row("NCCL", nccl), Row("cuDNN", str(torch.backends.cudnn.version()))]
