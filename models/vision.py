"""The image tower, or the pipeline stage of it that one rank holds.

A tower is built for a range of its blocks: the first stage adds the patch embedding, the last one the head. Inside,
activations are packed tokens [T, 1, H] with T = M x S (under sequence parallelism each rank of the tensor group holds
T / tp rows of them, on the first stage already at the embedding). Source: authors' eva_vit_model.py; paper section 2.
"""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn

from models.config import ModelConfig, VisionConfig
from models.layers import (
    NORMS,
    PackedTokens,
    build_block,
    mark_sequence_parallel,
    vision_layer_spec,
    vision_transformer_config,
)
from models.rope import rope_tables


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[M, 3, h, w] -> [M, n, 3 p^2], patches row by row, each flattened as the convolution kernel is (c, y, x)."""
    m, c, h, w = images.shape
    p = patch_size
    grid = images.reshape(m, c, h // p, p, w // p, p)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(m, -1, c * p * p)


class PatchEmbedding(nn.Module):
    """Images -> packed tokens: patch projection, class token, position table, patch dropout.

    Dropped patches are never projected (the authors project all and drop after the position table; equal by value).
    Under sequence parallelism a rank embeds its own T / tp rows only, so these gradients are partial sums.
    """

    def __init__(self, vision: VisionConfig, config, tp_group):
        super().__init__()
        self.patch_size = vision.patch_size
        self.sequence_parallel = config.sequence_parallel
        self.tp_group = tp_group
        empty = lambda *shape: nn.Parameter(torch.empty(*shape, dtype=config.params_dtype))  # noqa: E731
        self.weight = empty(vision.width, 3 * vision.patch_size**2)
        self.bias = empty(vision.width)
        self.cls_token = empty(vision.width)
        self.pos_embed = empty(1 + vision.patches, vision.width)
        mark_sequence_parallel(self, config)

    def forward(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """images [M, 3, h, w] normalised; kept int64 [M, k] or None for all -> [T or T / tp, 1, H]."""
        patches = patchify(images.to(self.weight.dtype), self.patch_size)
        m, n, _ = patches.shape
        k = n if kept is None else kept.shape[1]
        row = self._own_rows(m * (k + 1), images.device)
        sample, slot = row // (k + 1), row % (k + 1) - 1  # slot -1 is the class token
        grid_cell = slot if kept is None else kept[sample, slot.clamp_min(0)]
        is_patch = (slot >= 0).nonzero().squeeze(1)
        chosen = (sample * n + grid_cell)[is_patch]
        pixels = patches.new_zeros(len(row), patches.shape[2])
        pixels[is_patch] = patches.flatten(0, 1)[chosen]
        table = torch.cat([(self.cls_token + self.pos_embed[0]).unsqueeze(0), self.pos_embed[1:] + self.bias])
        place = torch.where(slot >= 0, grid_cell + 1, 0)
        return (F.linear(pixels, self.weight) + F.embedding(place, table)).unsqueeze(1)

    def _own_rows(self, rows: int, device: torch.device) -> Tensor:
        if not self.sequence_parallel:
            return torch.arange(rows, device=device)
        own = rows // self.tp_group.size()
        return torch.arange(own, device=device) + own * self.tp_group.rank()


class VisionHead(nn.Module):
    """Final norm of the class token and projection: packed tokens -> features [M, D], equal on every tensor rank."""

    def __init__(self, model: ModelConfig, config, tp_group):
        super().__init__()
        vision = model.vision
        self.tp_group = tp_group
        self.sequence_parallel = config.sequence_parallel
        self.norm = NORMS[vision.norm](config=config, hidden_size=vision.width, eps=vision.norm_eps)
        for parameter in self.norm.parameters():
            parameter.sequence_parallel = False  # type: ignore[attr-defined]  # sees gathered rows, not a slice
        self.projection = nn.Linear(vision.width, model.embed_dim, bias=vision.head_bias, dtype=config.params_dtype)

    def forward(self, hidden: Tensor, tokens: PackedTokens) -> Tensor:
        """Only class rows are normalised: the others do not reach the features."""
        return self.projection(self.norm(self.class_rows(hidden, tokens)))

    def class_rows(self, hidden: Tensor, tokens: PackedTokens) -> Tensor:
        """[T or T / tp, 1, H] -> [M, H]; sequence parallelism all-reduces M rows instead of gathering T."""
        m, s = tokens.samples, tokens.tokens_per_sample
        if not self.sequence_parallel:
            return hidden.reshape(m, s, -1)[:, 0]
        first = self.tp_group.rank() * hidden.shape[0]
        row = torch.arange(m, device=hidden.device) * s - first
        mine = ((row >= 0) & (row < hidden.shape[0])).nonzero().squeeze(1)
        own = hidden.new_zeros(m, hidden.shape[2]).index_copy(0, mine, hidden[row[mine], 0])
        return reduce_from_tensor_model_parallel_region(own, group=self.tp_group)


class VisionTower(nn.Module):
    """Blocks `layers` of the image tower, with the embedding if they start at 0 and the head if they end at depth."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        groups: ProcessGroupCollection,
        layers: range | None = None,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        recompute: str = "none",
    ):
        """`groups` needs tp, cp and pp (the latter two of one rank: stages are cut here, not by megatron-core)."""
        super().__init__()
        vision = model.vision
        self.vision = vision
        self.layers = range(vision.depth) if layers is None else layers
        self.is_first, self.is_last = self.layers.start == 0, self.layers.stop == vision.depth
        self.config = vision_transformer_config(
            vision,
            tensor_size=groups.tp.size(),
            sequence_parallel=sequence_parallel and groups.tp.size() > 1,
            dtype=dtype,
            recompute=recompute,
        )
        if self.is_first:
            self.embed = PatchEmbedding(vision, self.config, groups.tp)
        spec = vision_layer_spec(vision, self.config, groups)
        self.block = build_block(spec, len(self.layers), self.config, groups)
        if self.is_last:
            self.head = VisionHead(model, self.config, groups.tp)

    def forward(self, inputs: Tensor, kept: Tensor | None = None, *, samples: int) -> Tensor:
        """Normalised images [M, 3, h, w] (first stage) or packed tokens -> packed tokens, or features [M, D] (last).

        kept: int64 [M, k], the patches that survive patch dropout, the same on every rank; None keeps all.
        """
        tokens = self._tokens(samples, kept, inputs.device)
        hidden = self.embed(inputs, kept) if self.is_first else inputs
        if len(self.layers):
            hidden = self.block(hidden, None, packed_seq_params=tokens)
        return self.head(hidden, tokens) if self.is_last else hidden

    def _tokens(self, samples: int, kept: Tensor | None, device: torch.device) -> PackedTokens:
        patches = self.vision.patches if kept is None else kept.shape[1]
        rope = None
        if self.vision.rope:
            tables = rope_tables(self.vision.grid, self.vision.rope_grid, self.vision.head_width, device)
            rope = tuple(_pick(table, kept) for table in tables)
        return PackedTokens.of(samples, 1 + patches, device, rope)


def _pick(table: Tensor, kept: Tensor | None) -> Tensor:
    """[1 + n, d] -> [1, 1, 1 + n, d], or the rows of each sample's kept patches [M, 1, 1 + k, d]."""
    if kept is None:
        return table[None, None]
    places = F.pad(kept + 1, (1, 0))  # the class token stays first
    return table[places].unsqueeze(1)
