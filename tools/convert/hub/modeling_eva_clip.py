"""EVA-CLIP for transformers: AutoModel.from_pretrained(folder, trust_remote_code=True). Apache-2.0.

Needs torch and transformers, nothing else. Source of the architecture: EVA-CLIP (arXiv 2303.15389), EVA-CLIP-18B (arXiv
2402.04252), EVA-02 (arXiv 2303.11331).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_eva_clip import EvaClipConfig


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast, then scaled."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x * inverse).to(self.weight.dtype) * self.weight


class Attention(nn.Module):
    """Multi-head attention; 2-D rope on the patches and a norm over the joined heads where the tower has them."""

    def __init__(self, c: dict[str, Any], causal: bool):
        super().__init__()
        h = c["hidden_size"]
        self.heads, self.causal = c["num_attention_heads"], causal
        self.q_proj = nn.Linear(h, h, bias=c["q_bias"])
        self.k_proj = nn.Linear(h, h, bias=c["k_bias"])
        self.v_proj = nn.Linear(h, h, bias=c["v_bias"])
        self.out_proj = nn.Linear(h, h)
        self.inner_attn_ln = nn.LayerNorm(h, eps=c["layer_norm_eps"]) if c.get("use_sub_ln") else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """[M, S, H] -> [M, S, H]."""
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        if rope is not None:
            q, k = turned(q, *rope), turned(k, *rope)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        return self.out_proj(out if self.inner_attn_ln is None else self.inner_attn_ln(out))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels of [M, heads, S, d] by the angles of each token [S, d]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return (x.float() * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin).to(x.dtype)


def rope_tables(c: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [1 + grid^2, d], computed in fp64; the class token does not turn."""
    grid = c["image_size"] // c["patch_size"]
    d = c["hidden_size"] // c["num_attention_heads"] // 2
    frequency = c["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64, device=device) / d)
    position = torch.arange(grid, dtype=torch.float64, device=device) / grid * c["pretrained_seq_len"]
    angle = (position[:, None] * frequency).repeat_interleave(2, dim=1)
    rows, columns = angle[:, None].expand(grid, grid, d), angle[None].expand(grid, grid, d)
    table = F.pad(torch.cat([rows, columns], dim=-1).reshape(grid * grid, -1), (0, 0, 1, 0))
    return table.cos().float(), table.sin().float()


class Mlp(nn.Module):
    """fc1, exact GELU, fc2; or SwiGLU (fc1 the gate, fc2, fc3) with its norm."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        h, f = c["hidden_size"], c["intermediate_size"]
        self.gated = bool(c.get("use_swiglu_mlp"))
        self.fc1 = nn.Linear(h, f)
        self.fc2 = nn.Linear(h, f) if self.gated else nn.Linear(f, h)
        self.fc3 = nn.Linear(f, h) if self.gated else None
        self.ffn_ln = nn.LayerNorm(f, eps=c["layer_norm_eps"]) if self.gated and c.get("use_sub_ln") else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        if self.fc3 is None:
            return self.fc2(F.gelu(self.fc1(x)))
        hidden = F.silu(self.fc1(x)) * self.fc2(x)
        return self.fc3(hidden if self.ffn_ln is None else self.ffn_ln(hidden))


class Block(nn.Module):
    """x + f(norm(x)), or x + norm(f(x)) with post_layernorm."""

    def __init__(self, c: dict[str, Any], causal: bool):
        super().__init__()
        norm = RMSNorm if c.get("use_rms_norm") else nn.LayerNorm
        self.post_norm = bool(c.get("post_layernorm"))
        self.layer_norm1 = norm(c["hidden_size"], eps=c["layer_norm_eps"])
        self.layer_norm2 = norm(c["hidden_size"], eps=c["layer_norm_eps"])
        self.self_attn, self.mlp = Attention(c, causal), Mlp(c)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """[M, S, H] -> [M, S, H]."""
        if self.post_norm:
            x = x + self.layer_norm1(self.self_attn(x, rope))
            return x + self.layer_norm2(self.mlp(x))
        x = x + self.self_attn(self.layer_norm1(x), rope)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The blocks of a tower."""

    def __init__(self, c: dict[str, Any], causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(Block(c, causal) for _ in range(c["num_hidden_layers"]))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[M, S, H] -> [M, S, H]."""
        for layer in self.layers:
            x = layer(x, rope)
        return x


class VisionEmbeddings(nn.Module):
    """Patches, class token, positions."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        h, p = c["hidden_size"], c["patch_size"]
        self.class_embedding = nn.Parameter(torch.zeros(h))
        self.patch_embedding = nn.Conv2d(3, h, kernel_size=p, stride=p)
        self.position_embedding = nn.Embedding(1 + (c["image_size"] // p) ** 2, h)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[M, 3, h, w] -> [M, S, H]."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        token = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([token, patches], dim=1) + self.position_embedding.weight


class VisionTower(nn.Module):
    """The image tower: the normed class token."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        norm = RMSNorm if c.get("use_rms_norm") else nn.LayerNorm
        self.c, self.embeddings, self.encoder = c, VisionEmbeddings(c), Encoder(c, causal=False)
        self.post_layernorm = norm(c["hidden_size"], eps=c["layer_norm_eps"])

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[M, 3, h, w] -> [M, H]."""
        rope = rope_tables(self.c, pixel_values.device) if self.c.get("use_rope") else None
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values), rope)[:, 0])


class TextEmbeddings(nn.Module):
    """Token and position tables."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.token_embedding = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.position_embedding = nn.Embedding(c["max_position_embeddings"], c["hidden_size"])


class TextTower(nn.Module):
    """The caption tower: the normed end-of-text token, which has the highest id."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.embeddings, self.encoder = TextEmbeddings(c), Encoder(c, causal=True)
        self.final_layer_norm = nn.LayerNorm(c["hidden_size"], eps=c["layer_norm_eps"])

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [M, L] -> [M, H]."""
        tables = self.embeddings
        x = tables.token_embedding(input_ids) + tables.position_embedding.weight[: input_ids.shape[1]]
        end = input_ids.argmax(dim=-1)
        return self.final_layer_norm(self.encoder(x)[torch.arange(len(x), device=x.device), end])


@dataclass
class EvaClipOutput(ModelOutput):
    """Embeddings of length 1 and the scaled similarities."""

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


class EvaClipModel(PreTrainedModel):
    """Both towers, their projections and the temperature."""

    config_class = EvaClipConfig
    base_model_prefix = "eva_clip"
    main_input_name = "pixel_values"

    def __init__(self, config: EvaClipConfig):
        super().__init__(config)
        v, t = config.vision_config, config.text_config
        self.vision_model, self.text_model = VisionTower(v), TextTower(t)
        self.visual_projection = nn.Linear(v["hidden_size"], config.projection_dim, bias=v["q_bias"])
        self.text_projection = nn.Linear(t["hidden_size"], config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Normalised pictures [M, 3, h, w] -> features [M, D], not of length 1."""
        return self.visual_projection(self.vision_model(pixel_values))

    def get_text_features(self, input_ids: Tensor) -> Tensor:
        """int64 [M, L] -> features [M, D], not of length 1."""
        return self.text_projection(self.text_model(input_ids))

    def forward(self, pixel_values: Tensor, input_ids: Tensor, **_: Any) -> EvaClipOutput:
        """Pictures and captions -> embeddings and logits."""
        image = F.normalize(self.get_image_features(pixel_values), dim=-1)
        text = F.normalize(self.get_text_features(input_ids), dim=-1)
        logits = self.logit_scale.exp() * text @ image.T
        return EvaClipOutput(logits_per_image=logits.T, logits_per_text=logits, image_embeds=image, text_embeds=text)
