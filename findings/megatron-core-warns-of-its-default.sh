#!/usr/bin/env bash
# megatron-core 0.16.1, torch 2.13.0.
# Guess: a configuration of defaults is not deprecated. Behaviour: TransformerConfig with nothing but its three required
# fields warns that the full scope of its CUDA graphs, which nobody asked for, is deprecated.
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
install torch==2.13.0 numpy==2.4.6 packaging==26.4
unpack megatron-core==0.16.1 mcore
seen=$(PYTHONPATH="$work/mcore:$PACKAGES" "$python" - 2>&1 <<'PY' | grep -i deprecated | head -1 || true
from megatron.core.transformer.transformer_config import TransformerConfig
TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
PY
)
expect "megatron-core 0.16.1" "full scope is deprecated" "$seen"
