"""Tables of shards: a manifest that does not grow with ranks times pieces, beside the rows of older checkpoints."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.flat_slice import FlatSlice
from engine.checkpoint.format.manifest import Manifest, StoredTensor, read_manifest, write_manifest
from engine.checkpoint.format.tables import Bucket, Shapes, ShardTable, TableRow, parse_table, rank_file, table_entry
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.save import merge_reports, write_rank
from engine.checkpoint.state import SnapshotPart
from engine.parallel.mesh import Mesh
from tests.checkpoint.jobs import alone, build, job_config, run_steps, save


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with alone() as mesh:
        yield mesh


def test_checkpoints_with_a_row_for_every_part_are_read(tmp_path: Path, mesh: Mesh) -> None:
    trainer = build(job_config(tmp_path), mesh)
    run_steps(trainer, 1)
    folder = save(trainer)
    now = Checkpoint(folder)
    rows = {key: StoredTensor(one.dtype, one.shape, one.parts) for key, one in now.manifest.tensors.items()}
    write_manifest(folder, replace(now.manifest, tensors=rows, tables=[]))
    before = Checkpoint(folder)
    assert json.loads((folder / "manifest.json").read_text())["manifest"]["format"] == 2
    for name, kind in product(now.shapes(), ("weight", "moment1")):
        assert torch.equal(now.read_whole(name, kind), before.read_whole(name, kind)), name


def _tables_of(ranks: int) -> list[ShardTable]:
    """What every rank of a made-up job holds: four buckets of three matrices, and one whose end is padding."""
    shape = (96, 80)
    size = 96 * 80
    whole = [
        Bucket(3 * size // ranks, tuple(TableRow(f"{i}.{j}", j * size, FlatSlice.whole(shape)) for j in range(3)))
        for i in range(4)
    ]
    padded = Bucket(-(-size // ranks) + 7, (TableRow("last", 0, FlatSlice.whole(shape)),))
    return [ShardTable(tuple(range(ranks)), ("weight", "moment1", "moment2"), (*whole, padded))]


def _reports_of(folder: Path, ranks: int) -> list[str]:
    """JSON of what each rank says of the file it has written."""
    for rank, tables in enumerate([_tables_of(ranks)] * ranks):
        owned = tables[0].owned(rank)
        parts = [SnapshotPart(key, where, torch.zeros(where.numel())) for key, where in owned.items()]
        write_rank(folder, rank, parts, tables)
    return [(folder / f"rank_{rank:05d}.json").read_text() for rank in range(ranks)]


def test_a_rank_says_as_much_however_many_there_are(tmp_path: Path) -> None:
    sizes, manifests = {}, {}
    for ranks in (8, 64):
        (folder := tmp_path / str(ranks)).mkdir()
        reports = _reports_of(folder, ranks)
        manifest = Manifest(content="training", config={}, layout={}, tensors={}, files={})
        merge_reports(manifest, [json.loads(report) for report in reports])
        write_manifest(folder, manifest)
        sizes[ranks], manifests[ranks] = max(map(len, reports[1:])), (folder / "manifest.json").stat().st_size
        read = read_manifest(folder)
        assert [part.file for part in read.tensors["moment1/last"].parts][:2] == [rank_file(0), rank_file(1)]
        assert sum(len(one.parts) for one in read.tensors.values()) >= 3 * 13 * ranks / 4
    assert abs(sizes[64] - sizes[8]) < 8 and sizes[64] < 400, "digits of the bytes of its file"
    assert (manifests[64] - manifests[8]) / 56 < 150, "a name, a size and a hash"


def test_ranks_that_disagree_on_their_slices_make_no_checkpoint(tmp_path: Path) -> None:
    reports = [json.loads(report) for report in _reports_of(tmp_path, 2)]
    manifest = Manifest(content="training", config={}, layout={}, tensors={}, files={})
    for tables in ([], [{"digest": "another"}]):
        with pytest.raises(CheckpointError, match="do not agree"):
            merge_reports(manifest, [reports[0], reports[1] | {"tables": tables}])
    part = SnapshotPart("weight/last", FlatSlice.whole((96, 80)).part(0, 5), torch.zeros(5))
    with pytest.raises(CheckpointError, match=r"rank 1 does not own of .* what its place says"):
        write_rank(tmp_path, 1, [part], _tables_of(2))


@pytest.mark.parametrize(
    "broken",
    [
        {"ranks": {"first": 0, "distance": 1, "number": 10**15}},
        {"ranks": ["../x"]},
        {"buckets": [{"length": 0, "rows": []}, {"length": 0, "rows": [["last", 0, None, 0, 0]]}]},
        {"buckets": [{"length": 9, "rows": [["unknown", 0, None, 0, 0]]}]},
        {"kinds": None},
    ],
)
def test_a_table_that_is_none_is_refused(broken: dict) -> None:
    entry = table_entry(_tables_of(2)[0])
    shapes: Shapes = {f"{i}.{j}": (96, 80) for i in range(4) for j in range(3)}
    assert parse_table(entry, shapes | {"last": (96, 80)}, 2)
    with pytest.raises(CheckpointError, match="table of shards"):
        parse_table(entry | broken, {"last": (96, 80)}, 2)
