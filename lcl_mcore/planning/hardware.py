"""What is assumed to be left in practice of a GPU and its links, and the seconds that this makes of counted work."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcl_mcore.hardware import NodeGpu
from lcl_mcore.planning.counter import Event, Work
from lcl_mcore.planning.request import Assumptions


@dataclass(frozen=True)
class Machine:
    """A GPU with its links under assumptions; `node` and `network` are bus bandwidths in bytes/s."""

    gpu: NodeGpu
    assumed: Assumptions
    node: float
    network: float

    def seconds(self, work: Work) -> float:
        """Of the device, for one operator call: the larger of what its arithmetic and its memory traffic take."""
        traffic = work.bytes / (self.gpu.bandwidth * self.assumed.memory)
        if not work.flops:
            return traffic
        share = self.assumed.attention if work.kind == "attention" else self.assumed.products
        precision = "fp32" if work.dtype in ("float32", "float64") else "bf16"
        rate = self.gpu.matmul(precision)
        assert rate is not None
        return max(traffic, work.flops / (rate * share))

    def bus(self, ranks: tuple[int, ...]) -> tuple[float, float]:
        """Bus bandwidth (bytes/s) and latency (s) of a group: several members on a node use several adapters."""
        nodes = {rank // self.assumed.gpus_per_node for rank in ranks}
        if len(nodes) == 1:
            return self.node, self.assumed.node_latency
        return min(self.node, self.network * len(ranks) / len(nodes)), self.assumed.network_latency

    def transfer(self, event: Event) -> float:
        """Seconds of a collective alone on its links (ring bandwidth, tree latency)."""
        n = len(event.ranks)
        if n == 1 or event.op == "barrier":
            return 0.0
        ranks = event.ranks
        if event.op in ("send", "recv_"):
            peer = event.where[0] if event.where else 0
            ranks = (event.ranks[0], event.ranks[peer % n]) if n > 2 else event.ranks
        bandwidth, latency = self.bus(ranks)
        if "allreduce" in event.op:
            return 2 * (n - 1) / n * event.bytes / bandwidth + 2 * latency * math.log2(n)
        if "gather" in event.op or "scatter" in event.op:
            return (n - 1) / n * event.bytes / bandwidth + latency * math.log2(n)
        rounds = math.log2(n) if event.op.startswith("broadcast") else 1
        return event.bytes / bandwidth + latency * rounds


def make_machine(
    gpu: NodeGpu, assumed: Assumptions, node_gbs: float | None = None, network_gbs: float | None = None
) -> Machine:
    """Links from the data sheet times the assumed share, or as measured: bus bandwidths in GB/s per GPU."""
    node = node_gbs * 1e9 if node_gbs else gpu.node * assumed.links
    network = network_gbs * 1e9 if network_gbs else gpu.network * assumed.links
    return Machine(gpu, assumed, node, network)
