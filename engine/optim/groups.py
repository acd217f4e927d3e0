"""Which rate and which decay a logical tensor gets: towers, layer-wise decay, no-decay (authors' optim.py).

A tower of L blocks has L + 2 layer ids; scale(id) = decay^(L + 1 - id). Id 0: patch embedding, class and mask token,
registers, position tables, token table; id k + 1: block k; id L + 1: final norm, head, projections, prediction head of
the MIM stage. No decay: vectors, biases, class token, registers and position tables. The mask token is decayed: the
authors store it as [1, 1, H] and go by its dimensions, and only the class token is on their list.
"""

from dataclasses import dataclass

from engine.config.read import OptimConfig
from models.config import ModelConfig
from models.tensors.freezing import layer_of

_DECAYED_VECTOR = "vision.embed.mask_token"
_NEVER_DECAYED = (
    "vision.embed.cls_token",
    "vision.embed.registers",
    "vision.embed.pos_embed",
    "text.pos_embed",
    "logit_scale.log_scale",
)


@dataclass(frozen=True)
class TensorGroup:
    """Settings of one logical tensor."""

    tower: str
    """vision | text | other; each has a base rate of its own."""
    lr_scale: float
    """Layer decay."""
    weight_decay: float


def tensor_group(name: str, dims: int, model: ModelConfig, optim: OptimConfig) -> TensorGroup:
    """The group of logical tensor `name` with `dims` dimensions."""
    tower = name.split(".", 1)[0]
    if tower not in ("vision", "text"):
        return TensorGroup("other", 1.0, 0.0)
    depth = model.vision.depth if tower == "vision" else model.text.depth
    decay = optim.layer_decay_vision if tower == "vision" else optim.layer_decay_text
    plain = (dims <= 1 and name != _DECAYED_VECTOR) or name.endswith(".bias") or name in _NEVER_DECAYED
    return TensorGroup(tower, decay ** (depth + 1 - layer_of(name, depth)), 0.0 if plain else optim.weight_decay)


def base_rate(tower: str, optim: OptimConfig) -> float:
    """Peak learning rate of a tower."""
    return {"vision": optim.lr_vision, "text": optim.lr_text, "other": optim.lr_other}[tower]
