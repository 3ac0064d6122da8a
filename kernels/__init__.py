"""Fused contrastive loss, vocabulary cross-entropy, residual branch, activation and latent placement, each beside a
plain reference.

Needs torch only; Triton is used where it can be imported and the tensors are on a CUDA device.
Conventions, design
and measurements: ``docs/kernels.md``.
"""

from lcl_kernels.activation import bias_activation, bias_activation_reference
from lcl_kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from lcl_kernels.distributed import DistributedInfoNCE, PendingInfoNCE
from lcl_kernels.infonce import infonce
from lcl_kernels.latents import (
    gather_image_latents,
    gather_image_latents_reference,
    scatter_image_latents,
    scatter_image_latents_reference,
)
from lcl_kernels.reference import infonce_reference
from lcl_kernels.residual import drawn_keep, drop, residual_branch, residual_branch_reference
from lcl_kernels.schedule import CommunicationRates, choose_schedule

__all__ = [
    "CommunicationRates",
    "DistributedInfoNCE",
    "PendingInfoNCE",
    "bias_activation",
    "bias_activation_reference",
    "choose_schedule",
    "drawn_keep",
    "drop",
    "gather_image_latents",
    "gather_image_latents_reference",
    "infonce",
    "infonce_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "residual_branch",
    "residual_branch_reference",
    "scatter_image_latents",
    "scatter_image_latents_reference",
]
