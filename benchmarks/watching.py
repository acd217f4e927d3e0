"""What watching a job costs: CPU seconds of training steps with everything that watches them, and without, by turns.

Two data-parallel ranks train the quickstart's model. Rounds of ten steps alternate in one run: with the watch's thread
(heartbeats, judges), the pulse of every part of a step, the agreement before each step, sums of the owned state around
every update and the comparison of all copies once a round; then with none of it. A rank's CPU seconds do not depend on
what else runs as seconds do, but differ by several percent from round to round: so the work of each part is also added
up by itself, on the CPU clock of its thread. The goal is for that sum, with each optimizer. The watch's thread works by
the second and not by the step, however long one takes on a busy machine: its share is of seconds. Sums of the owned
state are taken inside the update, block by block, of what it finds and of what it leaves: theirs is the difference of
updates with and without, which take turns.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.common import RESULTS, Spread, machine, run_ranks, write_json
from engine.config.phases import first_phase
from engine.config.read import Config, read_job, to_dict
from engine.feed import LocalBatch
from engine.parallel.launch import job
from engine.parallel.mesh import Mesh
from engine.pipeline.clock import Phases
from engine.resilience.agreement import facts_of
from engine.resilience.audit import AtRest, Audit
from engine.resilience.roll_call import RollCall
from engine.resilience.watch import Pulse, Watch
from engine.trainer import Trainer
from tools.cli import command_parser

_EXAMPLES = (
    "python -m benchmarks.watching               # about 5 minutes on 2 idle cores",
    "python -m benchmarks.watching --quick       # that everything runs",
)

GOAL = 0.01
"""Share of a step."""
RANKS, STEPS_OF_ROUND, MICRO_BATCH = 2, 10, 64
OPTIMIZERS = ("lamb", "adamw")
RECIPE = "examples/quickstart/train.yaml"
THREAD, SUMS = "the watch's thread", "sums of the owned state"
EVICT_BYTES = 1 << 26
"""Read between two updates, as a step's own work would: more than a core's caches hold."""
PARTS = {
    "comparison of copies": ((Audit, "compare"),),
    "agreement before a step": ((RollCall, "__call__"),),
    "pulse": ((Pulse, "at"), (Pulse, "step_done")),
    THREAD: ((Watch, "_file"), (Watch, "_tell"), (Watch, "_hear"), (Watch, "_notice_lost_parent")),
}
"""What watches -> its methods; none of them calls one of another part."""


class Meter:
    """CPU seconds by part of what watches. A call inside another one of the same thread counts once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.attached_s = 0.0
        """Seconds, not of the CPU, inside `attached`."""
        self._inside = threading.local()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The methods of PARTS are measured inside the block."""
        kept = [(kind, name, getattr(kind, name), part) for part, methods in PARTS.items() for kind, name in methods]
        for kind, name, method, part in kept:
            setattr(kind, name, self._measured(method, part))
        began = time.perf_counter()
        try:
            yield
        finally:
            self.attached_s += time.perf_counter() - began
            for kind, name, method, _ in kept:
                setattr(kind, name, method)

    def _measured(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def measured(*arguments: Any, **named: Any) -> Any:
            if getattr(self._inside, "now", False):
                return method(*arguments, **named)
            self._inside.now, began = True, time.thread_time()
            try:
                return method(*arguments, **named)
            finally:
                ended = time.thread_time()
                self.seconds[part] += ended - began - (time.thread_time() - ended)  # without what the clock takes
                self._inside.now = False

        return measured


def config_of(folder: Path, batch: int, optimizer: str) -> Config:
    """The quickstart's model and settings on two replicas, without its data."""
    own = [f"optim.name={optimizer}", "parallel.tensor=1", "parallel.pipeline=1", "train.steps=100000"]
    own += [f"train.global_batch_size={batch}", "data.shards=[-]", f"run_dir={folder}"]
    small = [f"train.micro_batch_size={batch // RANKS}"] if batch // RANKS < MICRO_BATCH else []
    return read_job(RECIPE, [*own, *small]).config


