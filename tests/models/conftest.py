"""One process, one set of groups, for all tests of the model in this pytest run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lcl_mcore.config.model import ModelConfig
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.models.transformer_config import Layout

# The helpers beside the tests (`batches`, `reference_model`) are plain modules.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]


@pytest.fixture(scope="session")
def build() -> Callable[..., LclModel]:
    """Build and initialise an `LclModel` on the CPU."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from lcl_mcore.models.backends import choose_layers
    from lcl_mcore.models.init import initialize as draw
    from lcl_mcore.parallel.groups import make_groups
    from lcl_mcore.platform.device import init_process_group, pick_device

    device = pick_device("cpu")
    if not torch.distributed.is_initialized():
        init_process_group(device, 60)
    if not parallel_state.is_initialized():
        make_groups(1, 1, 60, 1)
    groups = ProcessGroupCollection.use_mpu_process_groups()

    def make(
        shape: ModelConfig,
        seed: int = 0,
        *,
        train: bool = True,
        noise: float = 0.0,
        initialize: bool = True,
        layout: Layout = Layout(),  # noqa: B008  # frozen
    ) -> LclModel:
        """`noise` moves every parameter off its initial value, so that zeros and ones hide nothing."""
        backend, _ = choose_layers(torch.float32)
        model = LclModel(shape, layout, backend, groups)
        if initialize:
            draw(model, shape, seed, 0, 1)
        generator = torch.Generator().manual_seed(seed + 1)
        if noise:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += noise * torch.randn(parameter.shape, generator=generator)
        return model.train(train)

    return make
