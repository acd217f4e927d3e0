"""What the planner knows of a GPU and of the cluster it stands in: a YAML file of tools/cost/hardware, or yours."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from models.hashing import HashedOnce
from tools.cost.layout import BYTES, PlanError

PROFILES = Path(__file__).resolve().parent
BF16, FP32 = BYTES["bf16"], BYTES["fp32"]
HOPPER_TFLOPS = 1000
"""Peak in bf16 above which a GPU has the scaled formats of Blackwell."""


@dataclass(frozen=True, kw_only=True)
class Hardware(HashedOnce):
    """One kind of GPU; GB and TFLOP are 10^9 bytes and 10^12 operations."""

    __hash__ = HashedOnce.__hash__

    name: str
    memory_gb: float
    """What a process can allocate."""
    reserved_gb: float
    """Part of it left to the context, the communication library and fragments of the allocator."""
    bf16_tflops: float
    """Peak of dense matrix products, the denominator of MFU."""
    fp32_tflops: float
    """Peak of fp32 products, of towers in fp32: none goes through TF32."""
    memory_gb_s: float
    """Peak bandwidth of the GPU's memory."""
    memory_efficiency: float
    """Share of it that elementwise kernels reach."""
    gemm_limit: float
    """Share of the peak that a very large product reaches."""
    gemm_half_rows: float
    """Rows (tokens) at which a product reaches half of that limit."""
    gemm_half_width: float
    """The same for the smaller dimension of its weight."""
    attention_efficiency: float
    """Share of the peak that attention scores of short sequences reach."""
    nvlink_gb_s: float
    """Bus bandwidth of collectives within a node, as nccl-tests define it."""
    nic_gb_s: float
    """Line rate of a GPU's share of the node's network, one direction."""
    network_efficiency: float
    """Share of the line rate that collectives reach."""
    latency_us: float
    """Latency of one hop of a collective between nodes."""
    pcie_gb_s: float
    """Host to device, or back, of one GPU alone."""
    pcie_all_gb_s: float
    """The same of each where all of a node's GPUs copy at once."""
    host_gb: float
    """Pinned host memory that a GPU may use for what it moves there."""
    fp8_tflops: float
    """Peak of dense fp8 products; 0: none."""
    fp8_gemm_limit: float
    """Share of it that a very large product reaches."""
    multiprocessors: float
    """Streaming multiprocessors."""
    decode_images_s: float
    """Images that the CPUs of one node decode and crop in a second."""

    @property
    def usable_bytes(self) -> float:
        """What a plan may fill."""
        return (self.memory_gb - self.reserved_gb) * 1e9

    @property
    def bf16_flops(self) -> float:
        """Peak FLOP/s."""
        return self.bf16_tflops * 1e12

    @property
    def memory_bytes_s(self) -> float:
        """What elementwise kernels move in a second."""
        return self.memory_gb_s * 1e9 * self.memory_efficiency

    @property
    def fp8_recipe(self) -> str:
        """A model.fp8 for this GPU."""
        return "mxfp8" if self.bf16_tflops > HOPPER_TFLOPS else "current"

    def peak_flops(self, element: int) -> float:
        """FLOP/s of products of numbers of `element` bytes."""
        return self.fp32_tflops * 1e12 if element == FP32 else self.bf16_flops

    def gemm_flops(self, rows: float, width: float, element: int = BF16, fp8: bool = False) -> float:
        """FLOP/s of a product of `rows` tokens with a weight whose smaller dimension is `width`."""
        saturation = rows / (rows + self.gemm_half_rows) * width / (width + self.gemm_half_width)
        best = self.fp8_tflops * 1e12 * self.fp8_gemm_limit if fp8 else self.peak_flops(element) * self.gemm_limit
        return best * saturation

    def bus_bytes_s(self, ranks: int, ranks_per_node: int) -> float:
        """Bus bandwidth of a collective of `ranks`, of which `ranks_per_node` share a node and thus its network cards.

        Each byte crosses the border of a node once, over the cards of all members there. A node's other groups use the
        cards of their own members at the same time.
        """
        if ranks <= ranks_per_node:
            return self.nvlink_gb_s * 1e9
        return min(self.nvlink_gb_s, ranks_per_node * self.nic_gb_s * self.network_efficiency) * 1e9


def load_hardware(name: str) -> Hardware:
    """A profile by name, or a YAML file. Raises PlanError that names what is missing or unknown."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        raise PlanError(f"--gpu {name} is neither a file nor a profile; there are: {', '.join(profile_names())}")
    try:
        given = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise PlanError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return _checked(given, path)


def profile_names() -> list[str]:
    """Names of the profiles that come with the project."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def _checked(given: Any, path: Path) -> Hardware:
    names = [field.name for field in fields(Hardware) if field.name != "name"]
    if not isinstance(given, dict) or set(given) != set(names):
        keys = set(given) if isinstance(given, dict) else set()
        raise PlanError(
            f"{path} must give exactly {', '.join(names)}; missing: {sorted(set(names) - keys)}, "
            f"unknown: {sorted(map(str, keys - set(names)))}"
        )
    wrong = {key: value for key, value in given.items() if type(value) not in (int, float) or value < 0}
    if wrong:
        raise PlanError(f"{path}: {wrong} must be numbers, not negative")
    return Hardware(name=path.stem, **given)
