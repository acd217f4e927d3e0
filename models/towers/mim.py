"""The MIM stage: a student tower that sees masked images, and what its frozen CLIP teacher shows it.

The student is the image tower with two other ends: masked patches enter as a learned mask token, and the last stage
predicts the teacher's feature of every masked patch. Its blocks and final norm have the names that they have in the
CLIP tower, so a trained student is the CLIP tower's initial weights. Source: the EVA-02 code's modeling_pretrain.py
and eva_clip/vit_model.py; paper section 2.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.norms import mark_sequence_parallel
from models.config import ModelConfig, ModelConfigError, VisionConfig
from models.tensors.sums import SummedLinear, multiplied
from models.towers.heads import TowerHead, VisionHead
from models.towers.vision import PatchEmbedding, VisionTower, chosen_patches, patchify

# --- student ---------------------------------------------------------------------------------------------------------


class MaskedPatchEmbedding(PatchEmbedding):
    """Images -> packed tokens, with the mask token in the place of each masked patch; positions are added to both.

    Masked patches are never projected (the authors project all and then replace; equal by value).
    """

    def __init__(self, vision: VisionConfig, config, tp_group, *, gradient_scale: float):
        super().__init__(vision, config, tp_group)
        self.gradient_scale = gradient_scale
        self.mask_token = nn.Parameter(torch.empty(vision.width, dtype=config.params_dtype))
        mark_sequence_parallel(self, config)

    def forward(self, images: Tensor, masked: Tensor) -> Tensor:  # type: ignore[override]
        """images [M, 3, h, w] normalised; masked bool [M, n] -> [T or T / tp, 1, H], T = M x S."""
        patches = patchify(images.to(self.weight.dtype), self.patch_size)
        m, n, _ = patches.shape
        sample, slot = self.own_tokens(m, self.prefix_tokens + n, images.device)
        is_masked = masked.to(images.device, non_blocking=True)[sample, slot.clamp_min(0)] & (slot >= 0)
        pixels = chosen_patches(patches, sample * n + slot, (slot >= 0) & ~is_masked)
        weight = _with_gradient_times(self.gradient_scale, self.weight)
        bias = None if self.bias is None else _with_gradient_times(self.gradient_scale, self.bias)
        prefix, positions = self.prefix_and_positions(n)
        table = torch.cat([prefix, positions if bias is None else positions + bias, positions + self.mask_token])
        place = slot + self.prefix_tokens + n * is_masked
        return self.normed(multiplied(pixels, weight) + F.embedding(place, table))


def _with_gradient_times(scale: float, value: Tensor) -> Tensor:
    """`value` to the bit, with its gradient times `scale`."""
    frozen = value.detach()
    return value if scale == 1 else frozen + scale * (value - frozen)


class PredictionHead(TowerHead):
    """Final norm and a Linear H -> D of masked patches: packed tokens -> predictions [N, D], on every tensor rank."""

    def __init__(self, model: ModelConfig, config, tp_group, *, target_dim: int):
        super().__init__(model.vision, config, tp_group)
        self.prefix_tokens = model.vision.prefix_tokens
        self.prediction = SummedLinear(model.vision.width, target_dim, bias=True, dtype=config.params_dtype)

    def forward(self, hidden: Tensor, masked: Tensor) -> Tensor:
        """[T or T / tp, 1, H], bool [M, n] -> [N, D] of the N masked patches; only these rows are normalised."""
        sample, patch = masked.nonzero(as_tuple=True)  # where the mask lies: on the CPU it waits for nothing
        row = sample * (self.prefix_tokens + masked.shape[1]) + self.prefix_tokens + patch
        row = row.to(hidden.device, non_blocking=True)
        return self.prediction(self.norm(self.gather_rows(hidden, row)))


class StudentTower(VisionTower):
    """A VisionTower, or a stage of it, that predicts a teacher's features of masked patches. No patch dropout."""

    def __init__(self, model: ModelConfig, *, target_dim: int, patch_gradient_scale: float = 1.0, **tower: Any):
        """target_dim: D of the teacher's features. tower: what VisionTower takes (groups, layers, dtype, ...).

        patch_gradient_scale: factor on the gradient of the patch projection. EVA-02's recipes have 0.1
        (stop_grad_conv1); EVA-01 g's, after which the 18B's is modelled, has none.
        """
        super().__init__(
            model,
            embedding=partial(MaskedPatchEmbedding, gradient_scale=patch_gradient_scale),
            head=partial(PredictionHead, target_dim=target_dim),
            **tower,
        )

    def forward(self, inputs: Tensor, masked: Tensor, *, samples: int) -> Tensor:  # type: ignore[override]
        """Normalised images [M, 3, h, w] (first stage) or packed tokens -> packed tokens, or predictions (last stage).

        masked: bool [M, n], the same on every rank, best on the CPU. Predictions: [N, D] of the N masked patches,
        sample by sample, patch by patch. Raises ValueError for a mask of another shape.
        """
        if masked.shape != (samples, self.vision.patches):
            raise ValueError(
                f"mask of shape {list(masked.shape)} for {samples} images of {self.vision.patches} patches: it must be "
                f"[{samples}, {self.vision.patches}]"
            )
        tokens = self._tokens(samples, None, inputs.device)
        hidden = self.run_blocks(self.embed(inputs, masked) if self.is_first else inputs, tokens)
        return self.head(hidden, masked) if self.is_last else hidden


