"""What the teacher of the MIM stage shows its student: a projected feature of every patch.

Source: the EVA-02 code's eva_clip/vit_model.py (final norm, class token dropped, CLIP projection on each patch; no
normalisation after it).
"""

import torch
from torch import Tensor

from models.vision import VisionTower


@torch.no_grad()
def teacher_features(tower: VisionTower, images: Tensor) -> Tensor:
    """Normalised images [M, 3, h, w] -> head(norm(x)) of every patch, [M, n, D], without graph.

    tower: a whole one (all blocks, tensor axis of one rank); ValueError otherwise.
    """
    if not (tower.is_first and tower.is_last) or tower.config.tensor_model_parallel_size > 1:
        raise ValueError(
            f"the teacher must be a whole tower, not blocks {tower.layers.start} to {tower.layers.stop - 1} of "
            f"{tower.vision.depth} at TP {tower.config.tensor_model_parallel_size}"
        )
    samples = len(images)
    hidden = tower.block(tower.embed(images, None), None, packed_seq_params=tower._tokens(samples, None, images.device))
    patches = hidden.reshape(samples, 1 + tower.vision.patches, -1)[:, 1:]
    return tower.head.projection(tower.head.norm(patches))
