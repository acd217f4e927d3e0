"""Weights in files of other projects: safetensors or .pt, one file or several with an index, one tensor at a time.

What a file is, its first bytes say, not its name. A .pt file is mapped, not read: it may be larger than memory.
"""

import json
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.tensor_file import TensorFile
from engine.checkpoint.state_dicts.names import clean_names
from engine.checkpoint.state_dicts.pickles import load_state_dict

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that weights are kept in here."""
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = (
    "open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin",
)  # fmt: skip
"""Files with all weights, in the order in which a folder of a hub is asked for them."""
_NO_WEIGHTS = ("_extra_state", "n_averaged")
"""Last components of entries that are no weights: Transformer Engine's scales, torch's count of an average."""


class State(Protocol):
    """A state dict on disk, under names without the prefixes of wrappers."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    keys: dict[str, str]
    """Name -> key in the file."""
    left_out: dict[str, str]
    """Entry that is no weight -> why it is left out."""

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        ...


class _Named:
    """The names of a state dict, cleaned; what is no weight put aside."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], source: str):
        self.left_out = {key: "no weight" for key in shapes if key.rpartition(".")[2] in _NO_WEIGHTS}
        self.keys = clean_names((key for key in shapes if key not in self.left_out), source)
        self.shapes = {name: shapes[key] for name, key in self.keys.items()}
        self.dtypes = {name: dtypes[key] for name, key in self.keys.items()}


class SafetensorsState(_Named):
    """One or more safetensors files as one state dict."""

    def __init__(self, files: list[Path], index: dict[str, str] | None = None, source: str = ""):
        """index: key -> name of its file, which decides where a key stands twice and what is left out."""
        opened = {path.name: TensorFile(path) for path in files}
        self._at = _places(opened, index, source)
        specs = {key: file.specs[key] for key, file in self._at.items()}
        super().__init__({k: s.shape for k, s in specs.items()}, {k: s.dtype for k, s in specs.items()}, source)
        if index is not None:
            extra = {key: name for name, file in opened.items() for key in file.specs if index.get(key) != name}
            self.left_out |= {f"{key} of {name}": "the index does not name it there" for key, name in extra.items()}

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self._at[self.keys[name]].read(self.keys[name]).view(self.shapes[name])


def _places(opened: dict[str, TensorFile], index: dict[str, str] | None, source: str) -> dict[str, TensorFile]:
    if index is not None:
        for key, name in index.items():
            if key not in opened[name].specs:
                raise CheckpointError(f"{source} says that {key} is in {name}, which lacks it: copy both again")
        return {key: opened[name] for key, name in index.items()}
    at: dict[str, TensorFile] = {}
    for file in opened.values():
        twice = sorted(at.keys() & file.specs.keys())
        if twice:
            raise CheckpointError(
                f"{twice[0]} is in {at[twice[0]].path} and again in {file.path}: keep one of the files, or the index "
                f"({_INDICES[0]}) that says which holds"
            )
        at |= dict.fromkeys(file.specs, file)
    return at


class TorchState(_Named):
    """One or more .pt files as one state dict."""

    def __init__(self, files: list[Path], entry: str | None, index: dict[str, str] | None = None, source: str = ""):
        """entry: dotted path of the state dict in the file, None to find it; index: as of `SafetensorsState`."""
        self._state: dict[str, Tensor] = {}
        beside: dict[str, str] = {}
        for path in files:
            state, other = load_state_dict(path, entry)
            kept = {k: v for k, v in state.items() if index is None or index.get(k) == path.name}
            beside |= {k: f"it is {v}, no weight" for k, v in other.items()}
            beside |= {f"{k} of {path.name}": "the index does not name it there" for k in state.keys() - kept.keys()}
            self._state |= kept
        missing = sorted((index or {}).keys() - self._state.keys())
        if missing:
            raise CheckpointError(f"{source} names {missing[0]}, which its file lacks: copy both again")
        shapes = {key: tuple(value.shape) for key, value in self._state.items()}
        super().__init__(shapes, {key: value.dtype for key, value in self._state.items()}, source)
        self.left_out = beside | self.left_out

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self._state[self.keys[name]]


def open_state(path: Path, entry: str | None = None) -> State:
    """A file of safetensors or of torch.save, or a folder of such files with their index.

    entry: which entry of a .pt file holds the weights, where it has several. Raises CheckpointError: one line.
    """
    index: dict[str, str] | None = None
    files, source = [path], str(path)
    if path.is_dir():
        files, index, source = _files_of(path)
    kinds = {_kind(file) for file in files}
    if kinds == {"torch"}:
        return TorchState(files, entry, index, source)
    if entry is not None:
        raise CheckpointError(f"--entry {entry}: {source} is no .pt file, a safetensors file has one state dict only")
    if kinds != {"safetensors"}:
        raise CheckpointError(f"{source} names files of torch.save and of safetensors: keep one kind")
    return SafetensorsState(files, index, source)


def _kind(path: Path) -> str:
    """torch or safetensors, by content. Raises CheckpointError for what is neither."""
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    refuse_stand_ins(path, head)
    if head[8:9] == b"{":
        return "safetensors"
    is_pickle = head[:1] == b"\x80" or head.startswith(b"PK\x03\x04")
    if is_pickle or path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return "torch"
    if path.suffix == ".safetensors":
        return "safetensors"  # its reader says what is wrong with it
    raise CheckpointError(f"{path} is neither a safetensors file nor one of torch.save")


def refuse_stand_ins(path: Path, head: bytes) -> None:
    """Raise CheckpointError for a git-lfs pointer, a web page or nothing in the place of a file."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        size = re.search(rb"\nsize (\d+)", head)
        whole = f" of {int(size[1]):,} bytes" if size else ""
        raise CheckpointError(
            f"{path} is a git-lfs pointer in the place of the file{whole}: run `git lfs pull` in its repository"
        )
    if head.lstrip()[:15].lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(f"{path} is a web page, not the file: download the file itself again")
    if not head:
        raise CheckpointError(f"{path} is empty: copy or download it again")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises CheckpointError, one line, for anything else."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    refuse_stand_ins(path, content[:1024])
    try:
        return json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def _files_of(folder: Path) -> tuple[list[Path], dict[str, str] | None, str]:
    """(files, what their index says, where from)."""
    for name in _INDICES:
        if (folder / name).is_file():
            return _indexed(folder / name)
    for name in _SINGLE_FILES:
        if (folder / name).is_file():
            return [folder / name], None, str(folder / name)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if files:
        return files, None, str(folder)
    raise CheckpointError(_nothing_in(folder))


def _nothing_in(folder: Path) -> str:
    if (folder / "manifest.json").is_file():
        return f"{folder} is a checkpoint of this project: convert it with --to, or train from it with init.vision"
    if (folder / ".metadata").is_file():
        return (
            f"{folder} is of torch.distributed.checkpoint, whose .metadata is a pickle and is not read here: where it "
            f"is trusted, python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pt"
        )
    files = sorted(path.name for path in folder.glob("*") if path.suffix in (".pt", ".pth", ".ckpt"))
    if files:
        return f"{folder} holds no safetensors or .bin file: name the file ({', '.join(files[:4])})"
    return f"{folder} holds no safetensors file, no .bin file and no index of them"


def _indexed(index: Path) -> tuple[list[Path], dict[str, str], str]:
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
        raise CheckpointError(f"{index} is no index of weights: its weight_map must give each tensor its file")
    names = sorted(set(places.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} points outside its folder: {outside[0]}")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(f"{index} names {absent[0]}, which is not beside it ({len(absent)} files are missing)")
    return [index.parent / name for name in names], places, str(index)
