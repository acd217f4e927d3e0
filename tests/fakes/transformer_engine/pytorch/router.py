"""Names that megatron-core imports; there are no experts here."""

from typing import Any


def _unused(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError


fused_compute_score_for_moe_aux_loss = _unused
fused_moe_aux_loss = _unused
fused_topk_with_score_function = _unused
