"""The two towers of a CLIP on one device, with what a notebook asks of them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.errors import DataError
from engine.evaluation.vocabulary import tokenizer_of
from engine.evaluation.zero_shot import class_weights
from engine.notebook.pictures import Pictures, as_list
from models.clip import embedding
from models.config import ModelConfig
from models.towers.text import TextTower
from models.towers.vision import VisionTower


class ClipModel(nn.Module):
    """A CLIP, whole on one device. Neither training nor evaluation mode changes what it computes."""

    def __init__(
        self,
        config: ModelConfig,
        vision: VisionTower | None,
        text: TextTower | None,
        *,
        pictures: Pictures,
        logit_scale: float,
        logit_bias: float | None,
        source: str,
    ):
        """logit_bias: of the sigmoid loss; None: the model was trained with softmax. source: where weights are from."""
        super().__init__()
        self.config, self.pictures, self.source = config, pictures, source
        self.vision, self.text = vision, text
        self.logit_scale, self.logit_bias = logit_scale, logit_bias

    @property
    def embed_dim(self) -> int:
        """D, width of the shared embedding space."""
        return self.config.embed_dim

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    # --- differentiable ----------------------------------------------------------------------------------------

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised images [n, 3, h, w] -> embeddings float32 [n, D] of length 1, in the graph."""
        tower = self._tower(self.vision, "image")
        return embedding(tower(pixels.to(self.device), samples=len(pixels)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [n, L] -> embeddings float32 [n, D] of length 1, in the graph."""
        tower = self._tower(self.text, "text")
        return embedding(tower(tower.trimmed(tokens).to(self.device)))

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Logits float32 [images, texts] of normalised images and token ids, in the graph."""
        return self._logits(self.encode_image(pixels) @ self.encode_text(tokens).T)

    # --- for people --------------------------------------------------------------------------------------------

    def prepare(self, images: Any) -> Tensor:
        """Pictures -> what `encode_image` takes: normalised float32 [n, 3, h, w] on the CPU.

        Raises DataError that names the picture which cannot be used.
        """
        return self.pictures.prepared(as_list(images))

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> token ids int64 [n, context] on the CPU; what is longer is cut."""
        if not isinstance(texts, Iterable):
            raise DataError(f"a {type(texts).__name__} is not a text or a list of texts")
        texts = [texts] if isinstance(texts, str) else list(texts)
        odd = next((text for text in texts if not isinstance(text, str)), None)
        if odd is not None:
            raise DataError(f"a {type(odd).__name__} is not a text; token ids go in as one int64 tensor [n, context]")
        return torch.from_numpy(tokenizer_of(self.config.text).encode(texts))

    @torch.no_grad()
    def embed_images(self, images: Any, batch_size: int = 64) -> Tensor:
        """Embeddings float32 [n, D] of length 1, on the model's device.

        images: one picture or several: paths, PIL images, bytes of files, uint8 arrays or tensors [h, w, 3] or
        [3, h, w], or normalised floats [3, h, w]. Raises DataError that names the picture which cannot be used.
        """
        given = as_list(images)
        parts = [
            self.encode_image(self.pictures.prepared(given[rows])) for rows in _batches(len(given), _whole(batch_size))
        ]
        return self._joined(parts)

    @torch.no_grad()
    def embed_texts(self, texts: str | Sequence[str] | Tensor, batch_size: int = 256) -> Tensor:
        """Embeddings float32 [n, D] of length 1, on the model's device, of texts or of token ids int64 [n, context]."""
        tokens = self._checked(texts) if isinstance(texts, Tensor | np.ndarray) else self.tokenize(texts)
        parts = [self.encode_text(tokens[rows]) for rows in _batches(len(tokens), _whole(batch_size))]
        return self._joined(parts)

    @torch.no_grad()
    def similarity(self, images: Any, texts: str | Sequence[str]) -> Tensor:
        """Cosines float32 [images, texts]."""
        return self.embed_images(images) @ self.embed_texts(texts).T

    @torch.no_grad()
    def classify(self, images: Any, classes: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)) -> Tensor:
        """Probabilities float32 [images, classes]: softmax over the classes, or a sigmoid each where that was the loss.

        templates: prompts with {} where the name of the class goes; a class is the mean of its prompts.
        """
        if isinstance(classes, str) or isinstance(templates, str):
            raise DataError("classes and templates are lists of texts")
        flat = next((template for template in templates if "{}" not in template), None)
        if flat is not None or not templates or not classes:
            raise DataError(f"{flat!r} has no {{}} for the name" if flat is not None else "no class, or no template")
        prompts = [template.replace("{}", name) for name in classes for template in templates]
        weights = class_weights(self.embed_texts(prompts), len(templates))
        logits = self._logits(self.embed_images(images) @ weights.T)
        return logits.softmax(dim=-1) if self.logit_bias is None else logits.sigmoid()

    def extra_repr(self) -> str:
        """The line that a notebook shows of the model."""
        return f"{self.source}; images of {self.pictures.size} px, embeddings of {self.embed_dim}"

    # --- parts -------------------------------------------------------------------------------------------------

    def _logits(self, cosines: Tensor) -> Tensor:
        return cosines * self.logit_scale + (self.logit_bias or 0.0)

    def _tower(self, tower: Any, name: str) -> Any:
        if tower is None:
            raise DataError(f"{self.source} has no {name} tower")
        return tower

    def _checked(self, tokens: Tensor | np.ndarray) -> Tensor:
        tokens, text = torch.as_tensor(tokens), self.config.text
        if tokens.is_floating_point() or tokens.ndim != 2 or not 0 < tokens.shape[1] <= text.context_length:
            raise DataError(
                f"tokens {list(tokens.shape)} {tokens.dtype} are not whole numbers [n, {text.context_length} or less]"
            )
        if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < text.vocab_size):
            raise DataError(
                f"tokens span {int(tokens.min())} to {int(tokens.max())}; the model has {text.vocab_size} ids"
            )
        return tokens.long()

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if parts else torch.empty(0, self.embed_dim, device=self.device)


def _whole(batch_size: int) -> int:
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}: it must be at least 1")
    return batch_size


def _batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)
