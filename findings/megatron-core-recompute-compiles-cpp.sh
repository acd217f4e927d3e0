#!/usr/bin/env bash
# megatron-core 0.17.1 and 0.16.1, torch 2.13.0, no ninja.
# Guess: recomputing an activation computes. Behaviour: since 0.17 the first recomputation of CheckpointWithoutOutput
# compiles a C++ extension at run time, in every process; without ninja on the path it raises. In 0.16.1 it does not.
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
install torch==2.13.0 numpy==2.4.6 packaging==26.4
cat > "$work/run.py" <<'PY'
import contextlib
import torch
import megatron.core.tensor_parallel.random as r
torch.cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()
torch.cuda.manual_seed = lambda s: torch.manual_seed(s) and None
torch.cuda.set_rng_state = lambda s, device=None: torch.set_rng_state(s)
torch.cuda.current_device = lambda: torch.device("cpu")
r._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
r._set_cuda_rng_state = lambda s, *a, **k: torch.set_rng_state(s)
r.model_parallel_cuda_manual_seed(0, tp_rank=0, ep_rank=0, etp_rank=0)
# Stand-ins for the three names that need Transformer Engine (a finding of its own).
r.FP8GlobalStateManager = type("M", (), {"is_fp8_enabled": staticmethod(lambda: False), "get_fp8_recipe": staticmethod(lambda: None)})
r.activation_recompute_forward = lambda *a, **k: contextlib.nullcontext()
r.fp8_autocast = lambda *a, **k: contextlib.nullcontext()
x = torch.randn(4, 4, requires_grad=True)
checkpoint = r.CheckpointWithoutOutput()
y = checkpoint.checkpoint(torch.nn.functional.silu, x)
z = y * y
checkpoint.discard_output_and_register_recompute(z)
z.sum().backward()
print("computed")
PY
for version in 0.16.1 0.17.1; do
  unpack "megatron-core==$version" "$version"
  seen=$(env -i HOME="$work" PATH="$work/empty" PYTHONPATH="$work/$version:$PACKAGES" "$(command -v "$python")" -W ignore "$work/run.py" 2>&1 | tail -1 || true)
  case $version in
    0.16.1) expect "$version" "computed" "$seen" ;;
    *) expect "$version" "Ninja is required to load C++ extensions" "$seen" ;;
  esac
done
