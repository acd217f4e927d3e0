"""What every part shares: the sizes, the clock, the numbers it leaves."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.parallel.device import Device
from engine.parallel.mesh import Mesh

ROUNDS = 5


@dataclass
class Part:
    """One run of one part: where it computes, at which size, and what it found so far."""

    mesh: Mesh
    device: Device
    toy: bool
    """Sizes that a CPU does in seconds, in place of the 18B's."""
    folder: Path
    """Where the parts before this one, in other processes too, left their numbers."""
    save: Callable[[dict[str, Any]], None]
    """Writes what is known by now."""
    found: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    """What was not as it has to be; the part fails, after it has gone to its end."""

    def note(self, name: str, value: Any) -> None:
        """Keep a number and write everything known, so that a later death costs nothing."""
        self.found[name] = value
        self.save(self.found)

    def earlier(self, name: str) -> dict[str, Any]:
        """Numbers of a part that ran before; FileNotFoundError where it did not."""
        return json.loads((self.folder / f"{name}.json").read_text())["found"]

    def require(self, name: str, value: float, limit: float) -> None:
        """Keep a deviation that must stay below `limit`."""
        self.note(name, value)
        if not value < limit:
            self.wrong.append(f"{name} is {value:.3g}, not below {limit:.3g}")

    def attempt(self, name: str, measure: Callable[[], Any]) -> None:
        """Keep what `measure` gives, or why it cannot be measured here; the other cases of the part go on."""
        try:
            self.note(name, measure())
        except Exception as error:  # whatever a kernel does on its first contact
            self.note(name, {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:400]})
            self.wrong.append(f"{name} failed")
            if self.device.is_cuda:
                torch.cuda.empty_cache()

    def seconds(self, work: Callable[[], Any], *, rounds: int = ROUNDS) -> float:
        """Median of `rounds` after two that warm up (compilation, tuning, the allocator)."""
        for _ in range(1 if self.toy else 2):
            work()
        times = []
        for _ in range(2 if self.toy else rounds):
            start = self.device.clock_s()
            work()
            times.append(self.device.clock_s() - start)
        return statistics.median(times)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor of small random numbers on the device."""
        return torch.randn(*shape, device=self.device.torch_device, dtype=dtype) * 0.02
