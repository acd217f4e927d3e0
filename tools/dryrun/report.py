"""What a dry run says: tables for people, a mapping for programs. GB is 1e9 bytes, TFLOP 1e12."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from engine.parallel.traffic import Transfer
from tools.dryrun.rank import RankReport
from tools.dryrun.recorder import Tally

_FLOP_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "contrastive": {
        "encode": ("encode",),
        "replay": ("replay",),
        "backward": ("backward",),
        "text": ("encode_text", "backward_text"),
        "teacher": ("teacher",),
        "loss": ("loss",),
    },
    "mim": {"teacher": ("teacher",), "forward": ("forward",), "backward": ("backward",)},
}
"""Objective -> row of the table -> phases of the step; the rest is small ("other")."""


_CHUNKS_NAMED = 4
"""Chunks whose blocks are named one by one."""


def flops_by_part(report: RankReport) -> dict[str, int]:
    """FLOPs of one step on this rank; text includes its replay and backward, a backward what is recomputed in it."""
    parts = _FLOP_PARTS[report.objective]
    named = {part: sum(_flops(report.phases, phases)) for part, phases in parts.items()}
    return {**named, "other": sum(t.flops for t in report.phases.values()) - sum(named.values())}


def _flops(tallies: dict[str, Tally], phases: Iterable[str]) -> list[int]:
    return [tallies[phase].flops for phase in phases if phase in tallies]


def transfers_of(report: RankReport) -> Counter[Transfer]:
    """Every transfer of one step on this rank with its number."""
    return sum((tally.transfers for tally in report.phases.values()), Counter())


def traffic_table(report: RankReport) -> list[dict[str, Any]]:
    """One row an axis and kind: count, bytes put in, bytes that a ring sends."""
    rows: dict[tuple[str, int, str], dict[str, Any]] = defaultdict(
        lambda: {"count": 0, "tensor_bytes": 0, "sent_bytes": 0, "wire_bytes": 0.0}
    )
    for transfer, count in transfers_of(report).items():
        row = rows[transfer.axis, transfer.ranks, transfer.kind]
        row["count"] += count
        for name in ("tensor_bytes", "sent_bytes", "wire_bytes"):
            row[name] += count * getattr(transfer, name)
    return [{"axis": axis, "ranks": ranks, "kind": kind, **row} for (axis, ranks, kind), row in sorted(rows.items())]


def to_dict(report: RankReport) -> dict[str, Any]:
    """For --json."""
    peak = report.peak
    return {
        **{name: getattr(report, name) for name in ("objective", "rank", "tensor", "data", "stage")},
        "blocks": [[chunk.start, chunk.stop] for chunk in report.blocks],
        "parameters": report.parameters,
        "micro_batches": report.micro_batches,
        "micro_batches_run": report.micro_batches_run,
        "keep_activations": report.keep,
        "units_in_flight": report.in_flight,
        "activation_bytes_per_micro_batch": report.activation_bytes,
        "peak_bytes": peak.total,
        "peak_phase": report.peak_phase,
        "peak_bytes_by_category": dict(peak.parts),
        "peak_bytes_by_phase": {phase or "between": usage.total for phase, usage in report.peaks.items()},
        "flops": flops_by_part(report),
        "traffic": traffic_table(report),
        "seconds": report.seconds,
    }


def to_text(report: RankReport) -> str:
    """The tables of one rank."""
    parameters = ", ".join(f"{tower} {count / 1e6:,.1f} M" for tower, count in report.parameters.items())
    return "\n".join(
        [
            f"rank {report.rank}: tensor {report.tensor}, data {report.data}, stage {report.stage} ({_blocks(report)})",
            f"  parameters        {parameters}",
            f"  micro-batches     {_micro_batches_line(report)}",
            f"  dry run           {report.seconds:.1f} s",
            "",
            *_memory_lines(report),
            "",
            *_flop_lines(report),
            "",
            *_traffic_lines(report),
        ]
    )


def _blocks(report: RankReport) -> str:
    """Blocks of each chunk; of many the first two and the last."""
    chunks = [f"{c.start}-{c.stop - 1}" if len(c) > 1 else f"{c.start}" for c in report.blocks]
    if len(chunks) <= _CHUNKS_NAMED:
        return f"blocks {', '.join(chunks)}"
    return f"{len(chunks)} chunks: blocks {', '.join(chunks[:2])} … {chunks[-1]}"


def _micro_batches_line(report: RankReport) -> str:
    each = f"{report.activation_bytes / 1e9:.2f} GB"
    if report.in_flight:
        units = f"{len(report.blocks)} unit{'s' if len(report.blocks) > 1 else ''} of work"
        return (
            f"{report.micro_batches}, each {units}; at most {report.in_flight} units wait for their backward "
            f"({each} a micro-batch)"
        )
    return (
        f"{report.micro_batches}, {report.keep} of them keep their activations ({each} each); "
        f"{report.micro_batches_run} ran, the others repeat them"
    )


def _memory_lines(report: RankReport) -> list[str]:
    peak = report.peak
    parts = [(name, size) for name, size in peak.parts.most_common() if size > 0]
    return [
        f"  memory: peak {peak.total / 1e9:.2f} GB, in phase {report.peak_phase or 'between phases'}",
        *(f"    {name:<14}{size / 1e9:>9.2f} GB" for name, size in parts),
    ]


def _flop_lines(report: RankReport) -> list[str]:
    parts = flops_by_part(report)
    total = sum(parts.values())
    return [
        f"  compute: {total / 1e12:,.1f} TFLOP in matrix products and attention",
        *(
            f"    {name:<14}{count / 1e12:>12,.2f} TFLOP {count / total:>7.1%}"
            for name, count in parts.items()
            if count
        ),
    ]


def _traffic_lines(report: RankReport) -> list[str]:
    lines = [f"  {'traffic':<12}{'ranks':>6}  {'kind':<16}{'count':>8}{'tensors':>14}{'leaves in a ring':>20}"]
    for row in traffic_table(report):
        lines.append(
            f"    {row['axis']:<10}{row['ranks']:>6}  {row['kind']:<16}{row['count']:>8}"
            f"{row['tensor_bytes'] / 1e9:>11.3f} GB{row['wire_bytes'] / 1e9:>17.3f} GB"
        )
    return lines
