"""The image tower, or the pipeline stage of it that one rank holds.

A tower is built for a range of its blocks: the first stage adds the patch embedding, the last one the head. Inside,
activations are packed tokens [T, 1, H] with T = M x S (under sequence parallelism each rank of the tensor group holds
T / tp rows of them, on the first stage already at the embedding). Source: authors' eva_vit_model.py; paper section 2.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.kernels import vision_kernels
from models.blocks.norms import NORMS, mark_sequence_parallel
from models.blocks.packed import PackedTokens
from models.blocks.rope import rope_tables
from models.blocks.spec import DividedTower, Groups, Span, build_block, vision_layer_spec
from models.blocks.transformer_config import vision_transformer_config
from models.config import ModelConfig, VisionConfig
from models.tensors.sums import multiplied
from models.towers.heads import Read, VisionHead

FP8_ROWS = 128
"""Rows of a matrix product that every fp8 recipe takes (models/kernel_checks.py)."""


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[M, 3, h, w] -> [M, n, 3 p^2], patches row by row, each flattened as the convolution kernel is (c, y, x)."""
    m, c, h, w = images.shape
    p = patch_size
    grid = images.reshape(m, c, h // p, p, w // p, p)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(m, -1, c * p * p)


class PatchEmbedding(nn.Module):
    """Images -> packed tokens: patch projection, class token, registers, position table, patch dropout.

    Dropped patches are never projected (the authors project all and drop after the position table; equal by value).
    Under sequence parallelism a rank embeds its own T / tp rows only, so these gradients are partial sums.
    """

    def __init__(self, vision: VisionConfig, config, tp_group):
        super().__init__()
        self.patch_size, self.prefix_tokens = vision.patch_size, vision.prefix_tokens
        self.sequence_parallel = config.sequence_parallel
        self.tp_group = tp_group
        empty = lambda *shape: nn.Parameter(torch.empty(*shape, dtype=config.params_dtype))  # noqa: E731
        self.weight = empty(vision.width, 3 * vision.patch_size**2)
        self.bias = empty(vision.width) if vision.patch_bias else None
        self.cls_token = empty(vision.width) if vision.class_token else None
        self.registers = empty(vision.registers, vision.width) if vision.registers else None
        self.pos_embed = empty(vision.positions, vision.width) if vision.pos_embed else None
        mark_sequence_parallel(self, config)
        norm = NORMS[vision.norm] if vision.embed_norm else None
        self.norm = norm(config=config, hidden_size=vision.width, eps=vision.norm_eps) if norm else None

    def forward(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """images [M, 3, h, w] normalised; kept int64 [M, k] or None for all -> [T or T / tp, 1, H]."""
        patches = patchify(images.to(self.weight.dtype), self.patch_size)
        m, n, _ = patches.shape
        k = n if kept is None else kept.shape[1]
        sample, slot = self.own_tokens(m, self.prefix_tokens + k, images.device)
        grid_cell = slot if kept is None else kept[sample, slot.clamp_min(0)]
        pixels = chosen_patches(patches, sample * n + grid_cell, slot >= 0)
        prefix, positions = self.prefix_and_positions(n)
        table = torch.cat([prefix, positions if self.bias is None else positions + self.bias])
        place = torch.where(slot >= 0, grid_cell, slot) + self.prefix_tokens
        return self.normed(multiplied(pixels, self.weight) + F.embedding(place, table))

    def prefix_and_positions(self, patches: int) -> tuple[Tensor, Tensor]:
        """Prefix tokens with their positions [prefix, H], positions of the patches [n, H] (zeros without a table)."""
        table: Tensor | None = self.pos_embed
        if table is None:
            table = self.weight.new_zeros(patches + (self.cls_token is not None), len(self.weight))
        prefix = table[:0] if self.cls_token is None else (self.cls_token + table[0]).unsqueeze(0)
        if self.registers is not None:
            prefix = torch.cat([prefix, self.registers])
        return prefix, table[len(table) - patches :]

    def normed(self, tokens: Tensor) -> Tensor:
        """[T or T / tp, H] -> [T or T / tp, 1, H], through the norm where the tower has one here."""
        return (tokens if self.norm is None else self.norm(tokens)).unsqueeze(1)

    def own_tokens(self, samples: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(sample, slot) of this rank's rows of samples x tokens, int64 each; slots of the prefix are below 0."""
        rows, first = samples * tokens, 0
        if self.sequence_parallel:
            rows //= self.tp_group.size()
            first = rows * self.tp_group.rank()
        row = torch.arange(first, first + rows, device=device)
        return row // tokens, row % tokens - self.prefix_tokens


def chosen_patches(patches: Tensor, chosen: Tensor, shown: Tensor) -> Tensor:
    """Patch number chosen[t] of the M x n of patches [M, n, 3 p^2] in each row t where `shown`; zeros elsewhere."""
    pixels = patches.flatten(0, 1).index_select(0, chosen.clamp_min(0))
    return pixels.masked_fill_(~shown.unsqueeze(1), 0)


class VisionTower(DividedTower):
    """Blocks `layers` of the image tower, with the embedding if they start at 0 and the head if they end at depth."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        groups: Groups,
        layers: range | None = None,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        recompute: str = "none",
        embedding: Callable[..., nn.Module] = PatchEmbedding,
        head: Callable[..., nn.Module] = VisionHead,
    ):
        """`groups` needs tp, cp and pp (the latter two of one rank: stages are cut here, not by megatron-core).

        embedding, head: what the first and the last stage are built with; the MIM student has others.
        """
        super().__init__()
        vision = model.vision
        self.vision = vision
        self.layers = range(vision.depth) if layers is None else layers
        self.is_first, self.is_last = self.layers.start == 0, self.layers.stop == vision.depth
        kernels = vision_kernels(model, self.layers, dtype)
        self.config = vision_transformer_config(
            vision,
            tensor_size=groups.tp.size(),
            sequence_parallel=sequence_parallel and groups.tp.size() > 1,
            dtype=dtype,
            recompute=recompute,
            settings=kernels.settings,
        )
        if self.is_first:
            self.embed = embedding(vision, self.config, groups.tp)
        spec = vision_layer_spec(vision, self.config, groups, kernels)
        self.block = build_block(spec, len(self.layers), self.config, groups, ends_tower=self.is_last)
        self.divide(0)
        if self.is_last:
            self.head = head(model, self.config, groups.tp)
        self.pooled_multiple = groups.tp.size() if self.config.sequence_parallel else 1
        """Refuse rows behind the pooling that fp8 products cannot take: each tensor rank has as many of them."""
        if model.fp8 != "none":
            self.pooled_multiple *= FP8_ROWS

    def forward(
        self,
        inputs: Tensor,
        kept: Tensor | None = None,
        *,
        samples: int,
        read: Read = "features",
        span: Span = "whole",
    ) -> Tensor:
        """Normalised images [M, 3, h, w] (first stage) or packed tokens -> packed tokens, or features [M, D] (last).

        kept: int64 [M, k], the patches that survive patch dropout, the same on every rank; None keeps all.
        read: what the head answers with (models/towers/heads.py); tokens need the last block's work for all of them.
        span: `above` goes on from what `below` has answered.
        """
        tokens = self._tokens(samples, kept, inputs.device)
        if self.is_last and self.vision.reads_one_token and read != "tokens":
            class_rows = torch.arange(samples, device=inputs.device) * tokens.tokens_per_sample
            tokens = tokens.pooling(class_rows, self.pooled_multiple)
        hidden = self.embed(inputs, kept) if self.is_first and span != "above" else inputs
        hidden = self.run_blocks(hidden, tokens, span)
        return self.head(hidden, tokens, read) if self.is_last and span != "below" else hidden

    def run_blocks(self, hidden: Tensor, tokens: PackedTokens, span: Span = "whole") -> Tensor:
        """Packed tokens [T or T / tp, 1, H] through this stage's blocks; a stage may have none."""
        return self._divided(hidden, tokens, span)

    def _tokens(self, samples: int, kept: Tensor | None, device: torch.device) -> PackedTokens:
        patches = self.vision.patches if kept is None else kept.shape[1]
        rope = None
        if self.vision.rope:
            tables = rope_tables(self.vision, device)
            rope = tuple(_pick(table, kept, self.vision.prefix_tokens) for table in tables)
        return PackedTokens.of(samples, self.vision.prefix_tokens + patches, device, rope)


def _pick(table: Tensor, kept: Tensor | None, prefix: int) -> Tensor:
    """[1 + n, d] -> [1, 1, S, d], or the rows of each sample's kept patches [M, 1, prefix + k, d]; row 0 is still."""
    if kept is None:
        return torch.cat([table[:1].expand(prefix, -1), table[1:]])[None, None]
    places = F.pad(kept + 1, (prefix, 0))  # prefix tokens stay first
    return table[places].unsqueeze(1)
