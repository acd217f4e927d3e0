"""What is done to a rank when it enters a part of a step: armed in the rank itself, before the job begins.

A fault finds the trainer of its rank, the folders of the job and the processes of the other ranks; what has to come of
it is said beside it.
"""

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.chaos.ranks import children_of, send, wait_until_stopped

PARTS = {
    "encode": ("encode",),
    "loss": ("loss",),
    "backprop": ("replay", "backward"),
    "reduce": ("reduce",),
    "optimizer": ("optimizer",),
    "gather": ("gather_weights",),
    "save": ("save",),
}
"""Phase of a step -> the parts, as the watch knows them, one of which begins it."""
PAUSE_S = 3.0


@dataclass(frozen=True)
class Place:
    """Where and when a rank is disturbed."""

    rank: int
    step: int
    """0-based; of a save, the steps done."""
    phase: str
    run_dir: Path
    shards: Path
    scratch: Path
    """Where ranks leave their process ids, and the fault what it saw."""

    def ranks(self) -> list[int]:
        """Process ids of all ranks."""
        return [int(path.read_text()) for path in sorted(self.scratch.glob("pid_*"))]


@dataclass(frozen=True)
class Fault:
    """A disturbance and what has to come of it."""

    name: str
    do: Callable[[Place, Any], None]
    """Gets the place and the rank's trainer."""
    comes: str
    """on: the job goes on as if nothing had been | stops: in order, saved | ends: with one line that holds `says`, or
    goes on unharmed where it came too late to do harm | counted.
    """
    says: str = ""
    overrides: tuple[str, ...] = ()
    mend: Callable[[Place], None] = lambda place: None
    """Undone before the next start, as a person or a scheduler would."""
    leaves: str = ""
    """What the log of the ranks holds beside that line."""


def arm(rank: int, fault: Callable[[Place, Any], None], place: Place, *, is_wish: bool = False) -> None:
    """Disturb this rank if it is the one; run in every rank before its job. However fast steps are, the fault has been
    there before the next part begins. is_wish: nor does it before the rank has taken down what it was asked for.
    """
    (place.scratch / f"pid_{rank}").write_text(str(os.getpid()))
    if rank != place.rank:
        return
    from engine.checkpoint import save
    from engine.resilience.watch import Pulse
    from engine.trainer import Trainer

    seen: dict[str, Any] = {}
    begin, fit, write_rank, begin_save = Pulse.at, Trainer.fit, save.write_rank, save.CheckpointSaver.save
    over = threading.Event()

    def fire() -> None:
        if "fired" in seen:
            return
        seen["fired"] = True
        (place.scratch / "fired").write_text(repr(time.monotonic()))
        try:
            fault(place, seen["trainer"])
            while is_wish and not seen["wishes"].stop:  # a thread takes it down
                time.sleep(0.001)
        finally:
            over.set()

    def at(pulse: Pulse, part: str, unit: Any = None) -> None:
        begin(pulse, part, unit)
        if part in PARTS[place.phase] and pulse.step + 1 == place.step:
            fire()

    def fitted(trainer: Trainer, callbacks: Any, wishes: Any) -> str:
        seen.update(trainer=trainer, wishes=wishes)
        return fit(trainer, callbacks, wishes)

    def saving(saver: save.CheckpointSaver, position: Any, *arguments: Any) -> None:
        begin_save(saver, position, *arguments)
        if place.phase == "save" and position.step == place.step:
            over.wait()  # the writer is a thread

    def written(folder: Path, *arguments: Any) -> dict[str, Any]:
        if place.phase == "save" and folder.name.endswith(f"{place.step:08d}"):
            fire()
        return write_rank(folder, *arguments)

    Pulse.at, Trainer.fit, save.write_rank = at, fitted, written  # type: ignore[method-assign, assignment]
    save.CheckpointSaver.save = saving  # type: ignore[method-assign, assignment]


def note_first_step(scratch: str, rank: int) -> None:
    """Leave the moment in which this start has made its first step; run in every rank before its job."""
    from engine.resilience.watch import Pulse

    done, path = Pulse.step_done, Path(scratch) / "trained"

    def step_done(pulse: Pulse, *arguments: Any) -> None:
        done(pulse, *arguments)
        if not path.exists():
            path.write_text(repr(time.monotonic()))

    Pulse.step_done = step_done  # type: ignore[method-assign, assignment]


# --- processes -------------------------------------------------------------------------------------------------------


def to_all(number: int) -> Callable[[Place, Any], None]:
    """As torchrun or a terminal passes a signal on."""

    def signal_all(place: Place, trainer: Any) -> None:
        for pid in place.ranks():
            os.kill(pid, number)

    return signal_all


def to_self(number: int) -> Callable[[Place, Any], None]:
    """One rank alone."""
    return lambda place, trainer: os.kill(os.getpid(), number)


