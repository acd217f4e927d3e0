"""What a model is made of: the switches of the shipped EVA-CLIP configurations, and nothing else.

`ModelConfig` is filled from a preset (models/presets/*.yaml), then from the training config; `check()` refuses what
cannot be built. Sources: the authors' model_configs/*.json as read in the paper's repository, and the paper's Table 4.
"""

from dataclasses import dataclass, field


class ModelConfigError(Exception):
    """A model that cannot be built; the message names the value and the fix."""


@dataclass(kw_only=True)
class VisionConfig:
    """The image tower (class EVAVisionTransformer of the authors)."""

    image_size: int = 224
    """Pixels a side; images are square."""
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
    post_norm: bool = False
    """x + norm(f(x)) instead of x + f(norm(x)); the residual stream stays un-normed until the final norm."""
    qkv_bias: bool = False
    """Biases on q and v (k never has one), as the authors' LayerNorm models have."""
    separate_qkv: bool = False
    """Three weights instead of the fused one (the EVA-02 B/L towers)."""
    attention_norm: bool = False
    """LayerNorm over the joined heads before the output projection (sub-LN of EVA-02 B/L)."""
    mlp: str = "gelu"
    """gelu (fc1, exact GELU, fc2) | swiglu (gate, up, down)."""
    mlp_norm: bool = False
    """LayerNorm over the SwiGLU hidden channels (sub-LN)."""
    rope: bool = False
    """2-D rotary position embedding on q and k of the patch tokens (EVA-02 B/L)."""
    rope_grid: int = 16
    """Side of the grid that rope positions are stretched to (pt_hw_seq_len of the authors)."""
    head_bias: bool = False
    """Bias of the final projection (authors: present exactly when qkv_bias is)."""

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

    def kept_tokens(self, patch_dropout: float) -> int:
        """S: class token and the patches that survive dropout, max(1, int(n (1 - p))) of them."""
        return 1 + (max(1, int(self.patches * (1 - patch_dropout))) if patch_dropout > 0 else self.patches)


@dataclass(kw_only=True)
class TextConfig:
    """The caption tower: pre-norm, causal, LayerNorm 1e-5, exact GELU, pooled at the end-of-text token."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    depth: int = 12
    heads: int = 8
    norm_eps: float = 1e-5


@dataclass(kw_only=True)
class ModelConfig:
    """A CLIP dual encoder and how its kernels are chosen."""

    preset: str | None = None
    """Name of a file in models/presets, whose values come below the ones given here."""
    embed_dim: int = 512
    """D, width of the shared embedding space."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    backend: str = "auto"
    """auto | local (torch kernels)."""

    def check(self) -> None:
        """Raise ModelConfigError for a model that cannot be built."""
        v, t = self.vision, self.text
        _divides("model.vision.image_size", v.image_size, "model.vision.patch_size", v.patch_size)
        _divides("model.vision.width", v.width, "model.vision.head_width", v.head_width)
        _divides("model.text.width", t.width, "model.text.heads", t.heads)
        _one_of("model.vision.norm", v.norm, ("rms", "layer"))
        _one_of("model.vision.mlp", v.mlp, ("gelu", "swiglu"))
        _one_of("model.backend", self.backend, ("auto", "local"))
        for name, value in (("vision.depth", v.depth), ("text.depth", t.depth), ("embed_dim", self.embed_dim)):
            if value < 1:
                raise ModelConfigError(f"model.{name} is {value}: it must be at least 1")
        if v.mlp_norm and v.mlp != "swiglu":
            raise ModelConfigError("model.vision.mlp_norm needs model.vision.mlp=swiglu (no EVA tower has it on GELU)")
        if v.rope and v.head_width % 4:
            raise ModelConfigError(
                f"model.vision.rope needs a head_width that is a multiple of 4 (pairs, two halves), not {v.head_width}"
            )


def _divides(name: str, value: int, by_name: str, by: int) -> None:
    if by < 1 or value % by:
        raise ModelConfigError(f"{name} {value} is not a multiple of {by_name} {by}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ModelConfigError(f"{name} is {value!r}: choose one of {', '.join(allowed)}")
