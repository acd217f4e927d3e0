#!/usr/bin/env bash
# megatron-core 0.16.1, torch 2.13.0.
# Guess: recomputing an activation (CheckpointWithoutOutput, behind recompute_modules=[layernorm, mlp, …]) in fp32 needs
# torch only; Transformer Engine is optional in this library.
# Behaviour: NameError of a name that is bound only where Transformer Engine can be imported.
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
install torch==2.13.0 numpy==2.4.6 packaging==26.4
unpack megatron-core==0.16.1 mcore
cat > "$work/run.py" <<'PY'
import torch
import megatron.core.tensor_parallel.random as r
# Stand-ins for a GPU's generator where there is none.
torch.cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()
torch.cuda.manual_seed = lambda s: torch.manual_seed(s) and None
torch.cuda.set_rng_state = lambda s, device=None: torch.set_rng_state(s)
torch.cuda.current_device = lambda: torch.device("cpu")
r._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
r._set_cuda_rng_state = lambda s, *a, **k: torch.set_rng_state(s)
r.model_parallel_cuda_manual_seed(0, tp_rank=0, ep_rank=0, etp_rank=0)
x = torch.randn(4, 4, requires_grad=True)
r.CheckpointWithoutOutput().checkpoint(torch.nn.functional.silu, x)
PY
seen=$(PYTHONPATH="$work/mcore:$PACKAGES" "$python" -W ignore "$work/run.py" 2>&1 | tail -1 || true)
expect "megatron-core 0.16.1" "NameError: name 'FP8GlobalStateManager' is not defined" "$seen"
