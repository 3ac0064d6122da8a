"""One process, one set of groups, for all tests that build a model in this pytest run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from lcl_mcore.distributed.groups import Groups
    from lcl_mcore.models.lcl import LclModel


@pytest.fixture(scope="session")
def groups() -> Groups:
    """The process groups of one process on the CPU."""
    from lcl_mcore.distributed.device import init_process_group, pick_device

    device = pick_device("cpu")

    from lcl_mcore.distributed.groups import make_groups

    if not torch.distributed.is_initialized():
        init_process_group(device, 60)
    return make_groups(1, 1, 60, 1)


@pytest.fixture(scope="session")
def build(groups: Any) -> Callable[..., LclModel]:
    """Build and initialise an `LclModel` of a `ModelConfig` on the CPU."""
    from lcl_mcore.config.schema import ParallelConfig, single_process
    from lcl_mcore.models.backends import choose_backends
    from lcl_mcore.models.init import initialize as draw
    from lcl_mcore.models.lcl import LclModel

    device = torch.device("cpu")

    def make(
        shape: Any, seed: int = 0, *, train: bool = True, noise: float = 0.0, initialize: bool = True, **parallel: Any
    ) -> LclModel:
        """`noise` moves every parameter off its initial value, so that zeros and ones hide nothing.

        `parallel` are fields of `ParallelConfig`.
        """
        config = replace(single_process(shape), parallel=ParallelConfig(**parallel))
        model = LclModel(config, groups, device, choose_backends(config, device))
        if initialize:
            draw(model, shape, seed, 0, 1)
        generator = torch.Generator().manual_seed(seed + 1)
        if noise:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += noise * torch.randn(parameter.shape, generator=generator)
        return model.train(train)

    return make
