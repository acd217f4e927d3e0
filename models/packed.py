"""How packed tokens fall into samples: what every attention kernel is told of a micro-batch."""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class PackedTokens(PackedSeqParams):
    """How T packed tokens fall into samples: M samples of S tokens each (thd format with equal lengths)."""

    samples: int = 0
    tokens_per_sample: int = 0
    rope: tuple[Tensor, Tensor] | None = None
    """cos and sin, each [1 or M, 1, S, head_width]; None for towers without rope."""

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

    def by_sample(self, packed: Tensor) -> Tensor:
        """[T, …] -> [M, S, …]."""
        return packed.unflatten(0, (self.samples, self.tokens_per_sample))
