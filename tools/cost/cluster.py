"""Seconds of collectives and messages on GPUs that stand in nodes; which ranks share a node, and its network cards."""

from dataclasses import dataclass

from engine.config.sections.parallel import LINK_BLOCKS
from tools.cost.hardware import Hardware
from tools.cost.layout import Layout
from tools.cost.traffic import axis_size

_BLOCK_GB_S = 20.0
"""What one of NCCL's thread blocks moves; not verified."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs and how they stand in nodes."""

    hardware: Hardware
    gpus: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Nodes that are rented."""
        return -(-self.gpus // self.per_node)

    def members_per_node(self, layout: Layout, axis: str) -> int:
        """Ranks of one group of this axis on one node; ranks are numbered tensor first, then data, then pipeline."""
        stride = {"tensor": 1, "data": layout.tensor, "pipeline": layout.tensor * layout.data}.get(axis)
        return self.per_node if stride is None else max(1, self.per_node // stride)

    def collective_seconds(self, layout: Layout, axis: str, whole_bytes: float, count: int = 1) -> float:
        """All-gather or reduce-scatter of `whole_bytes` in all, in `count` pieces; an all-reduce takes twice that."""
        ranks = axis_size(layout, axis)
        if ranks == 1:
            return 0.0
        members = min(self.members_per_node(layout, axis), ranks)
        hops = -(-ranks // members)
        latency = count * hops * self.hardware.latency_us * 1e-6
        return whole_bytes * (ranks - 1) / ranks / self.hardware.bus_bytes_s(ranks, members) + latency

    def message_seconds(self, layout: Layout, sent_bytes: float) -> float:
        """To the next stage: within the node where the whole pipeline is, else over the rank's own network card; no
        faster than the thread blocks that a message has.
        """
        hardware = self.hardware
        inside = self.members_per_node(layout, "pipeline") >= layout.pipeline
        wire = hardware.nvlink_gb_s if inside else hardware.nic_gb_s * hardware.network_efficiency
        rate = min(wire, LINK_BLOCKS * _BLOCK_GB_S)
        return sent_bytes / (rate * 1e9) + hardware.latency_us * 1e-6


def decoding_nodes(layout: Layout, cluster: Cluster) -> int:
    """Nodes with ranks of the first stage, which alone read images: the first TP x DP ranks of the job."""
    return min(cluster.nodes, -(-layout.tensor * layout.data // cluster.per_node))
