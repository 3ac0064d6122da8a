"""From a checked configuration to model, gradient buffers, optimizer and step, on this rank's device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from lcl_mcore.config.schema import RunConfig
from lcl_mcore.distributed.context import Context
from lcl_mcore.fused_adam import choose_adam
from lcl_mcore.interop.init_from import start_from
from lcl_mcore.models.backends import Backends, Choice, choose_backends
from lcl_mcore.models.init import initialize
from lcl_mcore.models.lcl import LclModel, Temperature
from lcl_mcore.models.transformer_config import DTYPES
from lcl_mcore.optimizer import Optimizer, wrap_data_parallel
from lcl_mcore.pipeline import PipelineStage
from lcl_mcore.train_step import SingleStage, StepObserver, TrainStep


@dataclass(frozen=True)
class Training:
    """What one rank trains with.

    Attributes:
        model: this rank's share of the model, with its initial weights.
        ddp: the same model behind megatron's gradient buffers.
        optimizer: over this rank's shards.
        step: forward, backward and update of one global batch.
        choices: which implementation serves each part, and why; for the start-up summary.
    """

    model: LclModel
    ddp: DistributedDataParallel
    optimizer: Optimizer
    step: TrainStep
    choices: tuple[Choice, ...]


def build_model(config: RunConfig, context: Context, backends: Backends | None = None) -> LclModel:
    """This rank's share of the model, with its initial weights, in fp32; `cast` gives it the precision of the run.

    Args:
        backends: which implementation serves each part; None: the fastest that is here.

    Raises:
        ConfigError: a requested backend is not available here.
    """
    device, groups = context.device.device, context.groups
    model = LclModel(config, groups, device, backends or choose_backends(config, device))
    if device.type != "meta":  # whose tensors have no values
        initialize(model, config.model, config.train.seed, groups.tp.rank(), groups.tp.size())
    return model.to(device)


def cast(model: LclModel, precision: str) -> dict[nn.Parameter, Tensor]:
    """Round the parameters to what a precision computes with; the temperature stays fp32.

    Returns:
        The fp32 values of every parameter that was rounded: what the optimizer's master weights start from.
    """
    dtype, exact = DTYPES[precision], dict[nn.Parameter, Tensor]()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dtype != dtype and not isinstance(module, Temperature):
                exact[parameter] = parameter.data
                parameter.data = parameter.data.to(dtype)
    return exact


def build_training(
    config: RunConfig,
    context: Context,
    *,
    init_from: Path | None = None,
    backends: Backends | None = None,
    observer: StepObserver | None = None,
) -> Training:
    """Everything that a step needs, for the trainer, the planner, benchmarks and tests alike.

    Args:
        init_from: weights that replace the initial ones: a file of ours, or an encoder of timm, open_clip or
            transformers.
        backends: which implementation serves each part; None: the fastest that is here.
        observer: watches the parts of each step.

    Raises:
        ConfigError: a requested backend is not available here.
    """
    device, groups = context.device.device, context.groups
    backends = backends or choose_backends(config, device)
    optimizer_choice = choose_adam(config.optim.optimizer_backend, device)
    model = build_model(config, context, backends)
    if init_from is not None:
        context.log(f"initial weights: {start_from(model, init_from, groups.tp.rank(), groups.tp.size())}")
    exact = cast(model, config.train.precision)
    ddp = wrap_data_parallel(model, config.parallel, groups)
    optimizer = Optimizer(ddp, config.optim, DTYPES[config.train.precision], groups)
    optimizer.set_masters(exact)
    del exact
    schedule = SingleStage if model.stage.count == 1 else PipelineStage
    step = schedule(config, context, model, ddp, optimizer, observer)
    return Training(model, ddp, optimizer, step, (*backends.choices, optimizer_choice))
