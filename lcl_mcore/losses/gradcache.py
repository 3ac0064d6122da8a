"""GradCache (arXiv:2101.06983): the contrastive loss of a whole batch whose embeddings are computed in parts.

A feature pass without gradients computes all embeddings. The loss is formed once over them and differentiated with
respect to them. A second forward pass of each part then back-propagates the cached gradients. A part must give the
same embeddings both times, so its random masks are keyed by identity (`lcl_mcore.rng`).

Shape legend
    m   embeddings of one part;  D  embedding width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CachedGradients:
    """A loss, and its gradients with respect to what the parts contributed.

    Attributes:
        loss: fp32 scalar, detached.
        image, context: d loss / d embeddings, one [m, D] per part.
        scale: d loss / d scale, scalar.
    """

    loss: Tensor
    image: tuple[Tensor, ...]
    context: tuple[Tensor, ...]
    scale: Tensor

    def surrogate(self, part: int, image: Tensor, context: Tensor) -> Tensor:
        """Scalar whose gradient is the loss's through this part's embeddings [m, D]; its value means nothing."""
        return (image * self.image[part]).sum() + (context * self.context[part]).sum()


def cache_gradients(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], image: Sequence[Tensor], context: Sequence[Tensor], scale: Tensor
) -> CachedGradients:
    """Form a loss over the embeddings of all parts and differentiate it with respect to them.

    Args:
        loss: `loss(image, context, scale)` of all embeddings [sum of m, D].
        image, context: embeddings of each part, [m, D], without gradient history.
        scale: logit scale, scalar.
    """
    sizes = [len(part) for part in image]
    all_images, all_contexts = torch.cat(list(image)), torch.cat(list(context))
    inputs = tuple(x.detach().requires_grad_() for x in (all_images, all_contexts, scale))
    value = loss(*inputs)
    d_image, d_context, d_scale = torch.autograd.grad(value, inputs)
    return CachedGradients(value.detach(), d_image.split(sizes), d_context.split(sizes), d_scale)
