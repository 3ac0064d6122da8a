"""Runs the real training step of one rank of a large job in this process, without its data, GPU or peers.

torch's "fake" process groups have the wanted size and do nothing; tensors stand on the "meta" device, which has
shapes and no data. What the host computes with (segment lengths, packing, counts) is real.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lcl_kernels import cross_entropy, tiled
from megatron.core import parallel_state
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lcl_mcore.batch import StepBatch
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.distributed import cpu as cpu_shim
from lcl_mcore.distributed.device import Device
from lcl_mcore.distributed.groups import make_groups
from lcl_mcore.models.backends import Backends, Choice
from lcl_mcore.models.layers import torch_backend
from lcl_mcore.planning.counting import RankCount, count_step

ROUNDING = 512
"""CUDA's allocator hands out multiples of this many bytes."""
META = torch.device("meta")
Target = Literal["cpu", "cuda"]


def simulate_rank(
    config: RunConfig, world: int, rank: int, batch: StepBatch, target: Target = "cuda"
) -> RankCount:
    """One step of one rank of a job of `world` processes.

    Args:
        batch: that rank's part of the step, see `data.synthetic.synthetic_step`.
        target: whose kernels are assumed; "cpu" is for comparison with a real run on a CPU.
    """
    parallel = config.parallel
    with _job(world, rank), _without_data(config, target):
        groups = make_groups(
            parallel.tensor_parallel_size, parallel.pipeline_parallel_size, 600, config.train.seed
        )
        device = Device("cpu", META, "fake", f"simulated {target}")
        rounding = ROUNDING if target == "cuda" else 1
        return count_step(
            _resolved(config, target),
            device,
            groups,
            batch,
            simulated=True,
            rounding=rounding,
            backends=_backends(config, target),
        )


def _backends(config: RunConfig, target: Target) -> Backends:
    """megatron-core's own layers, with the attention that serves packed sequences on the target."""
    attention: Any = "torch-varlen" if target == "cuda" and config.train.precision != "fp32" else "sdpa"
    return Backends(torch_backend(attention), False, (Choice("layers", "megatron-core", "simulated"),))


def places(config: RunConfig, world: int) -> list[int]:
    """Ranks of data-parallel index 0, one for each tensor and pipeline index: all others do what one of them does."""
    tp, pp = config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size
    return [p * (world // pp) + t for p in range(pp) for t in range(tp)]


def _resolved(config: RunConfig, target: Target) -> RunConfig:
    """Choices that the code makes by looking at the device, made for the target."""
    loss = config.loss
    if target == "cuda":
        half = loss.contrastive_precision == "auto" and config.train.precision != "fp32"
        loss = dataclasses.replace(
            loss,
            contrastive_impl="tiled",
            contrastive_precision="fp16" if half else loss.contrastive_precision,
        )
    return dataclasses.replace(config, loss=loss)


@contextmanager
def _job(world: int, rank: int) -> Iterator[None]:
    """A default process group of that size, and none when it ends."""
    cpu_shim.install()
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def _without_data(config: RunConfig, target: Target) -> Iterator[None]:
    """Everything that would need data, a GPU or a peer is answered without."""
    tile_shape = tiled.tile_shape
    new_group, generator = dist.new_group, torch.Generator

    def fake_group(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs)  # also those that are gloo's in a real job

    def generator_on(device: Any = "cpu") -> torch.Generator:
        return generator("cpu" if torch.device(device) == META else device)  # seeds masks that have no values

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(cpu_shim.answering(META))
        for place, replacement in (
            ("torch.distributed.new_group", fake_group),
            ("torch.Generator", generator_on),
            ("torch.nn.functional.scaled_dot_product_attention", _attention_for(target)),
            ("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta", "cuda"]),
        ):
            stack.enter_context(mock.patch(place, replacement))
        if target == "cpu":  # the kernels' block sizes there
            sizes = {"meta": cross_entropy._LOGIT_BYTES["cpu"]}
            stack.enter_context(mock.patch.dict(cross_entropy._LOGIT_BYTES, sizes))
            stack.enter_context(
                mock.patch.object(tiled, "tile_shape", return_value=tile_shape(torch.device("cpu")))
            )
        if target == "cuda":
            on_device = property(lambda tensor: tensor.device == META)
            stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", on_device, create=True))
            stack.enter_context(mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)))
        yield


def _attention_for(target: Target) -> Any:
    """The kernel that torch's attention picks on the target: without data it would pick the one that keeps scores."""
    original = F.scaled_dot_product_attention
    aten: Any = torch.ops.aten

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None
    ) -> Tensor:
        if q.device != META:
            return original(q, k, v, is_causal=is_causal, scale=scale)
        if target == "cpu":
            out = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
        elif q.dtype == torch.float32:
            out = aten._scaled_dot_product_efficient_attention(
                q, k, v, None, True, 0.0, is_causal, scale=scale
            )
        else:
            out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)
        return out[0]

    return attend
