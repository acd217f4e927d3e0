"""Section mim: masked-feature distillation; its objective checks it (engine/objectives/mim/objective.py)."""

from dataclasses import dataclass

from models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class MimConfig:
    """Masked-feature distillation (objective: mim, docs/mim.md): who teaches, and what the student does not see."""

    teacher: str | None = None
    """A CLIP whose vision tower teaches: checkpoint or run folder, or a file in the authors' layout."""
    teacher_model: ModelConfig | None = None
    """Model of the teacher (a preset's name, or a mapping); null: what its checkpoint says. A file does not say it."""
    teacher_precision: str | None = None
    """fp32 | bf16; null: train.precision."""
    masked_patches: int = 105
    """Patches of an image to mask (EVA: 105 of 256); some masks end short."""
    min_block: int = 16
    """Smallest area of a masked rectangle, in patches."""
    max_block: int | None = None
    """Most patches that one rectangle may add; null: what is left to mask."""
    min_aspect: float = 0.3
    """Aspect ratios of rectangles lie between this and its inverse."""
    patch_gradient_scale: float = 1.0
    """Factor on the gradient of the patch projection (0.1: stop_grad_conv1 of the EVA-02 recipes)."""