def batch_of(config: Config, mesh: Mesh) -> LocalBatch:
    """This rank's part of a batch of noise."""
    rows, model = config.train.global_batch_size // RANKS, config.model
    draw = torch.Generator().manual_seed(mesh.world.rank)
    side, length = model.vision.image_size, model.text.context_length
    images = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=draw)
    tokens = torch.randint(1, model.text.vocab_size - 1, (rows, length), generator=draw)
    tokens[:, -1] = model.text.vocab_size - 1
    return LocalBatch(np.arange(rows) + mesh.world.rank * rows, images, tokens)


def measure(config: Config, rounds: int) -> dict[str, Any]:
    """CPU seconds of this rank: of each round of steps, of each part of what watches."""
    facts = facts_of(to_dict(config))
    with job(config.parallel, facts) as (mesh, device):
        pulse, meter = Pulse(), Meter()
        trainer = Trainer(first_phase(config), mesh, device, pulse)
        roll_call, batch = RollCall(Path(config.run_dir), mesh, None), batch_of(config, mesh)
        seconds: dict[str, list[float]] = {"without": [], "with": []}
        _round(trainer, batch, None)  # warms up
        for _ in range(rounds):
            seconds["without"].append(_round(trainer, batch, None))
            with meter.attached():
                seconds["with"].append(_round(trainer, batch, roll_call))
        updates = updates_by_turns(trainer, STEPS_OF_ROUND * rounds)
    parts, s_with = dict(meter.seconds), meter.attached_s
    return {"cpu_s_of_rounds": seconds, "cpu_s_of_parts": parts, "s_with": s_with, "cpu_s_of_updates": updates}