def pause(place: Place, trainer: Any) -> None:
    """Stand still for a while."""
    own = os.getpid()
    if os.fork() == 0:
        wait_until_stopped([own])
        time.sleep(PAUSE_S)
        os.kill(own, signal.SIGCONT)
        os._exit(0)
    os.kill(own, signal.SIGSTOP)


def to_readers(number: int) -> Callable[[Place, Any], None]:
    """The reader processes of this rank."""

    def to_children(place: Place, trainer: Any) -> None:
        for child in children_of("self"):
            send(child, number)

    return to_children


def touch(name: str) -> Callable[[Place, Any], None]:
    """A file in the run folder."""
    return lambda place, trainer: (place.run_dir / name).touch()


def fail(error: Exception) -> Callable[[Place, Any], None]:
    """What no one has foreseen."""

    def throw(place: Place, trainer: Any) -> None:
        raise error

    return throw


def no_more_files(place: Place, trainer: Any) -> None:
    """Every descriptor is taken."""
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, used + 1))


def clock_jumps(place: Place, trainer: Any) -> None:
    """This host's clock goes an hour ahead."""
    true = time.time
    time.time = lambda: true() + 3600


def second_job(place: Place, trainer: Any) -> None:
    """Another job takes the run folder, or tries to."""
    from engine.checkpoint.format.errors import CheckpointError
    from engine.checkpoint.format.lock import RunLock

    try:
        RunLock(place.run_dir)
    except CheckpointError as error:
        (place.scratch / "second").write_text(str(error))


# --- files -----------------------------------------------------------------------------------------------------------


def fill(place: Place, trainer: Any) -> None:
    """The disk of the run folder is full."""
    with (place.run_dir.parent / "filler").open("wb", buffering=0) as file:
        block = bytes(1 << 16)
        try:
            while True:
                file.write(block)
        except OSError:
            return


def fill_for_a_while(place: Place, trainer: Any) -> None:
    """The same until somebody frees space, two steps later."""
    from engine.resilience.watch import Pulse

    fill(place, trainer)
    begin = Pulse.at

    def at(pulse: Pulse, part: str, unit: Any = None) -> None:
        if pulse.step >= place.step + 2:
            empty(place)
        begin(pulse, part, unit)

    Pulse.at = at  # type: ignore[method-assign, assignment]


def empty(place: Place) -> None:
    """Somebody frees space."""
    (place.run_dir.parent / "filler").unlink(missing_ok=True)


def read_only(place: Place, trainer: Any) -> None:
    """The disk of the run folder takes nothing any more, as one with errors; what is open stays open."""
    disk = str(place.run_dir.parent)
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)


def writable(place: Place) -> None:
    """Somebody mends the disk."""
    subprocess.run(["umount", "-l", str(place.run_dir.parent)], check=True)


def remove_run(place: Place, trainer: Any) -> None:
    """Somebody removes the run folder."""
    shutil.rmtree(place.run_dir, ignore_errors=True)


def remove_shards(place: Place, trainer: Any) -> None:
    """The shards are gone; open ones can still be read."""
    for shard in place.shards.glob("*.tar"):
        shard.rename(shard.with_suffix(".gone"))


