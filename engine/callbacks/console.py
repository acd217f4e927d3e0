"""What a person sees: a progress bar on a terminal, plain lines in a log file.

Numbers come from the step records alone, so this callback never waits for the device. Rates are means over
the steps since the last line, on a terminal over the last `log_every_steps` steps.
"""

from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from data.sources import SourceSize
from engine.record import Callback, Record, RunInfo
from engine.resilience.quarantine import QUARANTINE_FILE


class ConsoleProgress(Callback):
    """Header, then a bar (terminal) or a line every `log_every_steps` (file or pipe). World rank 0 only."""

    def __init__(self, *, log_every_steps: int = 10, console: Console | None = None) -> None:
        """`console` defaults to standard output.

        Raises:
            ValueError: `log_every_steps` is below 1.
        """
        if log_every_steps < 1:
            raise ValueError(f"log_every_steps is {log_every_steps}; it must be at least 1")
        self._log_every_steps = log_every_steps
        self._console = console if console is not None else Console(highlight=False)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._window: list[Record] = []
        self._run: RunInfo | None = None
        self._bad_samples = 0

    def on_start(self, run: RunInfo) -> None:
        self._run = run
        self._print(f"{run.layout} on {run.world_size} {'rank' if run.world_size == 1 else 'ranks'}")
        self._print(start_line(run))
        self._print(f"{_steps(run)}, files in {run.run_dir}")
        if self._console.is_terminal:
            self._progress = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}", markup=False),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=run.total_steps, completed=run.start_step)
            self._progress.start()

    def on_step(self, record: Record) -> None:
        assert self._run is not None, "on_start comes first"
        self._window.append(record)
        done_steps = int(record["step"]) + 1
        self._bad_samples = int(record.get("bad_samples", 0))
        if "eval_zero_shot_top1" in record:
            top1, chance = 100 * record["eval_zero_shot_top1"], 100 * record["eval_chance"]
            self._print(f"step {done_steps:,}: zero-shot top-1 {top1:.1f} % (chance {chance:.2g} %)")
        if self._progress is not None:
            self._progress.update(self._task, completed=done_steps, description=self._printable(self._summary()))
            self._window = self._window[-self._log_every_steps :]
        elif (
            done_steps % self._log_every_steps == 0
            or done_steps
            in (self._run.start_step + 1, self._run.total_steps)  # first and last: a sign of life, the result
        ):
            self._print(f"step {done_steps:,}/{self._run.total_steps:,}  {self._summary()}")
            self._window = []

    def on_end(self, record: Record) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._bad_samples and self._run is not None:
            were = "sample was" if self._bad_samples == 1 else "samples were"
            self._print(f"{self._bad_samples:,} bad {were} replaced so far: {self._run.run_dir / QUARANTINE_FILE}")

    def _summary(self) -> str:
        """The last record in words, with rates over the window."""
        assert self._run is not None
        last = self._window[-1]
        seconds = sum(record["step_time_s"] for record in self._window)
        mean_step_s = seconds / len(self._window)
        parts = [
            f"loss {last['loss']:.4f}",
            f"lr {'/'.join(f'{last[name]:.2e}' for name in ('lr_vision', 'lr_text') if name in last)}",
            f"grad {last['grad_norm']:.3g}",
        ]
        if "i2t_top1" in last:
            parts.append(f"top-1 {100 * last['i2t_top1']:.1f}/{100 * last['t2i_top1']:.1f} %")
        if seconds > 0:
            waiting = sum(record["data_time_s"] for record in self._window) / seconds
            parts.append(f"{self._run.global_batch_size / mean_step_s:,.1f} samples/s")
            parts.append(f"data {100 * waiting:.0f} %")
        if self._bad_samples:
            parts.append(f"bad {self._bad_samples:,}")
        remaining_steps = self._run.total_steps - int(last["step"]) - 1
        parts.append(f"ETA {timedelta(seconds=round(remaining_steps * mean_step_s))}")
        return "  ".join(parts)

    def _print(self, text: str) -> None:
        # soft_wrap: a log line stays one line however narrow the terminal claims to be.
        self._console.print(self._printable(text), markup=False, highlight=False, soft_wrap=True)

    def _printable(self, text: str) -> str:
        """What the output's encoding can hold: a log in the C locale must not end a training run."""
        encoding = self._console.encoding
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            return text.replace("×", "x").encode(encoding, "replace").decode(encoding)
        return text


def _steps(run: RunInfo) -> str:
    """Which steps are to come."""
    phase = f"phase {run.phase}, " if run.phase else ""
    if run.start_step < run.total_steps:
        return f"{phase}steps {run.start_step:,} to {run.total_steps:,}"
    return (
        f"{phase}nothing is left to train: {run.start_step:,} steps are done and train.steps is {run.total_steps:,}; "
        "raise it to go on, or name another run_dir to begin anew"
    )


def start_line(run: RunInfo) -> str:
    """What is trained on what: model, size, images, batch, and shards, samples and epochs of each source."""
    model = f"model {run.model}: " if run.model else ""
    images = f", images of {run.image_size} px" if run.image_size else ""
    data = [_source(source, run.last_step - run.first_step) for source in run.sources]
    parameters = f"{_count(run.parameters)} parameters{images}, global batch {run.global_batch_size:,}"
    return "; ".join([f"{model}{parameters}", *data])


def _source(source: SourceSize, steps: int) -> str:
    name = f"{source.name}: " if source.name else ""
    amount = f"{_several(source.shards, 'shard')}, {_several(source.samples, 'sample')}"
    if not source.epochs:
        return f"{name}{amount}, none of them used"
    return f"{name}{amount}, {_rounded(steps / source.epochs)} steps an epoch, {_rounded(source.epochs)} epochs"


def _several(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _count(number: int) -> str:
    """Short reading of a parameter count, e.g. 17.53 B."""
    for size, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
