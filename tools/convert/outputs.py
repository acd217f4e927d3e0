"""Where a conversion goes: found to be writable before the work, and written as what its name says."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.tensor_file import TensorFile, TensorSpec, write_tensor_file
from tools.cli import CommandError, check_file

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Values of --dtype."""
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
"""Names of files of torch.save."""


@dataclass
class Report:
    """What a conversion did."""

    table: list[str]
    """A line a tensor."""
    summary: str
    """The line that says it all."""
    remarks: list[str] = field(default_factory=list)
    """Lines on what is not plain renaming: left out, assumed, made up from the config."""


def check_new_file(out: Path, size_bytes: int = 0) -> None:
    """Raise CommandError unless a new file of `size_bytes` (0: not known) can be written at `out`."""
    if out.exists():
        raise CommandError(f"{out} exists: name another, or delete it first")
    check_file(out, size_bytes)


def check_weights_file(out: Path, size_bytes: int = 0) -> None:
    """Raise CommandError unless a new file of weights can be written at `out`, and its name says which kind."""
    if out.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise CommandError(
            f"--out {out}: end the name in .safetensors, or in {', '.join(TORCH_SUFFIXES)} for a file of torch.save"
        )
    copies = 2 if out.suffix in TORCH_SUFFIXES else 1  # written as safetensors first
    check_new_file(out, copies * size_bytes)


def cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as `dtype`. Raises CheckpointError where a number would become infinite."""
    out = value.to(dtype)
    if dtype == torch.float16 and value.dtype != dtype:
        lost = int((out.isinf() & ~value.isinf()).sum())
        if lost:
            raise CheckpointError(
                f"{name}: {lost:,} of {value.numel():,} values are beyond fp16's 65,504 and would become infinite: use "
                "--dtype bf16"
            )
    return out


def dtype_of(name: str, stored: torch.dtype, wish: str | None) -> torch.dtype:
    """Dtype of a logical tensor in the output; the scalars of the loss stay fp32 (bf16 cannot hold ln 100)."""
    return stored if wish is None or name.startswith(("logit_scale.", "logit_bias.")) else DTYPES[wish]


def write_weights(out: Path, specs: Sequence[TensorSpec], tensors: Iterable[Tensor], metadata: dict[str, str]) -> None:
    """Write tensors one at a time to safetensors, or to what torch.load reads where `out` is named so."""
    partial = out.with_name(out.name + ".partial")
    write_tensor_file(partial, specs, tensors, metadata)
    if out.suffix in TORCH_SUFFIXES:
        _to_torch(partial)
    os.replace(partial, out)


def _to_torch(partial: Path) -> None:
    """Rewrite a safetensors file as one of torch.save; its tensors are mapped, so that none is in memory at once."""
    staged = partial.with_name(partial.name + ".torch")
    try:
        with TensorFile(partial) as file:
            torch.save({key: _mapped(file, key) for key in file.specs}, staged)
    except (OSError, RuntimeError) as error:
        for path in (partial, staged):
            path.unlink(missing_ok=True)
        raise CheckpointError(f"writing {staged} failed: {error}") from error
    with open(staged, "rb+") as written:
        os.fsync(written.fileno())
    os.replace(staged, partial)


def _mapped(file: TensorFile, key: str) -> Tensor:
    spec = file.specs[key]
    if not spec.size_bytes:
        return torch.empty(spec.shape, dtype=spec.dtype)
    pages = np.memmap(file.path, np.uint8, "c", offset=file.start_of(key), shape=(spec.size_bytes,))
    return torch.from_numpy(pages).view(spec.dtype).view(spec.shape)
