"""Zero-shot scores of a model on shards, at any layout: what tools.evaluate and the evaluation between steps share."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from data.errors import DataError
from data.tokenizer import Tokenizer
from engine.evaluation.embedder import Embedder
from engine.evaluation.inputs import Block, ShardInput
from engine.evaluation.retrieval import recall
from engine.evaluation.zero_shot import class_weights, top_k_accuracy


def embedded_blocks(
    embedder: Embedder, source: ShardInput, size: int, *, texts: bool = True
) -> Iterator[tuple[Block, Tensor, Tensor | None]]:
    """(block, image embeddings, text embeddings or None), fp32 [rows, D] on the CPU. Collective over the mesh."""
    for block in source.blocks(size):
        assert block.pixels is not None and block.tokens is not None
        image = embedder.images(block.pixels, block.stop - block.start).cpu()
        yield block, image, embedder.texts(block.tokens).cpu() if texts else None


def caption_scores(image: Tensor, text: Tensor) -> dict[str, float]:
    """Every caption is a candidate for every image; row i of both belong together. fp32 [N, D], L2-normalised."""
    own = torch.arange(len(image))
    ks = tuple(k for k in (1, 5) if k <= len(text))
    top = top_k_accuracy(image, text, own, ks=ks)
    both = recall(image, text, own, ks=ks)
    means = {
        f"recall_at_{k}": (both[f"image_to_text_recall_at_{k}"] + both[f"text_to_image_recall_at_{k}"]) / 2 for k in ks
    }
    return {f"zero_shot_{name}": value for name, value in top.items()} | {"chance": 1 / len(text)} | means | both


def score_captions(embedder: Embedder, source: ShardInput, size: int) -> dict[str, float]:
    """`caption_scores` of all samples. Collective over the mesh; every rank gets the scores."""
    images, texts = [], []
    for _, image, text in embedded_blocks(embedder, source, size):
        assert text is not None
        images.append(image)
        texts.append(text)
    return caption_scores(torch.cat(images), torch.cat(texts))


class ClassPrompts:
    """The prompts of every class, and the class of a sample: its caption."""

    def __init__(self, names: Sequence[str], templates: Sequence[str], context_length: int):
        """templates: {} stands for the name. Raises DataError for no name, or one that is there twice."""
        self._labels = {name: label for label, name in enumerate(names)}
        if not names or len(self._labels) != len(names):
            raise DataError(f"{len(names)} class names, {len(self._labels)} of them different: give each class once")
        prompts = [template.replace("{}", name) for name in names for template in templates]
        self.tokens = torch.from_numpy(Tokenizer(context_length).encode(prompts))
        """int64 [classes x templates, context], the prompts of class 0 first."""
        self.templates = len(templates)

    def label(self, caption: str) -> int:
        """Raises DataError for a caption that is no class."""
        if caption not in self._labels:
            raise DataError(
                f"the caption {caption!r} of an evaluation sample is none of the {len(self._labels)} classes"
            )
        return self._labels[caption]


def score_classes(embedder: Embedder, source: ShardInput, size: int, prompts: ClassPrompts) -> dict[str, float]:
    """Zero-shot classification of all samples. Collective over the mesh; every rank gets the scores."""
    classes = class_weights(embedder.texts(prompts.tokens).cpu(), prompts.templates)
    images, labels = [], []
    for block, image, _ in embedded_blocks(embedder, source, size, texts=False):
        images.append(image)
        labels += [prompts.label(caption) for caption in block.captions]
    ks = tuple(k for k in (1, 5) if k <= len(classes))
    top = top_k_accuracy(torch.cat(images), classes, torch.tensor(labels), ks=ks)
    return {f"zero_shot_{name}": value for name, value in top.items()} | {"chance": 1 / len(classes)}
