#!/usr/bin/env bash
# megatron-core 0.16.1, torch 2.13.0.
# Guess: MLP(config, …, ffn_hidden_size=32) is an MLP of hidden width 32.
# Behaviour: the first linear takes the argument and the second the width of the config, so that an argument that differs
# from the config builds without a word and raises in the forward pass.
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
install torch==2.13.0 numpy==2.4.6 packaging==26.4
unpack megatron-core==0.16.1 mcore
cat > "$work/run.py" <<'PY'
import os
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
torch.cuda.current_device = lambda: torch.device("cpu")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
config = TransformerConfig(
    num_layers=1, hidden_size=8, num_attention_heads=1, ffn_hidden_size=16, add_bias_linear=False,
    use_cpu_initialization=True, bias_activation_fusion=False, gated_linear_unit=False,
)
mlp = MLP(config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
          ffn_hidden_size=32, tp_group=dist.group.WORLD)
print([tuple(p.shape) for p in mlp.parameters()])
mlp(torch.randn(4, 1, 8))
PY
seen=$(PYTHONPATH="$work/mcore:$PACKAGES" OMP_NUM_THREADS=1 "$python" -W ignore "$work/run.py" 2>&1 || true)
expect "weights" "[(32, 8), (8, 16)]" "$(head -1 <<< "$seen")"
expect "forward" "mat1 and mat2 shapes cannot be multiplied (4x32 and 16x8)" "$(tail -1 <<< "$seen")"
