"""The caption tower: token table, positions by table or rope, pre-norm blocks, pooling of one token or of all.

Source: EVA authors' transformer.py (TextTransformer) and the text towers of CLIP and SigLIP. Never split: every rank of
the mesh holds a whole one and encodes its own captions.
"""

import torch
from torch import Tensor, nn

from models.blocks.kernels import captions_are_fused
from models.blocks.norms import NORMS
from models.blocks.packed import PackedTokens
from models.blocks.rope import text_rope_tables
from models.blocks.spec import DividedTower, Groups, Span, build_block, text_layer_spec
from models.blocks.transformer_config import text_transformer_config
from models.config import ModelConfig
from models.tensors.sums import SummedLinear, looked_up


class TextTower(DividedTower):
    """Token ids -> features."""

    def __init__(self, model: ModelConfig, *, groups: Groups, dtype: torch.dtype = torch.float32):
        """`groups`: tp, cp and pp, each of this rank alone."""
        super().__init__()
        self.text = text = model.text
        self.config = text_transformer_config(text, dtype=dtype)
        self.token_embedding = nn.Parameter(torch.empty(text.vocab_size, text.width, dtype=dtype))
        table = torch.empty(text.context_length, text.width, dtype=dtype) if text.pos_embed else None
        self.pos_embed = None if table is None else nn.Parameter(table)
        spec = text_layer_spec(text, self.config, groups, fused=captions_are_fused(model, dtype))
        self.block = build_block(spec, text.depth, self.config, groups, ends_tower=True)
        self.divide(0)
        self.norm = NORMS[text.norm](config=self.config, hidden_size=text.width, eps=text.norm_eps)
        self.projection = SummedLinear(text.width, model.embed_dim, bias=text.head_bias, dtype=dtype)

    def forward(self, ids: Tensor, hidden: Tensor | None = None, span: Span = "whole") -> Tensor:
        """int64 [M, L], L <= context_length -> features [M, D]: of the token that is pooled, or of their mean.

        pool=end reads the first highest id. Callers may cut padding off with `trimmed`. span: `below` answers with
        packed tokens, from which, as `hidden`, `above` goes on.
        """
        m, length = ids.shape
        if hidden is None:
            hidden = self._embedded(ids).reshape(m * length, 1, -1)
        width = self.text.width // self.text.heads
        rope = text_rope_tables(length, width, ids.device) if self.text.rope else None
        tokens = PackedTokens.of(m, length, ids.device, rope)
        if (place := self._read(ids)) is not None:
            tokens = tokens.pooling(torch.arange(m, device=ids.device) * length + place)
        hidden = self._divided(hidden, tokens, span)
        if span == "below":
            return hidden
        rows = self.norm(hidden.squeeze(1))
        return self.projection(rows if place is not None else self._mean(rows.unflatten(0, (m, length)), ids))

    def _embedded(self, ids: Tensor) -> Tensor:
        """[M, L] -> [M, L, H], with the positions."""
        hidden = looked_up(self.token_embedding, ids)
        return hidden if self.pos_embed is None else hidden + self.pos_embed[: ids.shape[1]]

    def _read(self, ids: Tensor) -> Tensor | int | None:
        """The place in each caption that is pooled, of int64 [M, L]; None where all are."""
        places = {"first": 0, "last": ids.shape[1] - 1, "mean": None}
        return places[self.text.pool] if self.text.pool in places else ids.argmax(dim=-1)

    def _mean(self, rows: Tensor, ids: Tensor) -> Tensor:
        """[M, L, H] -> [M, H], without padding."""
        said = (ids != self.text.pad_id).unsqueeze(-1).to(rows.dtype)
        return (rows * said).sum(dim=1) / said.sum(dim=1).clamp_min(1)

    def trimmed(self, ids: Tensor) -> Tensor:
        """`ids` without padding that no feature depends on: behind the end of text, where that is what is pooled."""
        return trim_padding(ids) if self.text.pool == "end" else ids


def trim_padding(ids: Tensor) -> Tensor:
    """[M, context] -> [M, L], L the longest caption with its end of text: a causal tower's features do not change.

    The host has to know L: ids on a device are waited for.
    """
    return ids[:, : int(ids.cpu().numpy().argmax(axis=-1).max()) + 1] if len(ids) else ids
