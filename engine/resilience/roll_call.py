"""What all ranks agree on before a step: did any of them meet an error, what was asked for, which samples were bad.

One all-reduce of a few integers on the host, in a group of its own (`Mesh.control`): nothing else is ever under way
there, and no device is waited for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from engine.parallel.agree import everyone, raise_together
from engine.parallel.mesh import Mesh
from engine.resilience.signals import SAVE_FILE, STOP_FILE, Wishes, asked_by_file


@dataclass(frozen=True)
class Orders:
    """What the ranks have agreed on for the moment between two steps."""

    stop: str
    """Why the run stops here; empty: it goes on."""
    save: bool
    """A checkpoint is wanted now."""


CARRY_ON = Orders("", False)


class RollCall:
    """Called by every rank before every step. Collective over the mesh."""

    def __init__(self, run_dir: Path, mesh: Mesh, wishes: Wishes | None):
        self.run_dir, self.mesh, self.wishes = run_dir, mesh, wishes
        self._by_file = ""
        """The file by which world rank 0 was asked to stop."""

    def stop_wish(self) -> str:
        """Why this rank is asked to stop; empty: it is not. Local, for who waits for something that may never come."""
        if self.mesh.world.rank == 0 and not self._by_file and asked_by_file(self.run_dir, STOP_FILE):
            self._by_file = f"{self.run_dir / STOP_FILE}"
        return (self.wishes.stop if self.wishes is not None else "") or self._by_file

    def __call__(self, error: Exception | None, counts: Sequence[int] = ()) -> tuple[Orders, list[int]]:
        """error: what this rank ran into. counts: integers to be summed over all ranks.

        Raises, on every rank, the first rank's error.
        """
        stop = self.stop_wish()
        save = self.mesh.world.rank == 0 and asked_by_file(self.run_dir, SAVE_FILE)
        row = torch.tensor([error is not None, bool(stop), save, *counts], dtype=torch.int64)
        dist.all_reduce(row, group=self.mesh.control.group)
        failed, stopping, saving, *sums = row.tolist()
        if failed:
            raise_together(error, self.mesh.control)
        reason = next(filter(None, everyone(stop, self.mesh.control))) if stopping else ""
        return Orders(reason, bool(saving)), sums
