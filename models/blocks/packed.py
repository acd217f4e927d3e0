"""How packed tokens fall into samples: what every attention kernel is told of a micro-batch."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """The one token of each sample that the tower's head reads."""

    rows: Tensor
    """int64 [M], of the T packed tokens."""
    padded: int
    """R >= M, rows that a block answers with for them; nobody reads those past M."""

    def pad(self, answers: Tensor) -> Tensor:
        """[M, C] -> [R, C]; as it is where R = M, since autograd would keep the copy beside it."""
        missing = self.padded - len(answers)
        return F.pad(answers, (0, 0, 0, missing)) if missing else answers


@dataclass
class PackedTokens(PackedSeqParams):
    """How T packed tokens fall into samples: M samples of S tokens each (thd format with equal lengths)."""

    samples: int = 0
    tokens_per_sample: int = 0
    rope: tuple[Tensor, Tensor] | None = None
    """cos and sin, each [1 or M, 1, S, head_width]; None for towers without rope."""
    pooled: Pooled | None = None
    """For the last block (models/blocks/last_block.py); None where every token is wanted."""
    queries: Pooled | None = None
    """Set inside the last block: the only tokens that ask. None: all do."""

    @staticmethod
    def of(samples: int, tokens_per_sample: int, device: torch.device, rope=None) -> "PackedTokens":
        """Describe `samples` x `tokens_per_sample` tokens."""
        bounds = torch.arange(samples + 1, dtype=torch.int32, device=device) * tokens_per_sample
        return PackedTokens(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=tokens_per_sample,
            max_seqlen_kv=tokens_per_sample,
            samples=samples,
            tokens_per_sample=tokens_per_sample,
            rope=rope,
        )

    def pooling(self, rows: Tensor, multiple: int = 1) -> "PackedTokens":
        """The same for a tower whose head reads `rows` (int64 [M]) alone; `multiple` divides what a block answers."""
        return replace(self, pooled=Pooled(rows=rows, padded=-(-self.samples // multiple) * multiple))

    def asking(self) -> "PackedTokens":
        """The same for the attention of the last block: one query a sample."""
        asked = replace(self, queries=self.pooled)
        asked.cu_seqlens_q = torch.arange(self.samples + 1, dtype=torch.int32, device=self.cu_seqlens_kv.device)
        asked.max_seqlen_q = 1
        return asked

    def by_sample(self, packed: Tensor) -> Tensor:
        """[T, …] -> [M, S, …]; [M, …], one token a sample, -> [M, 1, …]."""
        return packed.unflatten(0, (self.samples, len(packed) // max(1, self.samples)))


def whole_tokens(own: Tensor, group) -> Tensor:
    """[T / tp, ...] of each tensor rank -> [T, ...] on all; they all compute the same of it, so its gradient is cut."""
    return gather_from_sequence_parallel_region(own, tensor_parallel_output_grad=False, group=group)


def sum_over_ranks(part: Tensor, group) -> Tensor:
    """Summands of each tensor rank -> the sum on all; its gradient goes to each as it is."""
    return reduce_from_tensor_model_parallel_region(part, group=group)
