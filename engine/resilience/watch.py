"""A job that stands still says so, names who is late, leaves every rank's Python stack, and ends.

A thread a rank writes where its rank is (step, part of the step, micro-batch, since when) to the store of this start;
two ranks judge, so that one of them may be the culprit. A rank whose thread is silent too is stopped or gone; where all
threads speak and nobody moves, those are late that are not waiting for others. A rank that waits inside a layer for its
tensor partners cannot be told from one that computes: both are named. Loading, saving and evaluation take as long as
they take: there a rank stands still if no thread of it has moved in its Python code. The judge's line goes to standard
error, the stacks to run_dir/hang/, the place of each rank to run_dir/heartbeats/ for watchers outside.

The same thread notices which ranks take longer than most to compute a step. A second one, which asks nobody, notices
when torchrun is gone, and when the store does not answer: its host stands still or cannot be reached. A rank that
stands still, too, ends then without a judge; one whose steps go on does not need the store.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.resilience.exit import leave
from engine.resilience.failures import leave_collectives, lost_peer
from engine.resilience.status import FAILED, write_status
from engine.waits import ANSWER_S, Flag, answer_of

HUNG = 86
"""Exit status of a job that stood still."""
_BEAT_S = 1.0
_FILE_EVERY_S = 15.0
_ORPHAN_S = 60.0
"""How long a rank whose torchrun is gone may take to finish its step."""
_WAITS = ("wait", "deal", "exchange", "reduce", "gather_weights", "loss", "optimizer", "roll call", "share")
"""Parts of a step in which a rank depends on others."""
_LONG = ("start", "callbacks")
"""Loading, saving and evaluation take as long as they take, as long as something moves."""
LOOKS_AROUND = "looks around"
"""Ends the name of a thread that only waits and looks, again and again: what it does is no movement."""
_GONE = {"gone": True}
"""What a rank leaves that is not watched any more."""
_SLOW, _SLOW_STEPS = 1.5, 5


@dataclass
class Pulse:
    """Where this rank is; written by the training thread, read by the watch."""

    step: int = -1
    part: str = "start"
    micro_batch: int | None = None
    since_s: float = field(default_factory=time.monotonic)
    busy_s: float = 0.0
    """Seconds of the last step in which this rank did not wait for others."""
    slow: dict[int, float] = field(default_factory=dict)
    """Ranks that compute longer than most, by how much; on the judges."""

    def at(self, part: str, unit: Any = None) -> None:
        """This rank begins a part of a step; unit: with its micro-batch."""
        self.part, self.since_s = part, time.monotonic()
        self.micro_batch = unit.micro_batch if unit is not None else None

    def step_done(self, step: int, seconds: dict[str, float]) -> None:
        """seconds: of the parts of the step."""
        self.step, self.busy_s = step, sum(s for part, s in seconds.items() if part not in _WAITS)


class Watch:
    """Watches this rank and, on two ranks, all others. Entered when training begins.

    store: where ranks tell each other where they are, on a connection that nothing else uses (the training thread may
    be inside a call of its own for minutes); None for one rank.
    """

    def __init__(self, pulse: Pulse, run_dir: Path, rank: int, size: int, limit_s: float, store: dist.Store | None):
        self.pulse, self.run_dir, self.rank, self.size, self.limit_s = pulse, run_dir, rank, size, limit_s
        self._store = dist.PrefixStore("watch", store) if store is not None else None
        self._began_s = time.monotonic()
        """Since when this rank watches without having been away."""
        self._parent, self._orphan_s = os.getppid(), 0.0
        self._asked_s: float | None = None
        """Since when the store has not answered."""
        self._seen: dict[int, tuple[int, float]] = {}
        self._slow_for: dict[int, tuple[int, int]] = {}
        self._filed_s = -_FILE_EVERY_S
        self._stacks, self._still_since_s = 0, time.monotonic()
        self._ended, self._talked, self._looked = Flag(), Flag(), Flag()

    def __enter__(self) -> "Watch":
        with contextlib.suppress(RuntimeError):  # as below
            self._tell(beat=0)  # before the first step: a rank that stops in its first second must be missed, too
        for work in (self._talk, self._look):
            threading.Thread(target=work, name=f"watch {LOOKS_AROUND}", daemon=True).start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._ended.set()
        store, answers = self._store, self._talked.wait(ANSWER_S)
        self._looked.wait(ANSWER_S)
        if store is None or not answers:
            return
        if isinstance(error, Exception) and lost_peer(error):
            error.silence = self.silence  # type: ignore[attr-defined]
        # others may be at work for long yet, and would miss this one
        answer_of(lambda: store.set(f"{self.rank}", json.dumps(_GONE)), None)

    def _talk(self) -> None:
        """Beat, and hear the others."""
        beat, last_s = 0, time.monotonic()
        while not self._ended.wait(_BEAT_S):
            beat += 1
            self._notice_absence(last_s)
            self._asked_s = last_s = time.monotonic()
            with contextlib.suppress(RuntimeError):  # as collectives will fail, too, or the parent goes
                self._tell(beat)
                self._hear()
            self._asked_s = None
        self._talked.set()

    def _look(self) -> None:
        """Notice what needs no other rank."""
        last_s = time.monotonic()
        while not self._ended.wait(_BEAT_S):
            if self._was_away(last_s) and self._asked_s is not None:
                self._asked_s = self._began_s = self._still_since_s = time.monotonic()
            last_s = time.monotonic()
            self._notice_lost_parent()
            self._file()
            self._notice_mute_store()
        self._looked.set()

    def _was_away(self, last_s: float) -> bool:
        return time.monotonic() - last_s > self.limit_s / 2

    def _notice_mute_store(self) -> None:
        asked_s = self._asked_s
        if asked_s is None or time.monotonic() - asked_s < self.limit_s:
            return
        place = self._place()
        if min(place["for_s"], place.get("still_s", self.limit_s)) < self.limit_s:
            return
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        why = f"nothing has moved for {self.limit_s:.0f} s and torchrun's store at {where} does not answer"
        first = self._is_first_of_host()  # the hosts cannot agree on one
        if first:
            who = f"rank {self.rank} on {socket.gethostname()}"
            print(f"error: {who}: {why}: its host stands still or cannot be reached", file=sys.stderr, flush=True)
        self._leave_word(why)
        if first and "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() == self._parent:  # no other has its number
            # torchrun would ask that store on, deaf to signals, and the job not end
            os.kill(self._parent, signal.SIGKILL)
        leave(HUNG)

    def _notice_absence(self, last_s: float) -> None:
        """A job that a scheduler has stopped for a while, and torchrun with its store: nobody spoke, nobody is late."""
        if self._was_away(last_s):
            self._began_s = self._still_since_s = time.monotonic()
            self._seen.clear()

    def _place(self) -> dict[str, Any]:
        pulse = self.pulse
        for_s = time.monotonic() - max(pulse.since_s, self._began_s)
        return {
            "step": pulse.step + 1, "part": pulse.part, "micro_batch": pulse.micro_batch,
            "for_s": round(for_s, 1), "busy_s": pulse.busy_s, "host": socket.gethostname(),
            "pid": os.getpid(), **(self._look_at_stacks() if pulse.part in _LONG else {}),
        }  # fmt: skip

    def _look_at_stacks(self) -> dict[str, Any]:
        """For how long no thread of this process has moved, and where the training thread is."""
        stacks = stacks_of_threads()
        moved = hash(tuple(stacks.items()))
        if moved != self._stacks:
            self._stacks, self._still_since_s = moved, time.monotonic()
        innermost = sys._current_frames()[threading.main_thread().ident or 0].f_code
        waits = f"{os.sep}torch{os.sep}distributed{os.sep}" in innermost.co_filename
        return {"still_s": round(time.monotonic() - self._still_since_s, 1), "waits": waits}

    def _is_first_of_host(self) -> bool:
        """Whether no other rank that this torchrun has started has asked before, and is still there."""
        self._word = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._word.bind(f"\0eva-megatron {os.getppid()}")  # a name in the kernel, which goes with the process
        except OSError:
            return False
        return True

    def _file(self) -> None:
        if time.monotonic() - self._filed_s < _FILE_EVERY_S:
            return
        self._filed_s = time.monotonic()
        with contextlib.suppress(OSError):
            folder = self.run_dir / "heartbeats"
            folder.mkdir(exist_ok=True)
            hidden = folder / f".rank_{self.rank:05d}.json"
            hidden.write_text(json.dumps({**self._place(), "time": time.time()}) + "\n", encoding="utf-8")
            hidden.replace(folder / f"rank_{self.rank:05d}.json")

    def _tell(self, beat: int) -> None:
        if self._store is None:
            return
        self._store.set(f"{self.rank}", json.dumps({"beat": beat, **self._place()}))
        if self._store.check(["verdict"]):
            self._leave_word(self._store.get("verdict").decode())
            leave(HUNG)

    def _hear(self) -> None:
        if self._store is None or self.rank > 1:
            return
        verdict = self._verdict(self._store)
        if verdict and self._store.add("told", 1) == 1:
            print(f"error: {verdict}; Python stacks in {self.run_dir / 'hang'}", file=sys.stderr, flush=True)
            self._store.set("verdict", verdict)

    def _verdict(self, store: dist.Store) -> str:
        keys = [str(rank) for rank in range(self.size)]
        if store.check(keys):
            told = {rank: json.loads(value) for rank, value in enumerate(store.multi_get(keys))}
            places = {rank: place for rank, place in told.items() if place != _GONE}
            self._judge_pace(places)
            return self._judge(places)
        if time.monotonic() - self._began_s < self.limit_s:
            return ""
        never = [f"rank {rank}" for rank, key in enumerate(keys) if not store.check([key])]
        return f"no sign of life from {_listed(never)} since the start, {self.limit_s:.0f} s ago" if never else ""

    def silence(self, seconds: float) -> str:
        """Name the ranks that give no sign of life for so long from now on and have not ended in order; empty: there is
        none, or the store went with its host.
        """
        before = self._places_told()
        time.sleep(seconds)
        after = self._places_told()
        silent = [rank for rank, place in after.items() if place != _GONE and place == before.get(rank)]
        return f"no sign of life from {_named(silent, after)}" if silent else ""

    def _places_told(self) -> dict[int, dict[str, Any]]:
        store, nobody = self._store, dict[int, dict[str, Any]]()

        def places() -> dict[int, dict[str, Any]]:
            assert store is not None
            told = [rank for rank in range(self.size) if store.check([str(rank)])]
            return {rank: json.loads(store.get(str(rank))) for rank in told}

        return answer_of(places, nobody)

    def _judge(self, places: dict[int, dict[str, Any]]) -> str:
        now = time.monotonic()
        for rank, place in places.items():
            if rank not in self._seen or self._seen[rank][0] != place["beat"]:
                self._seen[rank] = place["beat"], now
        silent = [rank for rank in places if now - self._seen[rank][1] > self.limit_s]
        if silent:
            return f"no sign of life from {_named(silent, places)} for {self.limit_s:.0f} s"
        if min(place["for_s"] for place in places.values()) < self.limit_s:
            return ""
        if min(place.get("still_s", self.limit_s) for place in places.values()) < self.limit_s:
            return ""
        late = [rank for rank, place in places.items() if not _waits(place)] or list(places)
        return f"nothing has moved for {self.limit_s:.0f} s, the others wait for {_named(late, places)}"

    def _judge_pace(self, places: dict[int, dict[str, Any]]) -> None:
        """Name a rank that computed longer than most in several steps in a row."""
        median = statistics.median_low if len(places) == 2 else statistics.median  # of two the faster one is usual
        usual = median(place["busy_s"] for place in places.values())
        for rank, place in places.items():
            step, count = self._slow_for.get(rank, (-1, 0))
            if place["step"] == step or usual <= 0:
                continue
            slow = place["busy_s"] > _SLOW * usual
            self._slow_for[rank] = place["step"], count + 1 if slow else 0
            if not slow:
                self.pulse.slow.pop(rank, None)
            elif count + 1 == _SLOW_STEPS:
                self.pulse.slow[rank] = place["busy_s"] / usual
                if self._store is not None and self._store.add(f"slow/{rank}", 1) == 1:
                    print(
                        f"WARNING: rank {rank} on {place['host']} computes {place['busy_s']:.2f} s a step, most ranks "
                        f"{usual:.2f} s",
                        file=sys.stderr,
                        flush=True,
                    )

    def _leave_word(self, why: str) -> None:
        """Stacks, collectives and the status; then a moment in which others do so, too."""
        folder = self.run_dir / "hang"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"rank_{self.rank:05d}.txt").open("w", encoding="utf-8") as file:
                file.write(json.dumps(self._place()) + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        leave_collectives(folder)
        self._say_why(why)
        time.sleep(2 * _BEAT_S)  # the others hear of it as well before the store may go

    def _say_why(self, why: str) -> None:
        """The job's status; the training thread, which would write it, stands still."""
        if self.rank == 0:
            write_status(self.run_dir, FAILED, step=self.pulse.step + 1, reason=why)

    def _notice_lost_parent(self) -> None:
        """End a rank that torchrun's end has not ended: its step will never be whole."""
        if os.getppid() == self._parent:
            return
        self._orphan_s = self._orphan_s or time.monotonic()
        if time.monotonic() - self._orphan_s > _ORPHAN_S:
            print(f"error: rank {self.rank}: torchrun is gone and the step does not end", file=sys.stderr, flush=True)
            leave(HUNG)


def stacks_of_threads() -> dict[int, int]:
    """Thread -> where in the code each of its calls is, as a number; but those that only look around."""
    frames, found = sys._current_frames(), {}
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if thread.name.endswith(LOOKS_AROUND) or frame is None:
            continue
        calls = []
        while frame is not None:
            calls.append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
        found[thread.ident or 0] = hash(tuple(calls))
    return found


def _waits(place: dict[str, Any]) -> bool:
    return place["part"] in _WAITS or bool(place.get("waits"))


def _named(ranks: list[int], places: dict[int, dict[str, Any]]) -> str:
    def name(rank: int) -> str:
        place = places[rank]
        unit = f", micro-batch {place['micro_batch']}" if place["micro_batch"] is not None else ""
        return f"rank {rank} on {place['host']} (pid {place['pid']}) in '{place['part']}'{unit} of step {place['step']}"

    return _listed([name(rank) for rank in ranks])


def _listed(names: list[str]) -> str:
    return "; ".join(names[:8]) + (f"; and {len(names) - 8} more" if len(names) > 8 else "")
