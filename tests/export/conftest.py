"""One process and its groups, shared with the other tests of this pytest run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lcl_mcore.config.model import LanguageConfig, ModelConfig, VisionConfig
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.models.transformer_config import Layout

LANGUAGE = LanguageConfig(vocab_size=300, width=32, layers=1, heads=4, mlp_width=64, max_positions=64)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LclModel]:
    """An fp32 `LclModel` on the CPU whose every parameter is off its initial value."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from lcl_mcore.models.backends import choose_layers
    from lcl_mcore.models.init import initialize
    from lcl_mcore.parallel.groups import make_groups
    from lcl_mcore.platform.device import init_process_group, pick_device

    device = pick_device("cpu")
    if not torch.distributed.is_initialized():
        init_process_group(device, 60)
    if not parallel_state.is_initialized():
        make_groups(1, 1, 60, 1)
    groups = ProcessGroupCollection.use_mpu_process_groups()

    def make(vision: VisionConfig, seed: int = 0) -> LclModel:
        shape = ModelConfig(vision=vision, language=LANGUAGE, pool_heads=4)
        model = LclModel(shape, Layout(), choose_layers(torch.float32)[0], groups)
        initialize(model, shape, seed, 0, 1)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    return make
