"""Processes that tests start, kill and limit. They come from a fork server that has imported everything, in no time.

A child talks to the test over a pipe.
"""

import multiprocessing as mp
import resource
import signal
import sys
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

from engine.checkpoint.format import lock
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.lock import RunLock
from tests.checkpoint.jobs import alone, build, callback_of, drive, job_config, run_steps, save

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])
REPLY_S = 300.0
"""A child that says nothing for this long has hung."""


@contextmanager
def child(target, *arguments):
    """(process, pipe) of `target(pipe, *arguments)`; killed at the end of the block."""
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        ours.close()


def hear(pipe: Connection):
    """The child's next word."""
    assert pipe.poll(REPLY_S), "the child process says nothing"
    return pipe.recv()


def save_for_ever(pipe: Connection, run_dir: Path) -> None:
    """Resume, then train and save at every step, without end. Says the step it resumed from, 0 after a first save."""
    with alone() as mesh:
        trainer = build(job_config(run_dir, "checkpoint.keep_last=2"), mesh)
        resumed = trainer.position.step
        if not resumed:
            run_steps(trainer, 1)
            save(trainer)
        pipe.send(resumed)
        while True:
            run_steps(trainer, 1)
            save(trainer)


def hold_lock(pipe: Connection, run_dir: Path) -> None:
    """Take the lock of a run folder, look who has it, and keep it. Says "locked"."""
    lock = RunLock(run_dir)
    assert lock.taken_by() == ""
    pipe.send("locked")
    pipe.recv()
    lock.release()


def save_with_file_limit(pipe: Connection, run_dir: Path, limit_bytes: int) -> None:
    """Save once freely, then in the background where no file may grow beyond `limit_bytes`.

    Says "training on" after the step that began that save, then the error of the next step.
    """
    with alone() as mesh:
        trainer = build(job_config(run_dir, "checkpoint.every_steps=1"), mesh)
        callback = callback_of(trainer)
        run_steps(trainer, 1)
        save(trainer)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        drive(trainer, callback, 1)
        pipe.send("training on")
        assert callback.saver._writing is not None
        callback.saver._writing.join()
        try:
            drive(trainer, callback, 1)
        except CheckpointError as error:
            pipe.send(str(error))


def hold_lock_and_look_often(pipe: Connection, run_dir: Path) -> None:
    """Take the lock and look every moment who holds it. Says "locked", then what it has to say at its end."""
    lock._TOUCH_EVERY_S = 0.01
    sys.stderr = SimpleNamespace(write=lambda text: text.strip() and pipe.send(text), flush=lambda: None)  # type: ignore
    hold_lock(pipe, run_dir)
