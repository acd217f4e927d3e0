"""Results beside each other: a table of many, and a comparison of two."""

from collections.abc import Iterator, Sequence
from typing import Any

from tools.benchmark.result import Result, Spread
from tools.cli import CommandError

# Same batch, seed and data: the first loss is the same on every layout (docs/layout_invariance.md).
LOSSES_AGREE = {"fp32": 1e-4, "bf16": 2e-2}
_MACHINE = ("device", "cpu", "cores", "memory_gb", "torch", "python")
_NOT_MEASURED = ("run_dir", "log.", "checkpoint.", "train.steps")


def efficiencies(results: Sequence[Result]) -> list[float]:
    """Samples/s of a rank, relative to the best result with the fewest ranks."""
    fewest = min(result.world_size for result in results)
    base = max(result.samples_per_s for result in results if result.world_size == fewest) / fewest
    return [result.samples_per_s / result.world_size / base for result in results]


def results_table(results: Sequence[Result]) -> str:
    """One line a result."""
    head = f"{'ranks':>5}  {'layout':<20}{'micro':>6}{'batch':>8}{'step s':>9}{'range':>17}{'samples/s':>11}"
    lines = [head + f"{'a rank':>9}{'efficiency':>12}{'MFU':>7}{'HFU':>7}{'GB':>7}{'first loss':>12}"]
    for result, efficiency in zip(results, efficiencies(results), strict=True):
        step = result.step_s
        lines.append(
            f"{result.world_size:>5}  {result.layout:<20}{result.micro_batch_size:>6}{result.global_batch_size:>8}"
            f"{step.median:>9.3g}{f'{step.low:.3g} - {step.high:.3g}':>17}{result.samples_per_s:>11,.4g}"
            f"{result.samples_per_s / result.world_size:>9,.4g}{efficiency:>12.1%}{result.mfu:>7.1%}{result.hfu:>7.1%}"
            f"{max(result.peak_memory_gb):>7.3g}{result.losses[0]:>12.6f}"
        )
    return "\n".join([*lines, *_loss_warnings(results)])


def _loss_warnings(results: Sequence[Result]) -> Iterator[str]:
    for batch in sorted({result.global_batch_size for result in results}):
        same = [result for result in results if result.global_batch_size == batch]
        losses = [result.losses[0] for result in same]
        tolerance = max(LOSSES_AGREE[result.config["train"]["precision"]] for result in same)
        if max(losses) - min(losses) > tolerance * abs(min(losses)):
            yield f"warning: first losses at batch {batch} differ by more than {tolerance:g}: these are not one curve"


def differences(a: Result, b: Result) -> list[str]:
    """What a reader of their ratio has to know: machine, commit, settings."""
    found = [_differs(name, a.machine, b.machine) for name in (*_MACHINE, "commit")]
    found += [_differs(name, vars(a), vars(b)) for name in ("layout", "world_size", "threads", "data")]
    left, right = dict(_flat(a.config)), dict(_flat(b.config))
    settings = [name for name in left | right if not name.startswith(_NOT_MEASURED)]
    found += [_differs(name, left, right) for name in settings]
    if "dirty" in str(a.machine.get("commit")) and a.machine.get("commit") == b.machine.get("commit"):
        found.append(f"commit {a.machine['commit']}: with changes that are not committed, perhaps not the same ones")
    return [line for line in found if line]


def compare(a: Result, b: Result, *, anyway: bool = False) -> str:
    """B relative to A. Raises ValueError where a sample of one is not a sample of the other, unless `anyway`."""
    if not anyway and (why := _other_sample(a, b)):
        raise CommandError(f"{why}: their throughputs do not compare (--anyway compares them)")
    lines = [f"{'':<14}{'A':>12}{'B':>12}{'B / A':>9}   range of the ratio"]
    lines += [_ratio_line("samples/s", a.samples_per_s_spread, b.samples_per_s_spread)]
    lines += [_ratio_line("step s", a.step_s, b.step_s)]
    for name, left, right in (
        ("tokens/s", a.tokens_per_s, b.tokens_per_s),
        ("MFU", a.mfu, b.mfu),
        ("HFU", a.hfu, b.hfu),
        ("peak TFLOP/s", a.peak_flops_per_s / 1e12, b.peak_flops_per_s / 1e12),
        ("memory GB", max(a.peak_memory_gb), max(b.peak_memory_gb)),
        *((phase, a.phases_s[phase], b.phases_s[phase]) for phase in a.phases_s if b.phases_s.get(phase)),
    ):
        lines.append(f"{name:<14}{left:>12.4g}{right:>12.4g}{right / left if left else float('nan'):>9.3f}")
    return "\n".join([*lines, *(f"differs: {line}" for line in differences(a, b))])


def _ratio_line(name: str, a: Spread, b: Spread) -> str:
    low, high = b.low / a.high, b.high / a.low
    verdict = "   (within the spread of the steps)" if low <= 1 <= high else ""
    return f"{name:<14}{a.median:>12.4g}{b.median:>12.4g}{b.median / a.median:>9.3f}   {low:.3f} - {high:.3f}{verdict}"


def _other_sample(a: Result, b: Result) -> str:
    if a.data != b.data:
        return f"A was measured with {a.data} data, B with {b.data} data"
    if a.model_flops_per_sample != b.model_flops_per_sample:
        left, right = (result.model_flops_per_sample / 1e9 for result in (a, b))
        return f"a sample of A costs {left:,.6g} GFLOP (model FLOPs), one of B {right:,.6g}"
    return ""


def _differs(name: str, a: dict[str, Any], b: dict[str, Any]) -> str:
    left, right = a.get(name), b.get(name)
    return "" if left == right else f"{name} {left} → {right}"


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
