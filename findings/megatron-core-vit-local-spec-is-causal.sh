#!/usr/bin/env bash
# megatron-core 0.16.1, 0.17.1 (causal) and 0.18.2 (mended), torch 2.13.0.
# Guess: the two layer specs of its vision transformer, local and Transformer Engine, attend to the same patches.
# Behaviour: up to 0.17 the local one carries AttnMaskType.causal: a patch sees only the patches before it, without an error.
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
install torch==2.13.0 numpy==2.4.6 packaging==26.4
for version in 0.16.1 0.17.1 0.18.2; do
  unpack "megatron-core==$version" "$version"
  seen=$(PYTHONPATH="$work/$version:$PACKAGES" "$python" -W ignore - 2>&1 <<'PY' | tail -1 || true
import importlib.util, sys, types
if importlib.util.find_spec("triton") is None:  # 0.18 imports it for its experts (a finding of its own)
    class Unused(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *a, **k: None
    name = "megatron.core.transformer.moe.paged_stash"
    sys.modules[name] = Unused(name)
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
print(get_vit_layer_with_local_spec().submodules.self_attention.params)
PY
)
  case $version in
    0.18.2) expect "$version" "AttnMaskType.no_mask" "$seen" ;;
    *) expect "$version" "AttnMaskType.causal" "$seen" ;;
  esac
done
