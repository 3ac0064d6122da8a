"""One process, one set of groups, for all tests that build a model in this pytest run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from lcl_mcore.models.lcl import LclModel


@pytest.fixture(scope="session")
def groups() -> Any:
    """megatron-core's groups of one process on the CPU."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from lcl_mcore.distributed.device import init_process_group, pick_device
    from lcl_mcore.distributed.groups import make_groups

    device = pick_device("cpu")
    if not torch.distributed.is_initialized():
        init_process_group(device, 60)
    if not parallel_state.is_initialized():
        make_groups(1, 1, 60, 1)
    return ProcessGroupCollection.use_mpu_process_groups()


@pytest.fixture(scope="session")
def build(groups: Any) -> Callable[..., LclModel]:
    """Build and initialise an `LclModel` of a `ModelConfig` on the CPU."""
    from lcl_mcore.models.backends import choose_layers
    from lcl_mcore.models.init import initialize as draw
    from lcl_mcore.models.lcl import LclModel
    from lcl_mcore.models.transformer_config import Layout

    def make(
        shape: Any,
        seed: int = 0,
        *,
        train: bool = True,
        noise: float = 0.0,
        initialize: bool = True,
        layout: Any = None,
    ) -> LclModel:
        """`noise` moves every parameter off its initial value, so that zeros and ones hide nothing."""
        backend, _ = choose_layers(torch.float32)
        model = LclModel(shape, layout or Layout(), backend, groups)
        if initialize:
            draw(model, shape, seed, 0, 1)
        generator = torch.Generator().manual_seed(seed + 1)
        if noise:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += noise * torch.randn(parameter.shape, generator=generator)
        return model.train(train)

    return make
