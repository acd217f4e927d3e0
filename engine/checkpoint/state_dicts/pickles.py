"""A .pt file: read with weights_only, its state dict found, and what stands in the way named by its entry.

Weights-only unpickling builds tensors, containers and the few harmless types of `_HARMLESS`; no code of the file runs.
What else a file holds is found in its pickle as text, without building anything.
"""

import argparse
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.checkpoint.format.errors import CheckpointError

STATE_DICT_ENTRIES = ("state_dict", "model", "module", "model_state_dict")
"""Entries under which the usual trainers keep the weights (open_clip and Lightning; EVA and timm; DeepSpeed; torch)."""

_SCALAR_CODE = np.float32(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_SCALAR_CODE, "numpy.core.multiarray.scalar"),
    (_SCALAR_CODE, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")),
]
"""Types that hold settings and counters beside weights; building one does nothing else."""


def load_state_dict(path: Path, entry: str | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(state dict, what else the file holds -> what it is). entry: dotted path to the state dict, None to find it."""
    content = _load(path)
    return _tensors_of(*_state_dict_in(content, path, entry), path)


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            try:
                if path.suffix != ".safetensors":  # by this name torch would take it for one
                    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # written before torch 1.6, not a zip: cannot be mapped
                pass
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, error)) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path}: {_why(path, error)}") from error


def _why(path: Path, error: Exception) -> str:
    if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        return (
            "a TorchScript archive (OpenAI's own files are), whose code is not run here: save its weights where the "
            f"file is trusted: torch.save(torch.jit.load({path.name!r}, 'cpu').state_dict(), 'weights.pt')"
        )
    said = str(error).partition("\n")[0] or type(error).__name__
    return f"no file of torch.save, or not a whole one ({said}): copy or download it again"


def _refusal(path: Path, error: Exception) -> str:
    found = _foreign_types(path)
    said = "; ".join(f"entry {at or 'the file itself'!r} is of type {kind}" for at, kind in found[:3])
    said = said or str(error).partition("\n")[0]
    return (
        f"{path} cannot be read with weights_only: {said}. Building it would run code of the file, so nothing is: save "
        "the weights alone where the file is trusted (torch.save(model.state_dict(), 'weights.pt'), or safetensors)"
    )


def _foreign_types(path: Path) -> list[tuple[str, str]]:
    """(entry, type) of everything that weights_only refuses, from the pickle's text."""
    try:
        refused = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            pickled = archive.read(name)
        harmless = {f"{kind.__module__}.{kind.__name__}" for kind in _HARMLESS if isinstance(kind, type)}
        harmless |= {kind[1] for kind in _HARMLESS if isinstance(kind, tuple)}
        found = dict.fromkeys((at, kind) for at, kind in _types_in(pickled) if kind in refused - harmless)
        return list(found)
    except Exception:  # whatever is wrong with it, the refusal itself stands
        return []


_MARK = object()


def _types_in(pickled: bytes) -> Iterator[tuple[str, str]]:
    """(dotted path of the dict entry under way, type) wherever a pickle names a type; a stack of names, no objects."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for code, argument, _ in pickletools.genops(pickled):
        if code.name == "GLOBAL":
            stack.append(None)
            yield _path(stack[:-1]), str(argument).replace(" ", ".")
        elif code.name == "STACK_GLOBAL":
            kind = ".".join(str(part) for part in stack[-2:])
            del stack[-2:]
            yield _path(stack), kind
            stack.append(None)
        elif code.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif code.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif code.name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo.get(argument))
        else:
            _step(stack, code, argument)


def _step(stack: list[Any], code: Any, argument: Any) -> None:
    before = [kind.name for kind in code.stack_before]
    if "mark" in before:  # takes everything down to the mark, the mark, and what stands before it
        while stack.pop() is not _MARK:
            pass
        take = before.index("mark")
    else:
        take = len(before)
    del stack[len(stack) - take :]
    for kind in code.stack_after:
        stack.append(_MARK if kind.name == "mark" else argument if isinstance(argument, str) else None)


def _path(stack: list[Any]) -> str:
    """Keys of the dicts being filled: behind each mark stand key, value, key, value, …, and a key without its value."""
    keys: list[str] = []
    since: list[Any] = []
    for item in [*stack, _MARK]:
        if item is not _MARK:
            since.append(item)
            continue
        # What is being built may lie above its key already, as a value that is not filled yet.
        keys += [key for key in since[-1:] if isinstance(key, str)] or [k for k in since[-2:-1] if isinstance(k, str)]
        since = []
    return ".".join(keys)


# --- which entry -----------------------------------------------------------------------------------------------------


def _state_dict_in(content: Any, path: Path, entry: str | None) -> tuple[Mapping[Any, Any], dict[str, str]]:
    beside: dict[str, str] = {}
    if entry is not None:
        return _at(content, path, entry), beside
    where = ""
    while not _has_tensors(content):
        key = _wrapper(content, path, where)
        beside |= {f"{where}{k}": _kind(v) for k, v in content.items() if k != key}
        content, where = content[key], f"{where}{key}."
    return content, beside


def _at(content: Any, path: Path, entry: str) -> Mapping[Any, Any]:
    found, rest = content, entry
    while rest:
        keys = list(map(str, found)) if isinstance(found, Mapping) else []
        key = max((k for k in keys if rest == k or rest.startswith(f"{k}.")), key=len, default=None)
        if key is None:
            raise CheckpointError(f"{path} has no entry {entry!r}; it holds {_listing(found)}")
        found, rest = found[key], rest[len(key) + 1 :]
    if not _has_tensors(found):
        raise CheckpointError(f"{path}: entry {entry!r} is no state dict, but {_kind(found)}")
    return found


def _has_tensors(content: Any) -> bool:
    return isinstance(content, Mapping) and any(isinstance(value, Tensor) for value in content.values())


def _holds_state(content: Any) -> bool:
    """Whether a state dict is in it, below known entries only."""
    if not isinstance(content, Mapping):
        return False
    return _has_tensors(content) or any(_holds_state(content.get(key)) for key in STATE_DICT_ENTRIES)


def _wrapper(content: Any, path: Path, where: str) -> Any:
    """The key under which the state dict lies; the usual ones before all others."""
    if isinstance(content, nn.Module):
        raise CheckpointError(f"{path} holds a whole module; save its state_dict()")
    held = [key for key, value in content.items() if _holds_state(value)] if isinstance(content, Mapping) else []
    usual = [key for key in held if key in STATE_DICT_ENTRIES]
    chosen = usual or held
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        options = " or ".join(f"--entry {where}{key}" for key in chosen)
        raise CheckpointError(f"{path} holds several state dicts: say which with {options}")
    raise CheckpointError(f"{path} holds no state dict (a mapping of names to tensors), but {_listing(content)}")


def _listing(content: Any) -> str:
    if not isinstance(content, Mapping):
        return _kind(content)
    shown = ", ".join(f"{key!r} ({_kind(value)})" for key, value in list(content.items())[:8])
    return f"{_kind(content)}: {shown}" if content else "an empty mapping"


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


# --- its tensors -----------------------------------------------------------------------------------------------------


def _tensors_of(
    content: Mapping[Any, Any], beside: dict[str, str], path: Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    state: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor) and isinstance(key, str):
            problem = _problem(value)
            if problem:
                raise CheckpointError(f"{path}: entry {key!r} is {problem}")
            state[key] = value.detach()
        else:
            beside[str(key)] = _kind(value)
    _refuse_partitions(state, path)
    return state, beside


def _problem(value: Tensor) -> str:
    kind = type(value).__name__
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {kind}, one rank's part or a stand-in: save whole tensors (full_state_dict=True)"
    if value.is_meta:
        return "on the meta device, without values: save it after the weights were loaded"
    if value.layout != torch.strided or value.is_quantized:
        return "quantised or sparse: save it dense (.dequantize(), .to_dense())"
    return ""


def _refuse_partitions(state: dict[str, Tensor], path: Path) -> None:
    flat = next((key for key in state if key.rpartition(".")[2].startswith(("_flat_param", "flat_param"))), None)
    if flat is not None:
        raise CheckpointError(
            f"{path}: entry {flat!r} is one rank's flat parameter of FSDP: save with StateDictType.FULL_STATE_DICT"
        )
    empty = [key for key, value in state.items() if value.numel() == 0]
    if 2 * len(empty) > len(state):
        raise CheckpointError(
            f"{path}: {len(empty)} of {len(state)} entries, {empty[0]!r} the first, are empty as DeepSpeed's ZeRO-3 "
            "leaves them: join its partitions with the zero_to_fp32.py of their folder"
        )