def cut_shards(place: Place, trainer: Any) -> None:
    """Every shard ends in the middle."""
    for shard in place.shards.glob("*.tar"):
        shutil.copy(shard, shard.with_suffix(".gone"))
        os.truncate(shard, shard.stat().st_size // 2)


def replace_shards(place: Place, trainer: Any) -> None:
    """Other pictures under the same names."""
    from tests.data.shard_factory import make_shards

    remove_shards(place, trainer)
    make_shards(place.shards, [24, 24])


def restore_shards(place: Place) -> None:
    """What they were, with their times."""
    for shard in place.shards.glob("*.gone"):
        shard.rename(shard.with_suffix(".tar"))


def damaged_checkpoint(how: str) -> Callable[[Place, Any], None]:
    """The newest checkpoint is damaged, and the rank is gone."""

    def damage(place: Place, trainer: Any) -> None:
        folders = sorted((place.run_dir / "checkpoints").glob("step_*"))
        file = sorted(folders[-1].glob("rank_*.safetensors"))[-1]
        if how == "flipped":
            with file.open("r+b") as stream:
                stream.seek(-5, os.SEEK_END)
                byte = stream.read(1)[0]
                stream.seek(-5, os.SEEK_END)
                stream.write(bytes([byte ^ 1]))
        elif how == "cut":
            os.truncate(file, file.stat().st_size // 2)
        elif how == "gone":
            file.unlink()
        else:
            (place.run_dir / "checkpoints" / "latest").write_text("/")
        os.kill(os.getpid(), signal.SIGKILL)

    return damage


# --- numbers ---------------------------------------------------------------------------------------------------------


def _flip(values: torch.Tensor) -> None:
    values.detach().view(-1).view(torch.int32)[3] ^= 1 << 20


def flipped_weight(place: Place, trainer: Any) -> None:
    """A bit of a weight that another rank owns."""
    _flip(trainer.towers.parts[0].ddp.buffers[0].param_data)


def flipped_moment(place: Place, trainer: Any) -> None:
    """A bit of a second moment, which nobody has a copy of."""
    _flip(list(trainer.optimizer.towers[0].moments.values())[-1][0])


def nan_gradient(place: Place, trainer: Any) -> None:
    """One gradient that is not a number, among those that this rank reduces."""
    gradients = trainer.towers.parts[0].ddp.buffers[0].grad_data.view(-1)
    gradients[gradients.numel() // 2 + 3] = float("nan")  # the end is padding


def nan_master(place: Place, trainer: Any) -> None:
    """One owned weight."""
    with torch.no_grad():
        trainer.optimizer.towers[0].master[0].view(-1)[3] = float("nan")


STILL = ("parallel.hang_minutes=0.4",)
"""Eight times PAUSE_S: a busy machine is not one that stands still."""
READ = ("data.workers=1", "data.stall_timeout_s=20", "data.remote_patience_s=2")
CHANGED = "state has changed between two updates"
AUDIT = ("health.audit_every_steps=1",)
LOST, NOT_FINITE = "lost another rank", "not finite"
FAULTS = [
    Fault("SIGTERM to all ranks", to_all(signal.SIGTERM), "stops", "stopped by SIGTERM after step "),
    Fault("SIGINT to all ranks", to_all(signal.SIGINT), "stops", "stopped by SIGINT after step "),
    Fault("SIGUSR1 to a rank", to_self(signal.SIGUSR1), "stops", "stopped by SIGUSR1 after step "),
    Fault("touch STOP", touch("STOP"), "stops", "/STOP after step "),
    Fault("touch SAVE", touch("SAVE"), "on"),
    Fault("kill -9 of a rank", to_self(signal.SIGKILL), "ends", LOST),
    Fault("segmentation fault", to_self(signal.SIGSEGV), "ends", LOST, leaves="Fatal Python error: Segmentation fault"),
    Fault("an exception", fail(RuntimeError("injected")), "ends", "RuntimeError: injected"),
    Fault("out of memory", fail(torch.OutOfMemoryError("injected")), "ends", "injected"),
    Fault("SIGSTOP of a rank", to_self(signal.SIGSTOP), "ends", "no sign of life from rank 1 on ", STILL),
    Fault(f"SIGSTOP for {PAUSE_S:.0f} s", pause, "on", "", STILL),
    Fault("kill -9 of a reader", to_readers(signal.SIGKILL), "ends", "reader.* died", READ),
    Fault("SIGSTOP of a reader", to_readers(signal.SIGSTOP), "ends", "the readers gave no batch", READ),
    Fault("no descriptor left", no_more_files, "ends", "Too many open files"),
    Fault("disk full and stop", fill, "ends", "are free|No space left", mend=empty),
    Fault("disk full and skip", fill_for_a_while, "on", "", ("checkpoint.on_full=skip",)),
    Fault("disk read-only", read_only, "ends", "Read-only file system", mend=writable),
    Fault("run folder removed", remove_run, "counted"),
    Fault("shards vanish", remove_shards, "on", mend=restore_shards),
    Fault("shards cut in place", cut_shards, "counted", mend=restore_shards),
    Fault("shards replaced", replace_shards, "on", mend=restore_shards),
    Fault("checkpoint flipped", damaged_checkpoint("flipped"), "ends", LOST),
    Fault("checkpoint cut", damaged_checkpoint("cut"), "ends", LOST),
    Fault("checkpoint file gone", damaged_checkpoint("gone"), "ends", LOST),
    Fault("`latest` elsewhere", damaged_checkpoint("latest"), "ends", LOST),
    Fault("NaN gradient", nan_gradient, "ends", NOT_FINITE),
    Fault("NaN master weight", nan_master, "ends", f"{NOT_FINITE}|{CHANGED}"),
    Fault("flipped weight", flipped_weight, "ends", "copies of weights are not equal", AUDIT),
    Fault("flipped moment", flipped_moment, "ends", f"{CHANGED}: moment2 of rank 1", AUDIT),
    Fault("clock an hour ahead", clock_jumps, "on"),
    Fault("two jobs on one run_dir", second_job, "on"),
]


def named(name: str) -> Fault:
    """The fault of this name."""
    return next(fault for fault in FAULTS if fault.name == name)


def disturb(rank: int, name: str, place: dict[str, Any]) -> None:
    """`arm` with what can be sent to another process."""
    fault = named(name)
    arm(rank, fault.do, Place(**place), is_wish=fault.comes == "stops" and name.startswith("SIG"))


def as_dict(place: Place) -> dict[str, Any]:
    """A place to be sent."""
    return {field.name: getattr(place, field.name) for field in dataclasses.fields(place)}
