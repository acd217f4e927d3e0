"""A block of either tower with the operators between its products fused; modules and names are the unfused one's.

Per token and channel of an 18B block in bf16, 32 bytes are read and written forward and 64 backward, in 3 and 10
launches, where separate operators take 128 and 212 in 22 and 34 (counted: `python -m benchmarks.operators`):
- forward, twice a norm with bias and residual 6, bias and GELU 20;
- backward, the same norm 6, twice, GELU 30 and the sum for fc1's bias 10, dq, dk and dv into one tensor 12.
"""

from typing import Any, cast

from megatron.core import tensor_parallel
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from models.blocks.activations import ACTIVATION
from models.blocks.attention import QkvWithBias, SeparateQkv
from models.blocks.fused.mlp import activated, gated
from models.blocks.fused.norms import added, norm_of_residual, norm_of_stream, residual_of_norm
from models.blocks.last_block import LastBlock
from models.blocks.norms import PostNormResidual, ScaledResidual, SplitChannelNorm
from models.blocks.outputs import ColumnLinear
from models.blocks.packed import PackedTokens


class FusedBlock(TransformerLayer):
    """megatron-core's block, [T or T / tp, 1, H] -> the same."""

    ends_stack = False
    """Whether the gradient of the output comes from outside of the blocks, where others may read it."""

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: PackedTokens, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The attention's branch, then the MLP's; megatron-core wants a context beside the tokens."""
        tokens = packed_seq_params
        if isinstance(self.self_attn_bda, PostNormResidual):
            branch, bias, stream = self._attend(hidden_states, tokens, own=True)
            stream = residual_of_norm(self.self_attn_bda.norm, self._going_on(stream, tokens), branch, bias)
            branch, bias, stream = self._mlp(stream, own=not self.ends_stack)
            return residual_of_norm(self.mlp_bda.norm, stream, branch, bias), None
        stream, normed = norm_of_stream(self.input_layernorm, hidden_states)
        branch, bias, _ = self._attend(normed, tokens, own=True)
        branch, bias = _scaled(self.self_attn_bda, branch, bias)
        stream, normed = norm_of_residual(self.pre_mlp_layernorm, self._going_on(stream, tokens), branch, bias)
        branch, bias, _ = self._mlp(normed, own=True)
        branch, bias = _scaled(self.mlp_bda, branch, bias)
        return added(stream, branch, bias), None

    def _going_on(self, stream: Tensor, tokens: PackedTokens) -> Tensor:
        """The rows that go on behind the attention: all."""
        return stream

    def _asking(self, tokens: PackedTokens) -> PackedTokens:
        """The tokens whose queries are answered: all."""
        return tokens

    def _attend(self, x: Tensor, tokens: PackedTokens, *, own: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """x -> branch, its bias, x to be used from here on."""
        attention, asking = self.self_attention, self._asking(tokens)
        q, k, v, x = _queries_keys_values(attention.linear_qkv, x, attention.hidden_size_per_attention_head, own)
        core = attention.core_attention
        if attention.checkpoint_core_attention and self.training:
            mixed = tensor_parallel.checkpoint(lambda *qkv: core(*qkv, packed_seq_params=asking), False, q, k, v)
        else:
            mixed = core(q, k, v, packed_seq_params=asking)
        branch, bias = attention.linear_proj.product(mixed.unsqueeze(1))
        return branch, bias, x

    def _mlp(self, x: Tensor, *, own: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """The same of the MLP."""
        mlp: Any = self.mlp
        if isinstance(mlp, MLP):
            hidden, x = mlp.linear_fc1.product(x, own=own)
            branch, bias = mlp.linear_fc2.product(activated(hidden, mlp.linear_fc1.bias, _KINDS[mlp.activation_func]))
            return branch, bias, x
        up, x = mlp.up.product(x, mlp.up.bias)
        gate, x = mlp.gate.product(x, mlp.gate.bias, own=own)
        branch, bias = mlp.down.product(_gated(gate, up, mlp.norm))
        return branch, bias, x


class FusedLastBlock(FusedBlock, LastBlock):
    """The same for the tokens that the tower's head reads."""

    def _going_on(self, stream: Tensor, tokens: PackedTokens) -> Tensor:
        return stream if tokens.pooled is None else self._read(stream.squeeze(1), tokens.pooled).unsqueeze(1)

    def _asking(self, tokens: PackedTokens) -> PackedTokens:
        return tokens if tokens.pooled is None else tokens.asking()


def _scaled(residual: Any, branch: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The branch with the gain of LayerScale, where the block has one."""
    if not isinstance(residual, ScaledResidual):
        return branch, bias
    return residual.gain * (branch if bias is None else branch + bias), None


_KINDS = {function: name for name, function in ACTIVATION.items()}


def _queries_keys_values(linear: Any, x: Tensor, width: int, own: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T or T / tp, 1, H] -> q, k, v [T, heads / tp, d], x to be used from here on."""
    if isinstance(linear, SeparateQkv):
        of_q, of_v = (None, None) if linear.bias is None else (linear.bias.q, linear.bias.v)
        q, x = cast(ColumnLinear, linear.q).product(x, of_q)
        k, x = cast(ColumnLinear, linear.k).product(x)
        v, x = cast(ColumnLinear, linear.v).product(x, of_v, own=own)
        q, k, v = (part.view(len(part), -1, width) for part in (q, k, v))
        return q, k, v, x
    if isinstance(linear, QkvWithBias):
        mixed, x = cast(ColumnLinear, linear.linear).product(x, linear.bias(), own=own)
    else:
        mixed, x = linear.product(x, linear.bias, own=own)
    q, k, v = mixed.view(len(mixed), -1, 3, width).unbind(2)
    return q, k, v, x


def _gated(gate: Tensor, up: Tensor, norm: SplitChannelNorm | None) -> Tensor:
    """SwiGLU and its sub-LN, which gathers its channels where ranks share them."""
    if norm is None or norm.tp_group.size() == 1:
        return gated(gate, up, None if norm is None else norm.norm)
    return norm(gated(gate, up, None))
