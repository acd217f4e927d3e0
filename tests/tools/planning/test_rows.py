"""Rows of docs/results/planning.md: what the planner prices today, layout by layout. That none is faster is a search's
answer (`python -m tools.plan`, half a minute a job), which is not repeated here.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from engine.config.read import load_config, preset_model
from engine.config.stages import balanced_layers, even_layers
from models.config import ModelConfig
from tools.cost.cluster import Cluster
from tools.cost.hardware import load_hardware
from tools.cost.kernels import Kernels
from tools.cost.layout import Layout
from tools.plan.estimate import Estimate, estimate
from tools.plan.search import Job, search
from tools.plan.zero3 import best_zero3
from tools.simulate.stage_costs import simulate_config

PAGE = Path(__file__).resolve().parents[3] / "docs" / "results" / "planning.md"
FUSED, FP8 = Kernels(elementwise="fused", sums=True), Kernels(elementwise="compiled", fp8=True)
LARGER: dict[str, dict[str, Any]] = {"30 B": {"depth": 56, "width": 6144}, "50 B": {"depth": 70, "width": 7168}}
LAYOUT = re.compile(
    r"(?:TP (?P<tensor>\d+) × )?PP (?P<pipeline>\d+)(?: \(v (?P<virtual>\d+)\))? × DP (?P<data>\d+)"
    r"(?:, (?P<shard>weights|gradients) sharded(?: of (?P<near>\d+) ranks)?)?"
)


@dataclass(frozen=True)
class Row:
    """A row of the table, and the text of the job it belongs to."""

    job: str
    cells: list[str]

    @cached_property
    def model(self) -> ModelConfig:
        """The job's model."""
        larger = LARGER.get(self.job[:4])
        if larger is None:
            return preset_model(re.split("[ ,]", self.job)[0].lower())
        base = preset_model("18b")
        return replace(base, vision=replace(base.vision, **larger, mlp_hidden=5 * larger["width"]))

    @cached_property
    def cluster(self) -> Cluster:
        """The job's GPUs."""
        found = re.search(r"(\d+) (A100-40|H100|H200|B200)", self.job)
        assert found is not None
        hardware = load_hardware(found[2].lower())
        if "100 Gb/s a node" in self.job:
            hardware = replace(hardware, nic_gb_s=1.5625)
        return Cluster(hardware=hardware, gpus=int(found[1]), per_node=8)

    @cached_property
    def layout(self) -> Layout:
        """What the cells say, as the search lays it out."""
        name, micro, kept, captions, outputs, stash, *_ = self.cells
        parts, batch = LAYOUT.fullmatch(name), re.search(r"([\d,]+) (?:pairs|clips)", self.job)
        assert parts is not None and batch is not None
        cut: dict[str, Any] = {
            key: value and (value if key == "shard" else int(value)) for key, value in parts.groupdict().items()
        }
        pipeline, virtual, shard = cut["pipeline"], cut["virtual"] or 1, cut["shard"] or "optimizer"
        keep, m = map(int, kept.split(" of "))
        dropout = 0.0 if "no dropout" in self.job or "-336" in self.job or "-448" in self.job else 0.5
        tokens, depth = self.model.vision.kept_tokens(dropout), self.model.vision.depth
        layers = balanced_layers(self.model, stages=pipeline, virtual=virtual, tokens=tokens)
        return Layout(
            tensor=cut["tensor"] or 1,
            pipeline=pipeline,
            virtual=virtual,
            data=cut["data"],
            global_batch=int(batch[1].replace(",", "")),
            micro_batch=int(micro),
            frames=8 if "8 frames" in self.job else 1,
            keep=keep,
            text_micro_batch=int(captions),
            patch_dropout=dropout,
            offload_stash=stash == "host",
            outputs_budget_gb=float(outputs.split()[0]) if outputs else None,
            offload_outputs="host" in outputs,
            shard=shard,
            shard_ranks=cut["near"],
            group_size=m if virtual > 1 and shard == "optimizer" else None,
            layers=None if layers == even_layers(depth, pipeline * virtual) else tuple(layers),
            kernels=FP8 if "fp8" in self.job else FUSED,
        )

    @cached_property
    def zero3(self) -> Estimate:
        """What it is compared with."""
        layout = self.layout
        return best_zero3(
            self.model, self.cluster, layout.global_batch, layout.patch_dropout, layout.frames, layout.kernels
        )


