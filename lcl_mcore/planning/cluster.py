"""What is assumed to be left in practice of a GPU and its links, and the seconds that this makes of counted work."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcl_mcore.hardware import NodeGpu
from lcl_mcore.planning.counter import CollectiveCall, OperatorCall
from lcl_mcore.planning.request import Assumptions


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind of GPU, under assumptions.

    Attributes:
        gpu: every GPU of it.
        assumed: what is left of data sheets in practice.
        node: bus bandwidth within a node, bytes/s.
        network: bus bandwidth between nodes for each GPU, bytes/s.
    """

    gpu: NodeGpu
    assumed: Assumptions
    node: float
    network: float

    @property
    def room(self) -> float:
        """Bytes of a GPU that tensors may fill."""
        return self.gpu.memory * self.assumed.headroom

    def seconds(self, call: OperatorCall) -> float:
        """Seconds of the device: the larger of what a call's arithmetic and its memory traffic take."""
        traffic = call.bytes / (self.gpu.bandwidth * self.assumed.memory)
        if not call.flops:
            return traffic
        share = self.assumed.attention if call.kind == "attention" else self.assumed.matmul
        rate = self.gpu.matmul("fp32" if call.dtype in ("float32", "float64") else "bf16")
        assert rate is not None
        return max(traffic, call.flops / (rate * share))

    def bus(self, ranks: tuple[int, ...]) -> tuple[float, float]:
        """Bus bandwidth (bytes/s) and latency (s) of a group: several members on a node use several adapters."""
        nodes = {rank // self.assumed.gpus_per_node for rank in ranks}
        if len(nodes) == 1:
            return self.node, self.assumed.node_latency
        return min(self.node, self.network * len(ranks) / len(nodes)), self.assumed.network_latency

    def transfer(self, call: CollectiveCall) -> float:
        """Seconds of a collective alone on its links (ring bandwidth, tree latency)."""
        n = len(call.ranks)
        if n == 1 or call.op == "barrier":
            return 0.0
        ranks = call.ranks
        if call.op in ("send", "recv_"):
            peer = call.where[0] if call.where else 0
            ranks = (call.ranks[0], call.ranks[peer % n]) if n > 2 else call.ranks
        bandwidth, latency = self.bus(ranks)
        if "allreduce" in call.op:
            return 2 * (n - 1) / n * call.bytes / bandwidth + 2 * latency * math.log2(n)
        if "gather" in call.op or "scatter" in call.op:
            return (n - 1) / n * call.bytes / bandwidth + latency * math.log2(n)
        rounds = math.log2(n) if call.op.startswith("broadcast") else 1
        return call.bytes / bandwidth + latency * rounds


def make_cluster(
    gpu: NodeGpu, assumed: Assumptions, node_gbs: float | None = None, network_gbs: float | None = None
) -> Cluster:
    """A cluster whose links reach the assumed share of the data sheet, or what was measured.

    Args:
        gpu: of which it consists.
        assumed: shares of the data sheets' rates.
        node_gbs, network_gbs: measured bus bandwidths, GB/s per GPU.
    """
    node = node_gbs * 1e9 if node_gbs else gpu.node * assumed.links
    network = network_gbs * 1e9 if network_gbs else gpu.network * assumed.links
    return Cluster(gpu, assumed, node, network)
