"""Zero-shot classification (CLIP, Radford et al. 2021, section 3.1; the EVA-CLIP evaluation does the same).

A pure function on tensors of one process: gathering embeddings over ranks is the caller's part, ranks of the right
classes are those of engine/evaluation/ranking.py.
"""

from torch import Tensor
from torch.nn.functional import normalize


def class_weights(text_embeddings: Tensor, templates_per_class: int) -> Tensor:
    """One embedding per class: L2-normalise the prompts, mean over a class's templates, L2-normalise.

    Args:
        text_embeddings: [C * T, D], the T prompts of class 0 first; any scale, any float type.
        templates_per_class: T.

    Returns:
        float32 [C, D].

    Raises:
        ValueError: the rows are not a multiple of T, or the prompts of a class cancel out.
    """
    rows = len(text_embeddings)
    if text_embeddings.ndim != 2 or templates_per_class < 1 or rows == 0 or rows % templates_per_class:
        raise ValueError(
            f"text embeddings {list(text_embeddings.shape)} are not [classes x templates, D] "
            f"with {templates_per_class} templates per class"
        )
    prompts = normalize(text_embeddings.float(), dim=-1).unflatten(0, (-1, templates_per_class))
    mean = prompts.mean(dim=1)
    if bool((mean.norm(dim=-1) == 0).any()):
        raise ValueError("the prompt embeddings of a class are zero or cancel out; check the weights")
    return normalize(mean, dim=-1)
