"""How fast the job is, in the step records: samples/s, model FLOPs of a rank, MFU where the peak is known, memory.

It is arithmetic on the record's own times: nothing waits for the device.
"""

from typing import TYPE_CHECKING

from engine.model_flops import model_flops
from engine.record import Callback, Record

if TYPE_CHECKING:
    from engine.trainer import Trainer


class Speed(Callback):
    """Adds `samples_per_s`, `tflops` (model TFLOP/s of a rank), `mfu` (0..1) and `memory_gb` (peak of this rank)."""

    def __init__(self, trainer: "Trainer") -> None:
        """Measure the phase that the trainer is about to run. World rank 0 only."""
        config, self._device = trainer.config, trainer.device
        self._flops = model_flops(config) / trainer.mesh.world.size
        self._batch = config.train.global_batch_size
        self._peak_tflops = self._device.peak_tflops(config.train.precision)

    def measure(self, record: Record) -> dict[str, float]:
        """Speed of the step, waiting for data included."""
        rate = self._batch / max(record["step_time_s"], 1e-9)
        tflops = rate * self._flops / 1e12
        share = {} if self._peak_tflops is None else {"mfu": tflops / self._peak_tflops}
        return {"samples_per_s": rate, "tflops": tflops, **share, "memory_gb": self._device.peak_memory_gb()}
