"""What a step asks of the host: numbers that are read from the device and arrays that travel to it, counted.

Operators are counted on the CPU, where a wait costs nothing; `tolist`, `cpu`, `numpy` and `from_numpy` are where a GPU
would be waited for or written to from pageable memory.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config.phases import first_phase
from engine.config.read import ParallelConfig, resolve
from engine.parallel.launch import job
from engine.pipeline.clock import Phases
from engine.trainer import Trainer
from tests.engine.test_layouts import random_pairs
from tests.golden import local_batch

_READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "unique"}
_ARRIVES = "lift_fresh"
"""What torch.tensor(number) is to an operator."""


class _Counting(TorchDispatchMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _READS:
            self.found["read"] += 1
        elif name == _ARRIVES:
            self.found["arrives"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    found: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        tolist = Tensor.tolist

        def counted(tensor: Tensor) -> Any:
            found["read"] += 1
            return tolist(tensor)

        patch.setattr(Tensor, "tolist", counted)
        with _Counting(found):
            yield found


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_step_waits_twice_however_many_micro_batches(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for micro_batch in (4, 1):
        options = (f"optim.name={optimizer}", f"train.micro_batch_size={micro_batch}", "train.text_micro_batch_size=2")
        base = ["model.preset=tiny-18b", "train.global_batch_size=8", "train.patch_dropout=0.5", "model.text.depth=1"]
        config = resolve({"data": {"shards": ["-"]}}, [*base, *options])
        with job(ParallelConfig()) as (mesh, device):
            trainer = Trainer(first_phase(config), mesh, device)
            for step in range(2):
                batch = local_batch(*random_pairs(config, step), mesh)
                with _counted(monkeypatch) as found:
                    trainer.step(batch, Phases()).on_host()
        counts.append(found)
    assert counts[0] == counts[1], "grows with the micro-batches"
    # LAMB on a CPU asks for the ratios of both towers, which on a GPU stay there (tests/engine/test_lamb.py).
    assert counts[0]["read"] == 2 + 2 * (optimizer == "lamb")
    assert counts[0]["arrives"] <= 2, "the scale of the loss, the step's kept patches"