# --- teacher ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def teacher_features(tower: VisionTower, images: Tensor) -> Tensor:
    """Normalised images [M, 3, h, w] -> head(norm(x)) of every patch, [M, n, D], without graph.

    No normalisation follows the projection. tower: a whole CLIP one (all blocks, tensor axis of one rank); ValueError
    otherwise. Images of another size than the tower's go through `resize_for_teacher` first.
    """
    if not (tower.is_first and tower.is_last) or tower.config.tensor_model_parallel_size > 1:
        raise ValueError(
            f"the teacher must be a whole tower, not blocks {tower.layers.start} to {tower.layers.stop - 1} of "
            f"{tower.vision.depth} at TP {tower.config.tensor_model_parallel_size}"
        )
    if not isinstance(tower.head, VisionHead):
        raise ValueError("the teacher must be a CLIP tower with a projection, not a MIM student")
    samples = len(images)
    hidden = tower.run_blocks(tower.embed(images, None), tower._tokens(samples, None, images.device))
    patches = hidden.reshape(samples, tower.vision.tokens, -1)[:, tower.vision.prefix_tokens :]
    return tower.head.projected(tower.head.norm(patches))


def check_grids(student: VisionConfig, teacher: VisionConfig) -> None:
    """Raise ModelConfigError unless both towers cut the picture into the same grid: a patch is taught by its own."""
    if student.grid == teacher.grid:
        return
    raise ModelConfigError(
        f"the student sees {student.grid} x {student.grid} patches (image {student.image_size} / patch "
        f"{student.patch_size}) and the teacher {teacher.grid} x {teacher.grid} (image {teacher.image_size} / patch "
        f"{teacher.patch_size}): set the student's model.vision.image_size={teacher.grid * student.patch_size}, or "
        f"take a teacher of image size {student.grid * teacher.patch_size}"
    )


def resize_for_teacher(images: Tensor, teacher: VisionConfig) -> Tensor:
    """Normalised images [M, 3, h, w] -> [M, 3, t, t] at the teacher's size, the same crop; as they are if it fits.

    Bicubic with antialias, as the image readers resize; computed in fp32. Source: the EVA-02 code's datasets.py, which
    resizes one crop to two sizes.
    """
    side = teacher.image_size
    if images.shape[-2:] == (side, side):
        return images
    resized = F.interpolate(images.float(), (side, side), mode="bicubic", align_corners=False, antialias=True)
    return resized.to(images.dtype)
