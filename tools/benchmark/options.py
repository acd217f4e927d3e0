"""How a configuration is measured. Imports no torch: sweeps check their points with it before they start ranks."""

from dataclasses import dataclass, replace
from pathlib import Path

from engine.config.read import Config, check_layout, check_vocabulary, read_job

TRACED_STEPS = 2
"""Steps after the timed ones, with a clock that waits for the device: their phases are reported, their spans drawn."""
GEMM_SIDE = 2048
_NO_SHARDS = ["data.shards=['-']", "data.sources=[]", "data.mixture_schedule=[]"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure."""

    steps: int = 10
    """Timed steps."""
    warmup: int = 3
    """Steps before them: allocators, kernels' first choices, readers that fill their queues."""
    data: str = "synthetic"
    """synthetic | real (data.shards or data.sources of the config)."""
    out: Path = Path("runs/benchmark")
    """Folder of result.json, result.png and timeline/."""
    phase: str = ""
    """Phase of a config that has several; empty: the first."""
    gemm_side: int = GEMM_SIDE
    """Side of the matrix product that stands for the peak where no data sheet does."""

    @property
    def total_steps(self) -> int:
        """Warm-up, timed and traced steps."""
        return self.warmup + self.steps + TRACED_STEPS


def read_config(path: Path, overrides: list[str], options: Options) -> Config:
    """One phase of the config as it stands; synthetic data need no shards. Raises ConfigError or DataError."""
    if options.data == "synthetic":
        replaced = tuple(f"{key.partition('=')[0]}=" for key in _NO_SHARDS)
        overrides = [*(o for o in overrides if not o.startswith(replaced)), *_NO_SHARDS]
    return read_job(path, overrides).phase(options.phase).config


def benchmark_config(path: Path, overrides: list[str], options: Options, world_size: int) -> Config:
    """The config as it is measured. Raises ConfigError or DataError, before any process group exists."""
    config = read_config(path, overrides, options)
    check_layout(config, world_size)
    if options.data == "real":
        check_vocabulary(config)
    total = options.total_steps
    return replace(
        config,
        run_dir=str(options.out),
        train=replace(config.train, steps=max(total, config.train.steps)),
        log=replace(config.log, timeline_steps=list(range(total - TRACED_STEPS, total))),
    )