def _rows() -> list[Row]:
    table = PAGE.read_text().split("| ZeRO-3, s | ratio |\n")[1].split("\n\n")[0]
    found: list[Row] = []
    for line in table.splitlines()[1:]:
        job, *cells = (cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|"))
        before = found[-1].job if found else ""
        found.append(Row(job.replace("18B, the same", before.split(", 50")[0]) or before, cells))
    return found


ROWS = _rows()


def test_the_table_is_read() -> None:
    assert len(ROWS) > 25 and {row.cluster.hardware.name for row in ROWS} == {"a100-40", "h100", "h200", "b200"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.job}: {row.cells[0]}")
def test_a_row_is_what_the_planner_says(row: Row) -> None:
    planned = estimate(row.model, row.layout, row.cluster)
    gigabytes, step_s, mfu, zero3_s, ratio = row.cells[-5:]
    assert planned.layout is not None and planned.fits
    assert planned.layout.micro_batches == int(row.cells[2].split(" of ")[1])
    printed = (f"{planned.memory.total / 1e9:.1f}", f"{planned.time.total:.2f}", f"{100 * planned.mfu:.1f} %")
    assert printed == (gigabytes, step_s, mfu)
    assert zero3_s in ("", f"{row.zero3.time.total:.2f}")
    assert ratio == f"{row.zero3.time.total / planned.time.total:.2f}"


@pytest.mark.slow
def test_a_search_finds_what_the_page_says() -> None:
    """The job whose pipelines differ least, so that few captions a pass decide between them."""
    rows = [row for row in ROWS if "256 H200, fp8" in row.job]
    layout = rows[0].layout
    found = search(
        Job(
            model=rows[0].model,
            cluster=rows[0].cluster,
            global_batch=layout.global_batch,
            patch_dropout=layout.patch_dropout,
            kernels=layout.kernels,
        )
    )
    best = {(entry.layout.tensor, entry.layout.pipeline): entry.time.total for entry in found.best if entry.layout}
    for row in rows:
        planned = estimate(row.model, row.layout, row.cluster)
        assert best[row.layout.tensor, row.layout.pipeline] <= planned.time.total + 1e-6


def test_the_goals_of_the_sharded_step_are_reached() -> None:
    """What the fastest layout of each job in bf16 was to take (docs/results/planning.md, the table of goals)."""
    paper, *others = [row for row in ROWS if row.cells[-2] and "fp8" not in row.job]
    best = estimate(paper.model, paper.layout, paper.cluster)
    assert best.time.total <= 21.3 and 28.7 / best.time.total >= 1.35 and best.mfu >= 0.63
    named = "no dropout", "clips", "18B-336", "8B, ", "8B-448", "256 H100", "H200", "B200", "30 B", "50 B"
    assert all(any(name in row.job for row in others) for name in named)
    for row in (paper, *others):
        planned = estimate(row.model, row.layout, row.cluster)
        assert row.zero3.time.total / planned.time.total >= 1.10, row.job


ORDERS = re.findall(r"\| PP 8, v (\d), M (\d+).*\| \*\*([\d.]+)\*\* \|", PAGE.read_text())


@pytest.mark.parametrize(("virtual", "micro", "printed"), ORDERS)
def test_a_pipeline_in_rounds_takes_as_long_as_is_said(virtual: str, micro: str, printed: str) -> None:
    """The last column of the table of orders, by the command that is written beside it, and its two goals."""
    options = [
        *("parallel.pipeline=8", f"parallel.virtual={virtual}", "parallel.shard=optimizer"),
        *(f"parallel.round_size={2400 // int(micro)}", f"train.micro_batch_size={micro}"),
        *("train.outputs_budget_gb=0", "train.offload_outputs=false", "model.block_kernels=torch"),
    ]
    config = load_config(PAGE.parents[2] / "examples" / "18b" / "2_clip.yaml", options)
    cluster = Cluster(hardware=load_hardware("a100-40"), gpus=360, per_node=8)
    step_s = simulate_config(config, cluster).step_s
    assert f"{step_s:.2f}" == printed
    assert step_s <= {"2": 28.4, "3": 27.75}.get(virtual, 27.75)


def test_every_order_is_simulated() -> None:
    assert [order[:2] for order in ORDERS] == [("2", "50"), ("3", "60"), ("6", "60")]
