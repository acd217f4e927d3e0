"""The benchmark's model in plain eager PyTorch, as one would write it without an engine: autograd does everything.

Same mathematics as models/ (post-norm RMSNorm tower, causal text tower); parameters are named as in the authors' state
dict, so that models/formats/eva_names.py gives both sides the same weights. fp32 weights; bf16 by autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import ModelConfig, TextConfig, VisionConfig
from models.formats.eva_names import from_logical, to_logical
from models.tensors.init import initial_value
from models.tensors.naming import LogicalTensor

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class Attention(nn.Module):
    """Self-attention without biases, through SDPA."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[M, S, H] -> [M, S, H]."""
        m, s, h = x.shape
        q, k, v = self.qkv(x).view(m, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(m, s, h))


class Mlp(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[M, S, H] -> [M, S, H]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + norm(f(x)), twice."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        self.attn = Attention(vision.width, vision.heads)
        self.mlp = Mlp(vision.width, vision.mlp_hidden)
        self.norm1 = nn.RMSNorm(vision.width, eps=vision.norm_eps)
        self.norm2 = nn.RMSNorm(vision.width, eps=vision.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """[M, S, H] -> [M, S, H]."""
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class PatchEmbed(nn.Module):
    """The projection of patches as a convolution."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, vision.width, vision.patch_size, vision.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[M, 3, h, w] -> [M, n, H]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Visual(nn.Module):
    """The image tower."""

    def __init__(self, model: ModelConfig, checkpointing: bool):
        super().__init__()
        vision = model.vision
        self.checkpointing = checkpointing
        self.patch_embed = PatchEmbed(vision)
        self.cls_token = nn.Parameter(torch.empty(1, 1, vision.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + vision.patches, vision.width))
        self.blocks = nn.ModuleList(Block(vision) for _ in range(vision.depth))
        self.norm = nn.RMSNorm(vision.width, eps=vision.norm_eps)
        self.head = nn.Linear(vision.width, model.embed_dim, bias=False)

    def forward(self, images: Tensor, kept: Tensor) -> Tensor:
        """uint8 [M, 3, h, w], kept patches [M, k] -> features [M, D]."""
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
        x = self.patch_embed((images.float() / 255 - mean) / std)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        places = F.pad(kept + 1, (1, 0))
        x = x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        x = _run(self.blocks, x, self.checkpointing and self.training)
        return self.head(self.norm(x[:, 0]))


class TextAttention(nn.Module):
    """Causal self-attention with biases; parameters named as nn.MultiheadAttention names them."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[M, L, H] -> [M, L, H]."""
        m, s, h = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(m, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(m, s, h))


class TextBlock(nn.Module):
    """x + f(norm(x)), twice."""

    def __init__(self, text: TextConfig):
        super().__init__()
        width = text.width
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, eps=text.norm_eps) for _ in range(2))
        self.attn = TextAttention(width, text.heads)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        """[M, L, H] -> [M, L, H]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Text(nn.Module):
    """The caption tower, all positions computed."""

    def __init__(self, model: ModelConfig, checkpointing: bool):
        super().__init__()
        text = model.text
        self.checkpointing = checkpointing
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(TextBlock(text) for _ in range(text.depth))})
        self.ln_final = nn.LayerNorm(text.width, eps=text.norm_eps)
        self.text_projection = nn.Parameter(torch.empty(text.width, model.embed_dim))

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [M, L] -> features [M, D]."""
        x = self.token_embedding(ids) + self.positional_embedding
        x = _run(self.transformer["resblocks"], x, self.checkpointing and self.training)  # type: ignore[arg-type]
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


class PlainClip(nn.Module):
    """Both towers and the loss over the batch."""

    def __init__(self, model: ModelConfig, logit_scale: float, checkpointing: bool = False):
        """checkpointing: every block of both towers is computed again in backward."""
        super().__init__()
        self.logit_scale = logit_scale
        self.visual = Visual(model, checkpointing)
        self.text = Text(model, checkpointing)

    def forward(self, images: Tensor, kept: Tensor, ids: Tensor) -> Tensor:
        """The softmax loss, through autograd's own cross-entropy."""
        image, text = (
            F.normalize(self.visual(images, kept).float(), dim=-1),
            F.normalize(self.text(ids).float(), dim=-1),
        )
        with torch.autocast("cpu", enabled=False):
            logits = self.logit_scale * image @ text.t()
            labels = torch.arange(len(logits))
            return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def _run(blocks: nn.ModuleList, x: Tensor, checkpointing: bool) -> Tensor:
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
    return x


def initialise(clip: PlainClip, model: ModelConfig, seed: int) -> None:
    """The engine's fresh values of the same seed."""
    shapes = {name: value.shape for name, value in to_logical(clip.state_dict(), model).items()}
    fresh = {name: initial_value(LogicalTensor(name, tuple(s), None), model, seed) for name, s in shapes.items()}
    clip.load_state_dict(from_logical(fresh, model))