@torch.no_grad()
def updates_by_turns(trainer: Trainer, turns: int) -> dict[str, list[float]]:
    """CPU seconds of updates whose state is watched, and of others: from reduced gradients to new weights."""
    shards = [shard for tower in trainer.optimizer.towers for shard in tower.shards.shards]
    noise = [1e-3 * torch.randn_like(shard.gradient) for shard in shards]
    loss, evict = torch.ones(()), torch.ones(EVICT_BYTES // 4)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    of_sides = {name: AtRest(trainer.optimizer, watched=name == "with") for name in seconds}
    for turn in range(2 * turns):
        name = ("without", "with")[turn % 2]
        at_rest = of_sides[name]
        at_rest.end()  # the other side's updates have written the state
        for measured in (False, True):  # the first one leaves the sums that the second one looks at
            for shard, gradient in zip(shards, noise, strict=True):
                shard.gradient.copy_(gradient)
            evict.sum()
            dist.barrier(group=trainer.mesh.control.group)
            began = time.thread_time()
            _update(trainer, at_rest, loss)
            if measured:
                seconds[name].append(time.thread_time() - began)
    return seconds


def _update(trainer: Trainer, at_rest: AtRest, loss: torch.Tensor) -> None:
    at_rest.check(update_follows=True)
    norm, _, changed = trainer.optimizer.gradient_norm_and(loss, at_rest.count())
    moved = trainer.optimizer.apply(norm, lambda: not at_rest.check_the_rest())
    assert moved and not changed
    at_rest.begin()


def _round(trainer: Trainer, batch: LocalBatch, roll_call: RollCall | None) -> float:
    watched = roll_call is not None
    at_rest = AtRest(trainer.optimizer, watched=watched)
    trainer.training_step.update.at_rest = trainer.audit.at_rest = at_rest
    trainer.audit._every_steps = [STEPS_OF_ROUND] if watched else []
    world, folder = trainer.mesh.world, Path(trainer.config.run_dir)
    began = time.process_time()
    store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    with Watch(trainer.pulse, folder, world.rank, world.size, 600, store) if watched else nullcontext():
        for _ in range(STEPS_OF_ROUND):
            if roll_call is not None:
                roll_call(None)
            phases = Phases(begins=trainer.pulse.at) if watched else Phases()
            trainer.step(batch, phases)
            if watched:
                trainer.pulse.step_done(trainer.position.step - 1, phases.seconds)
    return time.process_time() - began


def summary(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of a step, of all ranks and rounds."""
    rounds = [rank["cpu_s_of_rounds"] for rank in ranks]
    ratios = [w / o - 1 for of_rank in rounds for w, o in zip(of_rank["with"], of_rank["without"], strict=True)]
    steps_s = sum(sum(of_rank["without"]) for of_rank in rounds)
    of_s = {part: steps_s for part in PARTS} | {THREAD: sum(rank["s_with"] for rank in ranks)}
    of_parts = {part: sum(rank["cpu_s_of_parts"].get(part, 0.0) for rank in ranks) for part in PARTS}
    parts = {part: of_parts[part] / of_s[part] for part in PARTS}
    steps = STEPS_OF_ROUND * sum(len(of_rank["with"]) for of_rank in rounds)
    step_s = statistics.median(s for of_rank in rounds for s in of_rank["without"]) / STEPS_OF_ROUND
    updates = {name: [s for rank in ranks for s in rank["cpu_s_of_updates"][name]] for name in ("with", "without")}
    sums_s = statistics.median(updates["with"]) - statistics.median(updates["without"])
    parts[SUMS] = sums_s / step_s
    return {
        "cpu_s_of_a_step_and_rank": step_s,
        "cpu_ms_of_parts_a_step": {
            SUMS: 1e3 * sums_s,
            **{part: 1e3 * of_parts[part] / steps for part in PARTS if part != THREAD},
        },
        "cpu_ms_of_an_update": {name: 1e3 * statistics.median(of_side) for name, of_side in updates.items()},
        "cpu_ms_of_the_thread_a_second": 1e3 * parts[THREAD],
        "share_of_parts": parts,
        "share": sum(parts.values()),
        "goal": GOAL,
        "with_over_without": asdict(Spread.of(ratios)),
    }


def measured_ranks(options: argparse.Namespace, optimizer: str) -> list[dict[str, Any]]:
    """What each rank of a fresh job has measured."""
    with tempfile.TemporaryDirectory() as folder:
        given = ["--folder", folder, "--optimizer", optimizer]
        given += ["--rounds", str(options.rounds), "--batch", str(options.batch)]
        run_ranks(RANKS, "benchmarks.watching", *given, threads=1)
        return [json.loads((Path(folder) / f"rank_{rank}.json").read_text()) for rank in range(RANKS)]


def main() -> None:
    parser = command_parser("watching", __doc__, _EXAMPLES, room="benchmarks")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of ten steps with the watch, and as many without")
    parser.add_argument("--batch", type=int, default=256, help="global batch")
    parser.add_argument("--quick", action="store_true", help="two rounds of a small batch; nothing is written")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="one of them; otherwise one after the other")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.batch = 2, 32
    if options.folder is not None:  # a rank
        torch.set_num_threads(1)
        found = measure(config_of(options.folder, options.batch, options.optimizer), options.rounds)
        (options.folder / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(found))
        return
    settings = {"recipe": RECIPE, "batch": options.batch, "rounds": options.rounds, "steps": STEPS_OF_ROUND}
    result: dict[str, Any] = {"machine": machine(), "settings": settings}
    for optimizer in [options.optimizer] if options.optimizer else OPTIMIZERS:
        ranks = measured_ranks(options, optimizer)
        result[optimizer] = {"summary": summary(ranks), "ranks": ranks}
        print(json.dumps({optimizer: result[optimizer]["summary"]}, indent=1))
    if not options.quick:
        write_json(result, RESULTS / "watching.json")


if __name__ == "__main__":
    main()
