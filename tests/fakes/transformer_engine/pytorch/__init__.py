"""torch modules."""

from transformer_engine.pytorch import distributed as distributed
from transformer_engine.pytorch import ops as ops
from transformer_engine.pytorch.attention import DotProductAttention as DotProductAttention
from transformer_engine.pytorch.fp8 import fp8_autocast as fp8_autocast
from transformer_engine.pytorch.fp8 import fp8_model_init as fp8_model_init
from transformer_engine.pytorch.linear import GroupedLinear as GroupedLinear
from transformer_engine.pytorch.linear import LayerNormLinear as LayerNormLinear
from transformer_engine.pytorch.linear import Linear as Linear
from transformer_engine.pytorch.norms import LayerNorm as LayerNorm
from transformer_engine.pytorch.norms import RMSNorm as RMSNorm
