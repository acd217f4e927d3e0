"""Weights and gradients sharded over the data axis: the losses and weights of the unsharded layout to the last bit.

Four ranks, one launch. A case names a layout and options; its reference is the same with parallel.shard=optimizer,
which tests/engine/test_step_options.py and test_layouts.py compare with one process.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config.phases import first_phase
from engine.config.read import Config, ConfigError, check_layout, resolve
from engine.optim.average import averaged_weights
from engine.parallel.device import prepare
from engine.parallel.mesh import Mesh, build_mesh
from engine.parallel.sharded import ShardedPart
from engine.parallel.traffic import TrafficReader
from engine.pipeline.clock import Phases
from engine.trainer import Trainer
from tests.distributed import MANY_CASES_S, run_distributed, world
from tests.engine.test_layouts import random_pairs
from tests.engine.test_waits import counted
from tests.gather import whole_weights
from tests.golden import local_batch

pytestmark = pytest.mark.dist

RANKS, STEPS, DEPTH = 4, 2, 4
COMMON = (
    "model.preset=tiny-18b",
    f"model.vision.depth={DEPTH}",
    "model.text.depth=2",
    "train.global_batch_size=16",
    "train.micro_batch_size=2",
    "train.patch_dropout=0.5",
    "train.logit_scale=null",
    "optim.lr_vision=0.01",
    "optim.lr_text=0.01",
    "optim.lr_other=0.01",
    "optim.warmup_steps=1",
)
DP4 = (1, 1)
TP2_DP2, PP2_DP2 = (2, 1), (1, 2)


@dataclass(frozen=True)
class Case:
    """A layout and what must not show."""

    name: str
    layout: tuple[int, int]
    """TP, PP; DP is what is left of the ranks."""
    virtual: int
    shard: str = "weights"
    options: tuple[str, ...] = ()
    """The reference has them, too."""
    sharding: tuple[str, ...] = ()
    """The reference does not."""

    def config(self, shard: str) -> Config:
        """The job, or its reference."""
        tensor, pipeline = self.layout
        layout = (f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.virtual={self.virtual}")
        rounds = f"parallel.round_size={16 // (RANKS // (tensor * pipeline)) // 2}"
        sharding = (f"parallel.shard={shard}", *self.sharding) if shard != "optimizer" else ()
        more = (rounds,) if self.virtual > 1 and shard == "optimizer" else ()
        return resolve({"data": {"shards": ["-"]}}, [*COMMON, *layout, *more, *self.options, *sharding])


NODE, RING = ("parallel.shard_ranks=2",), "train.loss_variant=ring"
KEPT = ("train.keep_activations=2", "train.offload_stash=true")
FULL = ("train.recompute=full", "train.keep_outputs=fc2")
OUTPUTS = ("train.keep_outputs=all", "train.text_micro_batch_size=1")
FUSED = ("model.block_kernels=fused", "train.precision=bf16")
AVERAGED = ("train.precision=bf16", "optim.ema_decay=0.5")
SIGMOID = ("train.loss=sigmoid", "optim.name=adamw", "train.logit_scale=20")
LOCKED = "train.freeze=[vision.*]"
UPPER_BLOCKS = "train.freeze=[vision.embed.*,vision.blocks.0-1.*,vision.blocks.3.*,text.blocks.*]"
CASES = [
    Case("dp4-blocks", DP4, DEPTH),
    Case("dp4-whole", DP4, 1),
    Case("dp4-gradients", DP4, DEPTH, "gradients"),
    Case("dp4-node", DP4, DEPTH, sharding=NODE),
    Case("dp4-alone", DP4, 2, sharding=("parallel.shard_ranks=1",)),
    Case("tp2-dp2", TP2_DP2, 2),
    Case("tp2-dp2-node-gradients", TP2_DP2, 2, "gradients", ("parallel.sequence=false",)),
    Case("tp2-dp2-plain", TP2_DP2, 2, "gradients", ("parallel.sequence=false", "parallel.overlap=false", RING)),
    Case("tp2-dp2-node", TP2_DP2, 2, sharding=("parallel.shard_ranks=1",)),
    Case("pp2-dp2", PP2_DP2, 2),
    Case("pp2-dp2-kept", PP2_DP2, 2, options=KEPT),
    Case("dp4-kept-all", DP4, 2, options=("train.keep_activations=-1",)),
    Case("pp2-dp2-gradients", PP2_DP2, 1, "gradients"),
    Case("dp4-outputs", DP4, DEPTH, options=OUTPUTS),
    Case("dp4-full", DP4, 2, options=FULL),
    Case("dp4-budget", DP4, 2, options=("train.activation_budget_gb=0.0006",)),
    Case("dp4-buckets", DP4, 2, options=("parallel.bucket_size=5000",)),
    Case("dp4-fused", DP4, 2, options=FUSED),
    Case("dp4-fused-outputs", DP4, DEPTH, options=(*FUSED, *OUTPUTS)),
    Case("dp4-plain", DP4, 2, options=("parallel.overlap=false", RING)),
    Case("pp2-dp2-bf16", PP2_DP2, 2, options=AVERAGED),
    Case("pp2-dp2-bf16-full", PP2_DP2, 2, options=(*AVERAGED, *FULL)),
    Case("dp4-locked-vision", DP4, 2, options=(LOCKED,)),
    Case("dp4-locked-side", DP4, 2, options=("train.freeze=[text.*,logit_scale.*]",), sharding=NODE),
    Case("dp4-locked-text", DP4, 2, options=("train.freeze=[text.*]", "optim.lr_other=0.5"), sharding=NODE),
    Case("dp4-locked-text-plain", DP4, 2, "gradients", ("train.freeze=[text.*]", "parallel.overlap=false")),
    Case("pp2-dp2-upper-blocks", PP2_DP2, 2, options=(UPPER_BLOCKS,)),
    Case("pp2-dp2-upper-blocks-kept", PP2_DP2, 2, options=(UPPER_BLOCKS, *KEPT)),
    Case("pp2-dp2-upper-blocks-bf16-full-kept", PP2_DP2, 2, options=(UPPER_BLOCKS, *AVERAGED, *FULL, *KEPT)),
    Case("dp4-locked-gradients", DP4, 2, "gradients", (LOCKED, "train.precision=bf16")),
    Case("dp4-wire", DP4, DEPTH, options=("parallel.reduce_dtype=bf16",)),
    Case("dp4-sigmoid", DP4, 2, options=SIGMOID),
    Case("dp4-sigmoid-locked", DP4, 2, options=(*SIGMOID, LOCKED)),
]
SLOW = {
    "dp4-whole", "dp4-alone", "tp2-dp2", "tp2-dp2-node", "pp2-dp2-gradients", "dp4-kept-all", "dp4-budget",
    "dp4-buckets", "tp2-dp2-node-gradients", "pp2-dp2-kept", "dp4-full", "dp4-plain", "pp2-dp2-bf16",
    "dp4-locked-vision", "dp4-locked-side", "dp4-locked-text-plain", "pp2-dp2-upper-blocks", "dp4-locked-gradients",
    "dp4-sigmoid", "dp4-outputs", "dp4-fused", "pp2-dp2-bf16-full", "pp2-dp2-upper-blocks-kept",
}  # fmt: skip
"""More places for the same parts, in a launch of the slow tests; each option is in a fast case, too."""
MEASURED = ("dp4-blocks", "dp4-gradients", "pp2-dp2", "dp4-node", "dp4-wire")
"""Cases whose memory and traffic are looked at."""
COMPARED = {(case.layout, case.virtual, case.options) for case in CASES if case.name in ("dp4-blocks", "dp4-wire")}
"""References that are looked at, too."""


# --- what the ranks do ------------------------------------------------------------------------------------------------


def run(config: Config, mesh: Mesh, slow: bool, looked_at: bool) -> dict[str, Any]:
    """Losses of the steps, and the weights on rank 0 (with averages: those, too, and the loss of a step behind them, as
    in slow cases). looked_at: with what the last step measured.
    """
    check_layout(config, RANKS)
    trainer = Trainer(first_phase(config), mesh, prepare())
    out: dict[str, Any] = {"losses": [_step(trainer, step) for step in range(STEPS - looked_at)]}
    if looked_at:
        out["measured"] = measure(trainer, out["losses"])
    out["weights"] = whole_weights(trainer)
    if config.optim.ema_decay:
        with averaged_weights(trainer.optimizer, trainer.towers):
            out["averages"] = whole_weights(trainer)
    if slow or config.optim.ema_decay:
        out["losses"].append(_step(trainer, STEPS))
    trainer.towers.wait_for_weights()
    return out


def _step(trainer: Trainer, number: int) -> float:
    return float(trainer.step(local_batch(*random_pairs(trainer.config, number), trainer.mesh)).loss)


class _Transfers(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes by axis and kind."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.reader, self.bytes = TrafficReader(mesh), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (transfer := self.reader.read(func, args)) is not None:
            self.bytes[f"{transfer.axis} {transfer.kind}"] += transfer.sent_bytes
        return func(*args, **(kwargs or {}))


def measure(trainer: Trainer, losses: list[float]) -> dict[str, Any]:
    """Of a step behind others, whose loss it adds: bytes between steps, most parts whole at once, bytes sent, what the
    host waits for; sizes that formulas start from.
    """
    trainer.meet()
    towers = trainer.towers
    sharded = [part.sharded for part in towers.parts if part.sharded is not None]
    most = Counter[str]()

    def look(kind: str, stores: Callable[[ShardedPart], list]) -> Callable[[Tensor], None]:
        def count(_: Tensor) -> None:
            whole = [part for part in sharded if any(s.flat.untyped_storage().nbytes() for s in stores(part))]
            most[kind] = max(most[kind], len(whole))

        return count

    for part in sharded:
        for kind, stores in (("weights", _weight_stores), ("gradients", _gradient_stores)):
            for store in stores(part):
                store.observer = look(kind, stores)
    resident = _resident_bytes(trainer)
    with _Transfers(trainer.mesh) as transfers:
        with counted() as asked:
            losses.append(_step(trainer, len(losses)))
        trainer.meet()
    chunks = [sum(buffer.numel for buffer in part.ddp.buffers) for part in towers.parts]
    found = {"resident": resident, "most": dict(most), "elements": chunks}
    return found | {"sent": dict(transfers.bytes), "asked": dict(asked)}


def _weight_stores(part: ShardedPart) -> list:
    return part.weight_stores


def _gradient_stores(part: ShardedPart) -> list:
    return part.gradient_stores


def _resident_bytes(trainer: Trainer) -> int:
    """Of weights, gradients and optimizer, each storage once."""
    tensors: list[Tensor] = []
    for part, state in zip(trainer.towers.parts, trainer.optimizer.towers, strict=True):
        tensors += [flat for buffer in part.ddp.buffers for flat in (buffer.param_data, buffer.grad_data)]
        tensors += [flat for flats in state.kinds().values() for flat in flats]
        if part.sharded is not None:
            tensors += [*part.sharded.kept_weights(), *part.sharded.gradients]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def run_all(slow: bool = False) -> dict[str, Any]:
    """The fast or the slow cases and their references on this rank."""
    torch.compiler.set_stance("force_eager")  # fused kernels as their functions are written
    mesh = cache(lambda tensor, pipeline: build_mesh(tensor, pipeline, world()))
    references = cache(
        lambda layout, virtual, options: run(
            Case("", layout, virtual, options=options).config("optimizer"),
            mesh(*layout),
            slow,
            (layout, virtual, options) in COMPARED,
        )
    )
    return {
        case.name: {
            "found": run(case.config(case.shard), mesh(*case.layout), slow, case.name in MEASURED),
            "reference": references(case.layout, case.virtual, case.options),
            **({"rounding": rounding(mesh(*case.layout))} if case.name == "dp4-wire" else {}),
        }
        for case in CASES
        if (case.name in SLOW) == slow
    }


def rounding(mesh: Mesh) -> dict[str, float]:
    """Of gradients that travel in bf16: the largest error, in 2^-8 of what other ranks put in, and how many are off."""
    config = Case("", DP4, 1, options=("parallel.reduce_dtype=bf16", "parallel.overlap=false")).config("optimizer")
    trainer = Trainer(first_phase(config), mesh, prepare())
    trainer.training_step.gradients(local_batch(*random_pairs(config, 0), mesh), Phases())  # type: ignore[attr-defined]
    buckets = [
        (part.owners, bucket)
        for part in trainer.towers.parts
        for buffer in part.ddp.buffers
        for bucket in buffer.buckets
    ]
    expected = []
    for owners, bucket in buckets:
        local = bucket.grad_data.double() * bucket.gradient_scaling_factor
        sums = torch.stack([local, local.abs()])
        dist.all_reduce(sums, group=owners.group)
        expected.append(torch.stack([sums[0], sums[1] - local.abs()]).view(2, owners.size, -1)[:, owners.rank])
    trainer.towers.finish_reduction()
    worst, off = 0.0, 0
    for (owners, bucket), (exact, of_others) in zip(buckets, expected, strict=True):
        error = (bucket.grad_data.view(owners.size, -1)[owners.rank].double() - exact).abs()
        off += int((error > 1e-5 * of_others).sum())
        worst = max(worst, float((error / (of_others * 2**-8 + 1e-12)).max()))
    return {"worst": worst, "off": off}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(run_all, RANKS, timeout_s=MANY_CASES_S)


@pytest.fixture(scope="module")
def slow_ranks() -> list[dict[str, Any]]:
    return run_distributed(run_all, RANKS, timeout_s=MANY_CASES_S, slow=True)


# --- what is true of them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in SLOW], ids=lambda case: case.name)
def test_nothing_shows(case: Case, ranks: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(ranks):
        found, reference = results[case.name]["found"], results[case.name]["reference"]
        assert found["losses"] == reference["losses"], f"rank {rank}"
        for what in ("weights", "averages"):
            for name, value in reference.get(what, {}).items():
                assert torch.equal(found[what][name], value), f"rank {rank}: {what} of {name}"


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.name in SLOW], ids=lambda case: case.name)
def test_nothing_shows_of_more_options(case: Case, slow_ranks: list[dict[str, Any]]) -> None:
    test_nothing_shows(case, slow_ranks)


def test_the_references_move(ranks: list[dict[str, Any]]) -> None:
    for result in ranks[0].values():
        losses = result["reference"]["losses"]
        assert len(set(losses)) == len(losses) >= STEPS


def test_states_are_a_share_of_the_owners(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        result = results["dp4-blocks"]
        elements = sum(result["found"]["measured"]["elements"])
        # fp32: the own slices of weights, gradients and both moments, and nothing else but the learned scale.
        assert result["found"]["measured"]["resident"] == pytest.approx(4 * 4 * elements / RANKS, rel=0.03)
        assert result["found"]["measured"]["resident"] <= 0.405 * result["reference"]["measured"]["resident"]
        gradients = results["dp4-gradients"]["found"]["measured"]
        assert gradients["resident"] == pytest.approx((4 + 3 * 4 / RANKS) * elements, rel=0.03)
        node = results["dp4-node"]["found"]["measured"]  # the slices of the other node are here, too
        assert node["resident"] == pytest.approx((4 / 2 + 4 * 4 / RANKS) * elements, rel=0.03)


def test_gradients_that_travel_in_bf16_are_rounded_once(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        found, elements = results["dp4-wire"], results["dp4-wire"]["found"]["measured"]["elements"]
        assert 0.5 < found["rounding"]["worst"] <= 1.001 and found["rounding"]["off"] > 1000
        exact, losses = results["dp4-blocks"]["reference"]["losses"], found["reference"]["losses"]
        assert losses[1:] != exact[1:] and losses == pytest.approx(exact, rel=1e-3)
        for sent in (found[side]["measured"]["sent"] for side in ("found", "reference")):
            assert sent["data all-to-all"] == 2 * sum(elements[:-1]) and sent["world all-to-all"] == 2 * elements[-1]
            assert not sent.keys() & {"data reduce-scatter", "world reduce-scatter"}


@pytest.mark.parametrize("name", MEASURED)
def test_at_most_two_chunks_are_whole(name: str, ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        most = results[name]["found"]["measured"]["most"]
        # On a pipeline the captions, whose turn is not the same on every stage, are whole besides.
        limit = 3 if name.startswith("pp") else 2
        assert 2 <= most["gradients"] <= limit
        assert 2 <= most.get("weights", 2) <= limit


@pytest.mark.parametrize("name", MEASURED)
def test_parts_that_come_and_go_are_not_waited_for_by_the_host(name: str, ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        sides = (results[name][kind] for kind in ("found", "reference"))
        for found in (side["measured"] for side in sides if "measured" in side):
            ratios = len(found["elements"])  # on a CPU LAMB asks for those of every part; on a GPU they stay there
            at_rest = 1  # on a CPU; on a GPU it is told with the norm
            assert found["asked"]["read"] - ratios - at_rest == 2, "the loss, and the norm"
            assert found["asked"]["arrives"] <= 2


def test_a_chunk_is_gathered_twice_and_reduced_once(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        found = results["dp4-blocks"]["found"]["measured"]
        *chunks, text = found["elements"]
        assert found["sent"]["data all-gather"] == 2 * 4 * sum(chunks) // RANKS
        assert found["sent"]["data reduce-scatter"] == 4 * sum(chunks)
        assert found["sent"]["world reduce-scatter"] == 4 * text
        reference = results["dp4-blocks"]["reference"]["measured"]["sent"]
        assert reference["data all-gather"] == 4 * sum(chunks) // RANKS
        assert found["sent"]["world all-gather"] - reference["world all-gather"] == 4 * text // RANKS


def test_a_node_gathers_within_itself(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        found = results["dp4-node"]["found"]["measured"]
        *chunks, _ = found["elements"]
        # Twice within the node a half each, once between the nodes the own quarter.
        assert found["sent"]["data all-gather"] == 2 * 4 * sum(chunks) // 2 + 4 * sum(chunks) // RANKS


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("parallel.shard=all",), "choose optimizer, gradients or weights"),
        (("parallel.reduce_dtype=fp8",), "choose fp32 or bf16"),
        (("parallel.shard_ranks=2",), "needs parallel.shard=weights"),
        (("parallel.shard=weights", "parallel.shard_ranks=3"), "does not divide DP 4"),
        (("parallel.shard=weights", "parallel.virtual=2", "parallel.round_size=1"), "once a round"),
        (("parallel.round_size=2",), "needs parallel.virtual > 1"),
        (("parallel.virtual=2", "parallel.round_size=3"), "exceeds the 2 micro-batches"),
        (("parallel.pipeline=2", "parallel.virtual=2", "parallel.round_size=1"), "at least as many"),
    ],
)
def test_what_does_not_work_is_refused(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(resolve({"data": {"shards": ["-"]}}, [*COMMON, *options]), RANKS)
