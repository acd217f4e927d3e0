"""The safetensors files: any reader reads them, ranges of them, and nothing broken is believed."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.tensor_file import (
    DTYPES,
    FileRecord,
    TensorFile,
    TensorSpec,
    hash_file,
    write_tensor_file,
)

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "scalar": torch.tensor(2.5),
    "half": torch.randn(5).half(),
    "bf": torch.randn(2, 2).bfloat16(),
    "empty": torch.empty(0, 3),
    "ids": torch.arange(3),
}


def write(path: Path) -> FileRecord:
    specs = [TensorSpec(key, value.dtype, tuple(value.shape)) for key, value in TENSORS.items()]
    return write_tensor_file(path, specs, iter(TENSORS.values()), {"format": "pt"})


def test_the_safetensors_package_reads_what_is_written(tmp_path: Path) -> None:
    record = write(tmp_path / "f.safetensors")
    back = load_file(tmp_path / "f.safetensors")
    assert back.keys() == TENSORS.keys()
    assert all(back[key].equal(value) and back[key].dtype == value.dtype for key, value in TENSORS.items())
    content = (tmp_path / "f.safetensors").read_bytes()
    assert (
        record == FileRecord(len(content), hashlib.sha256(content).hexdigest()) == hash_file(tmp_path / "f.safetensors")
    )


def test_what_the_safetensors_package_writes_is_read_by_ranges(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "f.safetensors")
    with TensorFile(tmp_path / "f.safetensors") as file:
        assert file.read("a", 3, 9).equal(torch.arange(3.0, 9.0))
        assert all(file.read(key).view(value.shape).equal(value) for key, value in TENSORS.items())


def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a is torch\.float32 \(2,\), planned torch\.float32 \(3,\)"):
        write_tensor_file(tmp_path / "f", [TensorSpec("a", torch.float32, (3,))], [torch.zeros(2)])


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1600]}},
        {"a": {"dtype": "F32", "shape": [400], "data_offsets": [0, 1600]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
        {"a": {"dtype": "F31", "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4]}},
        {"a": 3},
        [1, 2],
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "f.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(CheckpointError, match=r"f\.safetensors is not a whole safetensors file"):
        TensorFile(path)


@pytest.mark.parametrize("keep", [0, 5, 40])
def test_a_cut_file_is_refused(tmp_path: Path, keep: int) -> None:
    write(tmp_path / "f")
    content = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(content[:keep] if keep else content[:-1])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        TensorFile(tmp_path / "f")


def test_every_dtype_of_the_table_is_written_and_read(tmp_path: Path) -> None:
    values = {name: torch.ones(3).to(dtype) for name, dtype in DTYPES.items()}
    write_tensor_file(tmp_path / "f", [TensorSpec(n, v.dtype, (3,)) for n, v in values.items()], values.values())
    assert all(value.equal(values[name]) for name, value in load_file(tmp_path / "f").items())
