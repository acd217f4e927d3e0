"""The caption tower: token and position tables, pre-norm blocks, pooling of one token.

Source: EVA authors' transformer.py (TextTransformer) and the text towers of CLIP and SigLIP. Never split: every rank of
the mesh holds a whole one and encodes its own captions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.norms import LayerNorm
from models.blocks.packed import PackedTokens
from models.blocks.spec import Groups, build_block, text_layer_spec
from models.blocks.transformer_config import text_transformer_config
from models.config import ModelConfig


class TextTower(nn.Module):
    """Token ids -> features."""

    def __init__(self, model: ModelConfig, *, groups: Groups, dtype: torch.dtype = torch.float32):
        """`groups`: tp, cp and pp, each of this rank alone."""
        super().__init__()
        text = model.text
        self.config = text_transformer_config(text, dtype=dtype)
        self.token_embedding = nn.Parameter(torch.empty(text.vocab_size, text.width, dtype=dtype))
        self.pos_embed = nn.Parameter(torch.empty(text.context_length, text.width, dtype=dtype))
        self.block = build_block(
            text_layer_spec(self.config, text.causal), text.depth, self.config, groups, ends_tower=True
        )
        self.norm = LayerNorm(config=self.config, hidden_size=text.width, eps=text.norm_eps)
        self.projection = nn.Linear(text.width, model.embed_dim, bias=text.head_bias, dtype=dtype)
        self.pools_last = text.pool == "last"

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [M, L], L <= context_length -> features [M, D], pooled at the first highest id (end of text) or last.

        Callers may cut padding off with `trimmed`.
        """
        m, length = ids.shape
        hidden = F.embedding(ids, self.token_embedding) + self.pos_embed[:length]
        place = length - 1 if self.pools_last else ids.argmax(dim=-1)
        read = torch.arange(m, device=ids.device) * length + place
        tokens = PackedTokens.of(m, length, ids.device).pooling(read)
        hidden = self.block(hidden.reshape(m * length, 1, -1), None, packed_seq_params=tokens)
        return self.projection(self.norm(hidden.squeeze(1)))

    def trimmed(self, ids: Tensor) -> Tensor:
        """`ids` without padding that no feature depends on: behind the end of text, where that is what is pooled."""
        return ids if self.pools_last else trim_padding(ids)


def trim_padding(ids: Tensor) -> Tensor:
    """[M, context] -> [M, L], L the longest caption with its end of text: a causal tower's features do not change.

    The host has to know L: ids on a device are waited for.
    """
    return ids[:, : int(ids.cpu().numpy().argmax(axis=-1).max()) + 1] if len(ids) else ids
