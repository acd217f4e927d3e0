"""Random states and recomputation."""

from typing import Any

from torch.utils.checkpoint import checkpoint as torch_checkpoint


class CudaRNGStatesTracker:
    """Base class of megatron-core's wrapper; not used."""


def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Any:
    """Not used: megatron-core asks for it in recomputation with delayed scaling only."""
    raise NotImplementedError


def checkpoint(
    function: Any,
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Any = None,
    tp_group: Any = None,
    use_reentrant: bool = True,
    **kwargs: Any,
) -> Any:
    """Activation recomputation under the fp8 recipe of the forward pass."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast

    enabled, recipe = FP8GlobalStateManager.is_fp8_enabled(), FP8GlobalStateManager.recipe

    def run(*inputs: Any) -> Any:
        with fp8_autocast(enabled=enabled, fp8_recipe=recipe):
            return function(*inputs, **kwargs)

    return torch_checkpoint(run, *args, use_reentrant=use_reentrant)
