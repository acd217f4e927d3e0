"""One measured configuration: what is kept, as JSON, and the words of the tables."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.cli import CommandError


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A measured quantity."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Median and range."""
        return cls(median=statistics.median(values), low=min(values), high=max(values), runs=len(values))


@dataclass(frozen=True, kw_only=True)
class Result:
    """A configuration's throughput; docs/benchmarking.md defines every quantity."""

    machine: dict[str, Any]
    """Machine of rank 0, with the device that a rank computes on."""
    config: dict[str, Any]
    """The resolved config."""
    world_size: int
    layout: str
    """TP 2 × PP 2 × DP 1."""
    threads: int
    """CPU threads of a rank."""
    data: str
    """synthetic | real."""
    warmup_steps: int
    step_s: Spread
    """Seconds of the timed steps, each as long as on its slowest rank."""
    step_times_s: list[float]
    data_s: float
    """Seconds of the median step spent waiting for data, on the slowest rank."""
    samples_per_s: float
    """Global batch / median step time."""
    tokens_per_s: float
    """Image tokens that pass through the blocks."""
    model_flops_per_sample: float
    executed_flops_per_sample: float
    peak_flops_per_s: float
    """Peak of all ranks together."""
    peak_source: str
    mfu: float
    """samples_per_s x model_flops_per_sample / peak_flops_per_s."""
    hfu: float
    """The same with executed_flops_per_sample."""
    phases_s: dict[str, float]
    """Seconds a step by phase, mean over ranks, of steps timed with a clock that waits for the device."""
    peak_memory_gb: list[float]
    """Peak of each rank: allocated on a GPU, resident on the CPU."""
    losses: list[float]
    """Losses of the first and the last step."""

    @property
    def micro_batch_size(self) -> int:
        """Micro-batch of the point's config."""
        return int(self.config["train"]["micro_batch_size"])

    @property
    def global_batch_size(self) -> int:
        """Global batch of the point's config."""
        return int(self.config["train"]["global_batch_size"])

    @property
    def samples_per_s_spread(self) -> Spread:
        """Throughput of the median, slowest and fastest step."""
        batch, step = self.global_batch_size, self.step_s
        return Spread(median=batch / step.median, low=batch / step.high, high=batch / step.low, runs=step.runs)

    def save(self, path: Path) -> None:
        """Write JSON, readable in a diff."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def load_result(path: Path) -> Result:
    """Read what `save` wrote. Raises ValueError in one clear line."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Result(**{**tree, "step_s": Spread(**tree["step_s"])})
    except (ValueError, TypeError, KeyError) as error:
        raise CommandError(f"{path} is not a result of tools.benchmark ({type(error).__name__}: {error})") from None


def summary(result: Result) -> str:
    """A result as a table for people."""
    step, rate = result.step_s, result.samples_per_s_spread
    memory = result.peak_memory_gb
    lines = [
        ("layout", f"{result.layout}, micro-batch {result.micro_batch_size}, batch {result.global_batch_size}"),
        ("step", f"{step.median:.4g} s (from {step.low:.4g} to {step.high:.4g} in {step.runs} steps)"),
        ("samples/s", f"{rate.median:,.4g} (from {rate.low:,.4g} to {rate.high:,.4g})"),
        ("tokens/s", f"{result.tokens_per_s:,.4g}"),
        ("MFU, HFU", f"{result.mfu:.1%}, {result.hfu:.1%} of {result.peak_flops_per_s / 1e12:,.4g} TFLOP/s"),
        ("peak", result.peak_source),
        ("memory", f"{max(memory):.3g} GB on the fullest rank, {min(memory):.3g} on the emptiest"),
        ("data", f"{result.data_s:.3g} s of a step waited for it ({result.data})"),
        ("phases", ", ".join(f"{name} {seconds:.3g}" for name, seconds in by_time(result.phases_s)) + " s"),
        ("loss", f"{result.losses[0]:.6f} in the first step, {result.losses[-1]:.6f} in the last"),
    ]
    return "\n".join(f"{name:<10} {value}" for name, value in lines)


def by_time(phases_s: dict[str, float]) -> list[tuple[str, float]]:
    """Longest first."""
    return sorted(phases_s.items(), key=lambda item: -item[1])
