"""tools.reshard and tools.inspect: same tensors in other files, streamed; what is in a checkpoint and what differs."""

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.reshard import TargetLayout, plan_reshard
from engine.config.stages import stage_layers
from engine.parallel.mesh import Mesh
from tests.checkpoint.jobs import alone, build, differing, job_config, run_steps, save
from tools import inspect, reshard


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with alone() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, mesh: Mesh) -> Path:
    trainer = build(job_config(tmp_path_factory.mktemp("run")), mesh)
    run_steps(trainer, 2)
    return save(trainer)


@pytest.mark.parametrize(
    "layout",
    [(1, 5, 1), (2, 2, 3), *(pytest.param(one, marks=pytest.mark.slow) for one in ((1, 1, 1), (4, 1, 1), (1, 1, 4)))],
    ids=lambda layout: "x".join(map(str, layout)),
)
def test_every_tensor_is_the_same_in_other_files(layout: tuple[int, int, int], trained: Path, tmp_path: Path) -> None:
    tensor, pipeline, data = layout
    degrees = ["--tensor", str(tensor), "--pipeline", str(pipeline), "--data", str(data)]
    assert reshard.main([str(trained), str(tmp_path / "out"), *degrees]) == 0
    result = Checkpoint(tmp_path / "out")
    result.verify()
    assert differing(trained, tmp_path / "out") == []
    assert result.manifest.position == Checkpoint(trained).manifest.position
    assert result.manifest.layout == {"tensor": tensor, "pipeline": pipeline, "data": data}
    vision = {file for file in result.manifest.files if file.startswith("stage_")}
    assert len(vision) == tensor * pipeline * data


def test_a_rank_of_the_target_layout_reads_its_own_files_only(trained: Path, tmp_path: Path) -> None:
    reshard.main([str(trained), str(tmp_path / "out"), "--tensor", "2", "--pipeline", "2"])
    first, _ = stage_layers(5, 2)
    for key, stored in Checkpoint(tmp_path / "out").manifest.tensors.items():
        name = key.split("/", 1)[1]
        if name.startswith("vision.blocks."):
            stage = 0 if int(name.split(".")[2]) in first else 1
            names = [f"stage_{stage:02d}_tensor_{rank:02d}.safetensors" for rank in range(len(stored.parts))]
            assert [part.file for part in stored.parts] == names, key


def test_a_resharded_checkpoint_is_resumed_to_the_bit(trained: Path, tmp_path: Path, mesh: Mesh) -> None:
    reshard.main([str(trained), str(tmp_path / "out"), "--tensor", "4", "--pipeline", "3", "--data", "2"])
    plain = build(job_config(tmp_path / "a", f"checkpoint.resume={trained}"), mesh)
    other = build(job_config(tmp_path / "b", f"checkpoint.resume={tmp_path / 'out'}"), mesh)
    assert run_steps(plain, 2) == run_steps(other, 2)


def test_the_dry_run_prints_the_plan_and_writes_nothing(trained: Path, tmp_path: Path, capsys) -> None:
    assert reshard.main([str(trained), str(tmp_path / "out"), "--tensor", "2", "--pipeline", "2", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "stage_01_tensor_01.safetensors" in said and "5 files for tensor 2, pipeline 2, data 1" in said
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_resharded_is_refused(trained: Path, tmp_path: Path, capsys) -> None:
    def said(*arguments: str) -> str:
        assert reshard.main([str(trained), str(tmp_path / "out"), *arguments]) == 1
        return capsys.readouterr().err

    assert "does not divide the attention heads 4" in said("--tensor", "3")
    assert "--pipeline 6 must be 1 to the 5 blocks" in said("--pipeline", "6")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").touch()
    assert "exists: name a folder that does not" in said()


def test_a_flipped_byte_in_the_source_stops_it(trained: Path, tmp_path: Path, capsys) -> None:
    broken = shutil.copytree(trained, tmp_path / "broken")
    file = broken / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert reshard.main([str(broken), str(tmp_path / "out")]) == 1
    assert "rank_00000.safetensors has another sha256" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert inspect.main([str(broken), "--verify"]) == 1


def test_every_element_is_planned_once(trained: Path) -> None:
    manifest = Checkpoint(trained).manifest
    planned: dict[str, int] = {}
    for file in plan_reshard(manifest, TargetLayout(tensor=2, pipeline=3, data=5)):
        for part in file.parts:
            planned[part.key] = planned.get(part.key, 0) + part.where.numel()
    assert planned == {key: torch.Size(tensor.shape).numel() for key, tensor in manifest.tensors.items()}


def test_inspect_says_what_is_there(trained: Path, capsys) -> None:
    assert inspect.main([str(trained), "--verify", "--tensors"]) == 0
    said = capsys.readouterr().out
    for wanted in (
        "training", "step 2, samples seen 32", "tensor 1, pipeline 1, data 1", "megatron-core",
        "sizes and hashes of all files are those of the manifest", "sha256",
    ):  # fmt: skip
        assert wanted in said, wanted
    lines = [line.split() for line in said.splitlines()]
    assert ["vision.depth", "5"] in lines
    assert ["weight/vision.head.projection.bias", "[16]", "F32", "1", "rank_00000.safetensors"] in lines
    assert [line[0] for line in lines if line[3:] == ["F32"]] == ["weight", "moment1", "moment2"]


def test_inspect_lists_the_largest_difference_first(trained: Path, tmp_path: Path, capsys) -> None:
    """Also where a value is not finite, and where a difference is below what fp32 can subtract."""
    other = shutil.copytree(trained, tmp_path / "other")
    changed = {"text.norm.bias": 0.25, "vision.head.norm.weight": 3.0, "text.norm.weight": float("nan")}
    for name, value in changed.items():
        _overwrite(other, f"weight/{name}", value)
    assert inspect.main([str(trained), "--diff", str(other)]) == 1
    said = capsys.readouterr().out.partition("difference to")[2]
    found = [line.split()[0] for line in said.splitlines() if "max abs" in line]
    assert found == ["weight/text.norm.weight", "weight/vision.head.norm.weight", "weight/text.norm.bias"]


def _overwrite(checkpoint: Path, key: str, value: float) -> None:
    """Set the first element of a tensor in its file; the manifest's hash is wrong from now on."""
    stored = Checkpoint(checkpoint).manifest.tensors[key]
    path = checkpoint / stored.parts[0].file
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + header])[_entry(content, header, key)]["data_offsets"][0]
    content[8 + header + start : 8 + header + start + 4] = struct.pack("<f", value)
    path.write_bytes(content)


def _entry(content: bytearray, header: int, key: str) -> str:
    return next(name for name in json.loads(content[8 : 8 + header]) if name == key)


def test_inspect_measures_differences(trained: Path, tmp_path: Path, mesh: Mesh, capsys) -> None:
    assert inspect.main([str(trained), "--diff", str(trained)]) == 0
    run = build(job_config(tmp_path, f"checkpoint.resume={trained}"), mesh)
    tower = run.optimizer.towers[-1]
    index = next(i for i, t in enumerate(tower.shards.tensors) if t.name == "text.norm.bias")
    shard, piece = next((s, p) for s, p in tower.shards.owned() if p.tensor == index)
    before = tower.master[shard][piece.start : piece.stop].abs().max()
    tower.master[shard][piece.start] += 0.5
    capsys.readouterr()
    assert inspect.main([str(trained), "--diff", str(save(run))]) == 1
    said = capsys.readouterr().out
    assert "weight/text.norm.bias  max abs 5.000e-01" in said and said.count("max abs") == 1
    assert before < 0.5
