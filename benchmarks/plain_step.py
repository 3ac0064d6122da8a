"""The same training step written plainly: open_clip's ViT, pool and loss, Hugging Face's OPT, PyTorch's DDP and AdamW.

What a careful researcher would write, and what `benchmarks/train_step.py` measures ours against: logits of the target
positions alone, gradients that live in DDP's buckets, a fused optimizer. Sequences hold one document each (none is
packed), because this way of writing it has no packed attention.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lcl_mcore.batch import MicroBatch
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.distributed.cpu import make_torchvision_importable
from lcl_mcore.models.lcl import INITIAL_LOG_SCALE
from lcl_mcore.models.vision import PIXEL_MEAN, PIXEL_STD


class PlainLcl(nn.Module):
    """Both losses of one micro-batch of an unpacked configuration with the OPT shape."""

    def __init__(self, config: RunConfig, rank: int, world: int) -> None:
        super().__init__()
        make_torchvision_importable()
        from open_clip.loss import ClipLoss
        from open_clip.transformer import AttentionalPooler, VisionTransformer
        from transformers import OPTConfig, OPTModel

        vision, language = config.model.vision, config.model.language
        self.visual = VisionTransformer(
            vision.image_size,
            vision.patch_size,
            vision.width,
            vision.layers,
            vision.heads,
            vision.mlp_width / vision.width,
            output_tokens=True,
            output_dim=language.width,
            ls_init_value=vision.layer_scale,
        )
        self.visual.proj = None
        self.pool = AttentionalPooler(language.width, vision.width, config.model.pool_heads, n_queries=1)
        self.project = nn.Linear(vision.width, language.width)
        opt = OPTConfig(
            vocab_size=language.padded_vocab_size,
            hidden_size=language.width,
            num_hidden_layers=language.layers,
            num_attention_heads=language.heads,
            ffn_dim=language.mlp_width,
            dropout=language.dropout,
            max_position_embeddings=language.max_positions,
            word_embed_proj_dim=language.width,
            use_cache=False,
        )
        opt._attn_implementation = "sdpa"
        self.lm = OPTModel(opt)
        self.context = nn.Linear(language.width, language.width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        self.contrastive = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        self.sequence_length, self.weights = config.data.sequence_length, config.loss
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", PIXEL_MEAN), ("std", PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, batch: MicroBatch) -> Tensor:
        """The weighted sum of the two losses, fp32 scalar."""
        _, patches = self.visual((batch.images.float() / 255 - self.mean) / self.std)
        image = self.pool(patches)[:, 0]
        latents = self.project(patches)  # [n, P, D]
        tokens = batch.tokens.view(-1, self.sequence_length)
        x = self.lm.get_input_embeddings()(tokens)
        places = (batch.image_starts[:, None] + torch.arange(latents.shape[1], device=tokens.device)).flatten()
        x = x.flatten(0, 1).index_copy(0, places, latents.flatten(0, 1).to(x.dtype)).view(x.shape)
        hidden = self.lm(inputs_embeds=x).last_hidden_state.flatten(0, 1)
        context = self.context(hidden[batch.context_positions])
        contrastive = self.contrastive(
            F.normalize(image[batch.context_images].float(), dim=-1),
            F.normalize(context.float(), dim=-1),
            self.log_scale.exp(),
        )
        logits = hidden[batch.target_positions] @ self.lm.get_input_embeddings().weight.T
        generation = F.cross_entropy(logits.float(), batch.target_labels)
        return self.weights.contrastive_weight * contrastive + self.weights.generation_weight * generation


class PlainStep:
    """Optimizer steps of one rank."""

    def __init__(self, config: RunConfig, device: torch.device, group: dist.ProcessGroup) -> None:
        self.model = PlainLcl(config, group.rank(), group.size()).to(device)
        ids = [device.index] if device.type == "cuda" else None
        self.ddp = DistributedDataParallel(
            self.model, device_ids=ids, process_group=group, gradient_as_bucket_view=True
        )
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=1e-6,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.device, self.clip = device, optim.clip_grad
        self.half = config.train.precision == "bf16"

    def run(self, batch: MicroBatch) -> Tensor:
        """One step on a micro-batch on the device; the loss, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss: Tensor = self.ddp(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.detach()
