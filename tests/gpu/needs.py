"""What a test of this folder asks of the machine; without it the test is skipped and says so."""

import pytest
import torch

from models.blocks.packages import Package


def gpus(count: int, *packages: Package, capability: tuple[int, int] = (8, 0)) -> pytest.MarkDecorator:
    """Skip unless there are so many CUDA devices of this compute capability or later, and the packages."""
    return pytest.mark.skipif(
        not _has(count, capability) or not all(package.is_installed for package in packages),
        reason=f"needs {count} CUDA device(s) of compute capability {'.'.join(map(str, capability))} or later"
        + "".join(f", and {package.name}: {package.install}" for package in packages),
    )


def _has(count: int, capability: tuple[int, int]) -> bool:
    if torch.cuda.device_count() < count:
        return False
    return all(torch.cuda.get_device_capability(i) >= capability for i in range(count))
