"""Linears with tensor and sequence parallelism."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, quantise


class TransformerEngineBaseModule(nn.Module):
    """A module with fp8 state in its state_dict."""

    ran_in_fp8: bool | None = None
    """For tests: what the last forward did."""

    def get_extra_state(self) -> Tensor:
        """State of the quantisers; empty without delayed scaling."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """Nothing to restore."""


class Linear(TransformerEngineBaseModule):
    """y = x W^T + b; column splits output features over tp_group, row input features."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ):
        super().__init__()
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        self.in_features, self.out_features = in_features, out_features
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.use_bias, self.return_bias = bias, return_bias
        self.save_original_input = save_original_input
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        if bias:
            self.bias: Tensor = nn.Parameter(torch.zeros(out_features, dtype=params_dtype, device=device))
            if parallel_mode == "row":
                self.bias.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        else:
            self.bias = torch.empty(0, dtype=params_dtype, device=device)

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Any:
        """[..., in] -> [..., out]; (output without bias, bias) if return_bias."""
        from megatron.core.tensor_parallel import mappings  # it imports this package itself

        x, weight, group = inp, self.weight, self.tp_group
        if self.parallel_mode == "column" and self.tp_size > 1:
            if self.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x, group=group)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x, group=group)
        self.ran_in_fp8 = FP8GlobalStateManager.is_fp8_enabled()
        if self.ran_in_fp8:
            x, weight = (quantise(t, FP8GlobalStateManager.recipe) for t in (x, weight))
        out = F.linear(x, weight)
        if self.parallel_mode == "row" and self.tp_size > 1:
            if self.sequence_parallel:
                out = mappings.reduce_scatter_to_sequence_parallel_region(out, group=group)
            else:
                out = mappings.reduce_from_tensor_model_parallel_region(out, group=group)
        if self.return_bias:
            return out, self.bias
        return out + self.bias if self.use_bias else out


class LayerNormLinear(TransformerEngineBaseModule):
    """Base class of a wrapper that the towers do not use."""


class GroupedLinear(TransformerEngineBaseModule):
    """Base class of a wrapper that the towers do not use."""
