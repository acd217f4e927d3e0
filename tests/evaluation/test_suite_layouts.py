"""The numbers of a suite at every factorisation of 1, 2 and 4 ranks, and what the tower answers there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.checkpoint.reader import Checkpoint
from engine.evaluation.embedder import Embedder, inference_config, load_encoders
from engine.evaluation.session import Session, load
from engine.parallel.device import prepare
from engine.parallel.mesh import build_mesh
from tests.checkpoint.jobs import SIDE, alone
from tests.distributed import run_distributed, world
from tests.evaluation import sets
from tools.evaluate.__main__ import _parser
from tools.evaluate.suites import score_suite

pytestmark = sets.NEEDS_SKLEARN
pytest.importorskip("av")
LAYOUTS = {
    "4": {
        "tp4": (4, 1, 3),
        "pp4": (1, 4, 4),
        "tp2-pp2": (2, 2, 5),
        "tp2": (2, 1, 6),
        "pp2": (1, 2, 8),
        "dp4": (1, 1, 7),
    },
    "2": {"tp2": (2, 1, 6), "pp2": (1, 2, 1), "dp2": (1, 1, 5)},
}
"""Ranks -> layouts: tensor, pipeline and the micro-batch, which differs from one to the other."""
FEW = {"4": {"tp2-pp2": (2, 2, 5)}, "2": {"dp2": (1, 1, 5)}}
READS = ("features", "pooled", "tokens")


def answers(embedder: Embedder) -> dict[str, torch.Tensor]:
    pixels = noise(9)
    found = {}
    for read in READS:
        for name, rows in embedder.encode(lambda rows: pixels[rows], 9, read).items():  # type: ignore[arg-type]
            found[f"{read} {name}"] = rows
    return found


def noise(count: int) -> torch.Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) - 0.5


def _at_layouts(checkpoint: str, data: str, layouts: dict[str, dict[str, tuple[int, int, int]]]) -> None:
    """What `main` does after the process group exists (in a test it exists already); at first in two pairs of ranks."""
    rank, whole = dist.get_rank(), world()
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    expected = torch.load(f"{data}/answers.pt")
    for ranks, group in (("2", halves[rank // 2]), ("4", whole)):
        for name, (tensor, pipeline, micro_batch) in layouts[ranks].items():
            out = f"{data}/{ranks}{name}" + (f".{rank // 2}" if ranks == "2" else "")
            options = ["--suite", f"{data}/suite.yaml", "--data", data, "--out", out, "--frames", "1", "2"]
            opened = Checkpoint(Path(checkpoint))
            layout = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
            config = inference_config(opened.manifest, layout, world_size=int(ranks), micro_batch=micro_batch)
            session = Session(config, build_mesh(tensor, pipeline, group), prepare().torch_device, opened)
            score_suite(_parser().parse_args([checkpoint, *options]), session)
            embedder = load(session, images=True, texts=False, verify_hashes=False)
            for read, rows in answers(embedder).items():
                torch.testing.assert_close(rows, expected[read], atol=1e-5, rtol=1e-4)
            dist.barrier(group=group)


@pytest.mark.dist
@pytest.mark.parametrize("layouts", [FEW, pytest.param(LAYOUTS, marks=pytest.mark.slow)], ids=["few", "all"])
def test_the_same_numbers_at_every_layout(
    checkpoint: Path, data: Path, results: dict[str, Any], layouts: dict[str, dict[str, tuple[int, int, int]]]
) -> None:
    with alone() as mesh:
        opened = Checkpoint(checkpoint)
        config = inference_config(opened.manifest, [], world_size=1, micro_batch=4)
        encoders, _ = load_encoders(opened, config, mesh, torch.device("cpu"))
        found = answers(Embedder(encoders, mesh, torch.device("cpu"), 4))
        tower = encoders.vision[0]
        with torch.no_grad():
            every = tower(noise(9), samples=9, read="tokens")
            head: Any = tower.head
            projected = torch.nn.functional.normalize(head.projected(found["pooled pooled"]), dim=1)
    torch.save(found, data / "answers.pt")
    assert torch.equal(found["features images"], found["pooled images"])
    torch.testing.assert_close(projected, found["features images"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(every[:, 0], found["pooled pooled"], atol=1e-5, rtol=1e-4)  # the whole last block
    torch.testing.assert_close(every[:, 1:], found["tokens tokens"], atol=1e-5, rtol=1e-4)
    run_distributed(_at_layouts, 4, checkpoint=str(checkpoint), data=str(data), layouts=layouts)
    expected = [entry for entry in results["sets"] if entry["transform"] == "squash"]
    for name in [f"4{name}" for name in layouts["4"]] + [f"2{name}.{half}" for name in layouts["2"] for half in (0, 1)]:
        assert json.loads((data / name / "results.json").read_text())["sets"] == expected, name
