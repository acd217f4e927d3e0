"""What a model is made of: the switches of EVA-CLIP, CLIP ViTs, SigLIP, Perception Encoder, DINOv3 and InternViT.

`ModelConfig` is filled from a preset (models/presets/*.yaml), then from the training config; `check()` refuses what
cannot be built. Sources: the authors' model_configs/*.json as read in the paper's repository, and the paper's Table 4.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from models.hashing import HashedOnce
from models.sizes import MODEL, TEXT, VISION, outside

FP8_MULTIPLES = {"current": 16, "blockwise": 16, "mxfp8": 32}
"""model.fp8 -> what every side of a GEMM must be a multiple of (cuBLAS's alignment; numbers that share a scale)."""


_REFUSED_RECIPES = {
    "delayed": "its scales follow the history of passes, so a replayed stage would compute other numbers",
    "nvfp4": "it rounds gradients at random, and its generator is in no checkpoint: no resumed run would repeat; fp4 "
    "in the forward pass alone is not in every Transformer Engine of the range",
    "custom": "what a foreign quantiser keeps between passes is not known, and a replay must repeat the encode phase",
}
"""Recipes of Transformer Engine that are not offered, and why."""
ATTENTIONS = ("auto", "sdpa", "matmul", "flash", "flash3", "flash4", "te")
"""Values of model.attention."""
LOCAL_KERNELS = {
    "backend": "local",
    "attention": "auto",
    "norm_kernel": "auto",
    "block_kernels": "auto",
    "fp8": "none",
    "fp8_bf16_blocks": 0,
}
"""What replaces the choice of kernels in a checkpoint's model: where it is used need not be where it was trained."""


ACTIVATIONS = ("gelu", "quick_gelu", "gelu_tanh")
"""Nonlinearities of an MLP of two linears."""


class ModelConfigError(Exception):
    """A model that cannot be built; the message names the value and the fix."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig(HashedOnce):
    """The image tower (class EVAVisionTransformer of the authors)."""

    __hash__ = HashedOnce.__hash__

    image_size: int = 224
    """Pixels a side; images are square."""
    pixel_norm: str = "clip"
    """Mean and deviation by which pictures are normalised: clip (EVA, OpenAI, open_clip) | half (0.5 and 0.5: SigLIP,
    Perception Encoder) | imagenet (DINOv3, InternViT)."""
    patch_size: int = 14
    """Pixels a side of a patch; kernel and stride of the patch embedding."""
    depth: int = 12
    """Transformer blocks."""
    width: int = 768
    """H, hidden width."""
    head_width: int = 64
    """Channels of one attention head; heads = width / head_width."""
    mlp_hidden: int = 3072
    """Hidden width of the MLP."""
    norm: str = "rms"
    """rms (RMSNorm, statistics in fp32) | layer (LayerNorm)."""
    norm_eps: float = 1e-6
    """Epsilon of every norm of this tower."""
    embed_norm: bool = False
    """Norm between the embedding and the blocks (ln_pre of CLIP)."""
    post_norm: bool = False
    """x + norm(f(x)) instead of x + f(norm(x)); the residual stream stays un-normed until the final norm."""
    qkv_bias: bool = False
    """Biases on q and v, as the EVA authors' LayerNorm models have."""
    key_bias: bool = False
    """Bias on k as well (CLIP, SigLIP)."""
    separate_qkv: bool = False
    """Three weights instead of the fused one (the EVA-02 B/L towers)."""
    attention_norm: bool = False
    """LayerNorm over the joined heads before the output projection (sub-LN of EVA-02 B/L)."""
    mlp: str = "gelu"
    """gelu (fc1, exact GELU, fc2) | quick_gelu (x sigmoid(1.702 x), OpenAI) | gelu_tanh (SigLIP) | swiglu (gate, up,
    down)."""
    mlp_norm: bool = False
    """LayerNorm over the SwiGLU hidden channels (sub-LN)."""
    rope: bool = False
    """2-D rotary position embedding on q and k of the patch tokens (EVA-02 B/L)."""
    rope_grid: int = 16
    """Side of the grid that rope positions are stretched to (pt_hw_seq_len of the authors); dinov3 has none."""
    rope_kind: str = "eva"
    """eva (grid lines, first half of a head by the row) | pe (Perception Encoder: first half by the column, one line
    further where there is a class token) | dinov3 (patch centres from -1 to 1, base 100)."""
    qk_norm: bool = False
    """RMSNorm over all heads' q, and over all heads' k, in front of the attention (InternViT)."""
    layer_scale: float | None = None
    """Gain on what each attention and MLP adds to the residual stream, starting at this value (DINOv3, InternViT);
    null: none."""
    registers: int = 0
    """Learned tokens between class token and patches, without position (DINOv3)."""
    pos_embed: bool = True
    """A table of positions is added to the class token and the patches (DINOv3 has rope alone)."""
    patch_bias: bool = True
    """Bias of the patch embedding (CLIP has none)."""
    class_token: bool = True
    """A learned token in front of the patches."""
    pool: str = "class"
    """What the head reads: class (the class token) | mean (of the patches) | attention (a learned probe attends to all
    tokens, then an MLP: SigLIP)."""
    pool_heads: int | None = None
    """Heads of the attention pool; null: as many as the blocks have."""
    pool_mlp_hidden: int | None = None
    """Hidden width of the attention pool's MLP; null: that of the blocks."""
    final_norm: bool = True
    """A norm behind the last block (InternViT has none)."""
    projection: bool = True
    """Linear from the pooled token to the embedding space; without it width must be embed_dim (SigLIP)."""
    head_bias: bool = False
    """Bias of the final projection (EVA: present exactly when qkv_bias is)."""

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.width // self.head_width

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of one image, n."""
        return self.grid**2

    @property
    def prefix_tokens(self) -> int:
        """Tokens in front of the patches: class token, registers."""
        return self.class_token + self.registers

    @property
    def pool_hidden(self) -> int:
        """Hidden width of the attention pool's MLP."""
        return self.pool_mlp_hidden or self.mlp_hidden

    @property
    def reads_one_token(self) -> bool:
        """Whether the head reads one token of each sample, so that the last block works for that one alone."""
        return self.pool == "class"

    @property
    def tokens(self) -> int:
        """S of a whole image: prefix tokens and patches."""
        return self.prefix_tokens + self.patches

    @property
    def positions(self) -> int:
        """Rows of the position table: class token and patches, 0 without a table."""
        return self.class_token + self.patches if self.pos_embed else 0

    def kept_patches(self, patch_dropout: float) -> int:
        """Patches that survive dropout, max(1, int(n (1 - p))) of them."""
        return max(1, int(self.patches * (1 - patch_dropout))) if patch_dropout > 0 else self.patches

    def kept_tokens(self, patch_dropout: float) -> int:
        """S: prefix tokens, which are never dropped, and the patches that survive."""
        return self.prefix_tokens + self.kept_patches(patch_dropout)


@dataclass(frozen=True, kw_only=True)
class TextConfig(HashedOnce):
    """The caption tower: pre-norm blocks, as CLIP's and SigLIP's unless norm, rope, mlp or bias say otherwise."""

    __hash__ = HashedOnce.__hash__

    context_length: int = 77
    """Token ids of a caption, start and end included; at most 1,024."""
    vocab_size: int = 49408
    """Rows of the token table: 49,408 for CLIP's tokenizer, at least as many as data.tokenizer has ids."""
    width: int = 512
    """Hidden width."""
    depth: int = 12
    """Transformer blocks."""
    heads: int = 8
    """Attention heads; they divide the width."""
    mlp: str = "gelu"
    """gelu (exact) | quick_gelu | gelu_tanh | swiglu."""
    mlp_hidden: int | None = None
    """Hidden width of the MLP; null: 4 x width."""
    norm: str = "layer"
    """layer (LayerNorm) | rms (RMSNorm)."""
    norm_eps: float = 1e-5
    """Epsilon of every norm of this tower."""
    bias: bool = True
    """Biases on the linears of the blocks."""
    rope: bool = False
    """Rotary position embedding of q and k by the place in the caption, base 10,000, neighbouring channels a pair."""
    pos_embed: bool = True
    """A learned table of positions."""
    causal: bool = True
    """A token sees its caption up to itself (CLIP); otherwise all of it, padding included (SigLIP)."""
    pool: str = "end"
    """end (the end-of-text token, which has the highest id) | last (the last place of the context: SigLIP) | first |
    mean (of the places whose id is not `pad_id`)."""
    pad_id: int = 0
    """Id behind the end of a caption, which pool=mean leaves out."""
    head_bias: bool = False
    """Bias of the final projection."""

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return 4 * self.width if self.mlp_hidden is None else self.mlp_hidden


@dataclass(frozen=True, kw_only=True)
class ModelConfig(HashedOnce):
    """A CLIP dual encoder and how its kernels are chosen."""

    __hash__ = HashedOnce.__hash__

    preset: str | None = None
    """Name of a file in models/presets, whose values come below the ones given here."""
    embed_dim: int = 512
    """D, width of the shared embedding space."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    backend: str = "local"
    """Linears of the image tower's blocks: local (torch) | transformer_engine | auto (the latter where a CUDA device,
    the package and bf16 are there; what was picked is logged)."""
    attention: str = "auto"
    """Core attention of its blocks: auto (the backend's own: sdpa or te; matmul in bf16 on a CPU that multiplies it) |
    sdpa (torch) | matmul (plain products, keeps S x S) | flash (flash-attn 2) | flash3 (flash-attn 3, Hopper) | flash4
    (flash-attn 4, Hopper and later) | te (Transformer Engine)."""
    norm_kernel: str = "auto"
    """Norms of its blocks: auto (the backend's own) | torch | compiled (RMSNorm fused by torch.compile) | apex (fused
    RMSNorm) | te."""
    block_kernels: str = "auto"
    """Everything between the matrix products of its blocks, and of the caption tower's: torch (an operator after the
    other) | fused (norm with bias and residual, bias with GELU, SwiGLU with its norm, rope: one kernel each way,
    written by torch.compile) | auto (fused on a CUDA device with the local backend)."""
    fp8: str = "none"
    """GEMMs of the image tower's blocks: none | current (scaled per tensor; Ada, Hopper) | blockwise (128 x 128
    blocks; Hopper) | mxfp8 (32 elements; Blackwell). models/blocks/te.py says what stays bf16, and why no delayed
    scaling."""
    fp8_bf16_blocks: int = 0
    """First and last blocks of the image tower, of each so many, that stay bf16."""

    def check(self) -> None:
        """Raise ModelConfigError for a model that cannot be built."""
        v, t = self.vision, self.text
        for section, values, limits in (("model", self, MODEL), ("model.vision", v, VISION), ("model.text", t, TEXT)):
            if wrong := outside(section, values, limits):
                raise ModelConfigError(wrong)
        _divides("model.vision.image_size", v.image_size, "model.vision.patch_size", v.patch_size)
        _divides("model.vision.width", v.width, "model.vision.head_width", v.head_width)
        _divides("model.text.width", t.width, "model.text.heads", t.heads)
        _one_of("model.vision.norm", v.norm, ("rms", "layer"))
        _one_of("model.vision.pixel_norm", v.pixel_norm, ("clip", "half", "imagenet"))
        _one_of("model.vision.mlp", v.mlp, (*ACTIVATIONS, "swiglu"))
        _check_text(t)
        _check_head(v, self.embed_dim)
        if v.key_bias and (v.separate_qkv or not v.qkv_bias):
            raise ModelConfigError(
                "model.vision.key_bias needs model.vision.qkv_bias and one weight for q, k and v (separate_qkv=false)"
            )
        if v.mlp_norm and v.mlp != "swiglu":
            raise ModelConfigError("model.vision.mlp_norm needs model.vision.mlp=swiglu (no EVA tower has it on GELU)")
        _check_parts(v)
        _one_of("model.backend", self.backend, ("auto", "local", "transformer_engine"))
        _one_of("model.attention", self.attention, ATTENTIONS)
        _one_of("model.norm_kernel", self.norm_kernel, ("auto", "torch", "compiled", "apex", "te"))
        _one_of("model.block_kernels", self.block_kernels, ("auto", "torch", "fused"))
        _one_of("model.fp8", self.fp8, ("none", *FP8_MULTIPLES), _REFUSED_RECIPES)
        blocks = self.fp8_bf16_blocks
        if blocks and (self.fp8 == "none" or not 0 < 2 * blocks < v.depth):
            raise ModelConfigError(
                f"model.fp8_bf16_blocks {blocks} keeps so many blocks at each end of the {v.depth} in bf16: it needs "
                f"model.fp8 (which is {self.fp8}) and blocks left between the ends"
            )


def completed(stored: dict[str, Any]) -> dict[str, Any]:
    """A model as a checkpoint holds it, with the switches that were not there yet when it was written, all off."""
    plain = asdict(ModelConfig())
    parts = {part: plain[part] | stored.get(part, {}) for part in ("vision", "text")}
    return plain | stored | parts


def _check_text(t: TextConfig) -> None:
    _one_of("model.text.mlp", t.mlp, (*ACTIVATIONS, "swiglu"))
    _one_of("model.text.norm", t.norm, ("layer", "rms"))
    _one_of("model.text.pool", t.pool, ("end", "last", "first", "mean"))
    if t.pool == "end" and not t.causal:
        raise ModelConfigError("model.text.pool=end needs model.text.causal: padding behind the end would be seen")
    if t.pool == "first" and t.causal:
        raise ModelConfigError("model.text.pool=first reads a token that has seen itself only: set causal=false")
    if t.pad_id >= t.vocab_size:
        raise ModelConfigError(f"model.text.pad_id is {t.pad_id}: model.text.vocab_size {t.vocab_size} has no such id")
    if t.rope and (t.width // t.heads) % 2:
        raise ModelConfigError(f"model.text.rope turns pairs of channels: a head has {t.width // t.heads}")
    if not (t.rope or t.pos_embed):
        raise ModelConfigError("model.text.pos_embed=false needs model.text.rope: words would have no order")


def _check_parts(v: VisionConfig) -> None:
    _one_of("model.vision.rope_kind", v.rope_kind, ("eva", "pe", "dinov3"))
    if v.rope and v.head_width % 4:
        raise ModelConfigError(
            f"model.vision.rope needs a head_width that is a multiple of 4 (pairs, two halves), not {v.head_width}"
        )
    if v.rope_kind != "eva" and not v.rope:
        raise ModelConfigError(f"model.vision.rope_kind={v.rope_kind} needs model.vision.rope=true")
    if v.qk_norm and (v.norm != "rms" or v.separate_qkv):
        raise ModelConfigError("model.vision.qk_norm needs model.vision.norm=rms and separate_qkv=false (InternViT)")
    if v.layer_scale is not None and v.post_norm:
        raise ModelConfigError("model.vision.layer_scale is for pre-norm blocks: set post_norm=false")
    if v.registers and not v.class_token:
        raise ModelConfigError(f"model.vision.registers {v.registers} stand behind a class token: set class_token=true")
    if not (v.pos_embed or v.rope):
        raise ModelConfigError("model.vision.pos_embed=false needs rope: the patches would have no position at all")


def _check_head(v: VisionConfig, embed_dim: int) -> None:
    _one_of("model.vision.pool", v.pool, ("class", "mean", "attention"))
    if v.pool == "attention" and v.mlp == "swiglu":
        raise ModelConfigError(
            "model.vision.pool=attention has an MLP of two linears: model.vision.mlp must not be swiglu"
        )
    if (v.pool_heads or v.pool_mlp_hidden) and v.pool != "attention":
        raise ModelConfigError("model.vision.pool_heads and pool_mlp_hidden need model.vision.pool=attention")
    if v.pool_heads is not None:
        _divides("model.vision.width", v.width, "model.vision.pool_heads", v.pool_heads)
    if v.pool == "class" and not v.class_token:
        raise ModelConfigError(
            "model.vision.pool=class reads the class token: set model.vision.class_token=true, or pool=mean"
        )
    if not v.projection and (v.width != embed_dim or v.head_bias):
        raise ModelConfigError(
            f"model.vision.projection=false gives embeddings of the tower's width {v.width}, without a bias: set "
            f"model.embed_dim={v.width} (it is {embed_dim}) and model.vision.head_bias=false"
        )


def _divides(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        raise ModelConfigError(f"{name} {value} is not a multiple of {by_name} {by}")


def _one_of(name: str, value: str, allowed: tuple[str, ...], refused: Mapping[str, str] = MappingProxyType({})) -> None:
    if value not in allowed:
        why = f" ({refused[value]})" if value in refused else ""
        raise ModelConfigError(f"{name} is {value!r}: choose one of {', '.join(allowed)}{why}")
