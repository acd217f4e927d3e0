"""Many configurations one after the other: ranks × layouts × micro-batches, each in fresh processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from engine.config.read import ConfigError, TrainConfig
from tools.benchmark.launch import launch
from tools.benchmark.options import Options, benchmark_config, read_config
from tools.benchmark.result import Result, load_result
from tools.cli import CommandError


@dataclass(frozen=True, kw_only=True)
class Point:
    """A configuration of a sweep."""

    ranks: int
    tensor: int
    pipeline: int
    micro_batch: int
    global_batch: int

    def __str__(self) -> str:
        return f"{self.ranks}ranks-tp{self.tensor}-pp{self.pipeline}-mb{self.micro_batch}-b{self.global_batch}"

    @property
    def overrides(self) -> list[str]:
        """What it changes of the config."""
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"train.micro_batch_size={self.micro_batch}",
            f"train.global_batch_size={self.global_batch}",
        ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A point and what came of it: a result, or the reason why there is none."""

    point: Point
    result: Result | None = None
    failure: str = ""
    refused: bool = False
    """The config does not admit the point: it was not started."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is measured, and how."""

    config: Path
    overrides: list[str]
    """Dotted, below those of a point."""
    options: Options
    """Options of every point; `out` is the folder of their folders."""
    threads: int | None
    """CPU threads of a rank; None: OMP_NUM_THREADS if it is set, else the cores shared out."""
    timeout_s: float
    """A point that takes longer has failed."""

    def train(self) -> TrainConfig:
        """Batch sizes that points start from. Raises ConfigError if the config cannot be read."""
        return read_config(self.config, self.overrides, self.options).train

    def run(self, points: list[Point]) -> Iterator[Outcome]:
        """Measure every point; one that fails does not end the sweep."""
        for point in points:
            refusal = self._refused(point)
            failure = refusal or self._launch(point)
            if failure:
                yield Outcome(point=point, failure=failure, refused=refusal is not None)
            else:
                yield Outcome(point=point, result=load_result(self._folder(point) / "result.json"))

    def _refused(self, point: Point) -> str | None:
        """What the config checks say: an answer at once."""
        try:
            benchmark_config(self.config, [*self.overrides, *point.overrides], self.options, point.ranks)
        except (ConfigError, DataError) as error:
            return str(error)
        return None

    def _launch(self, point: Point) -> str | None:
        options = self.options
        arguments = [str(self.config.resolve()), *self.overrides, *point.overrides]
        arguments += [f"--steps={options.steps}", f"--warmup={options.warmup}", f"--data={options.data}"]
        arguments += [f"--phase={options.phase}", f"--gemm-side={options.gemm_side}", f"--out={self._folder(point)}"]
        return launch(arguments, point.ranks, threads=self.threads, timeout_s=self.timeout_s)

    def _folder(self, point: Point) -> Path:
        return (self.options.out / str(point)).resolve()


def points_of(
    *,
    ranks: list[int],
    layouts: list[tuple[int, int]] | None,
    micro_batches: list[int],
    global_batch: int,
    weak: bool,
) -> list[Point]:
    """Every combination, in the order in which they run.

    layouts: (TP, PP); None: every pair that divides the ranks. global_batch: of every point, or with weak scaling of
    the fewest ranks and in proportion for more. Raises ValueError where that is no whole number.
    """
    fewest = min(ranks)
    if weak and (uneven := [n for n in ranks if global_batch * n % fewest]):
        raise CommandError(
            f"weak scaling: {uneven[0]} ranks would have a batch of {global_batch} x {uneven[0]} / {fewest}, no whole "
            "number: make train.global_batch_size (the batch of the fewest ranks) a multiple of them"
        )
    return [
        Point(
            ranks=n,
            tensor=tensor,
            pipeline=pipeline,
            micro_batch=micro_batch,
            global_batch=global_batch * n // fewest if weak else global_batch,
        )
        for n in ranks
        for tensor, pipeline in layouts or _every_layout(n)
        for micro_batch in micro_batches
    ]


def _every_layout(ranks: int) -> list[tuple[int, int]]:
    divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
    return [(t, p) for t in divisors for p in divisors if ranks % (t * p) == 0]
