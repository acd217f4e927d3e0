"""Which kernels of the image tower work together, by the config alone: no package is imported and no GPU looked for."""

from models.config import FP8_MULTIPLES, ModelConfig, ModelConfigError, VisionConfig

_BF16_ATTENTION = ("flash", "flash3", "flash4", "te")
_WIDEST_HEAD = {"flash": 256, "flash3": 256, "flash4": 128}
"""model.attention -> channels of a head that its kernels take at most, forward and backward, in multiples of 8."""


def check_kernels(
    model: ModelConfig, *, precision: str, packed_tokens: int, tensor: int, sequence_parallel: bool
) -> None:
    """Raise ModelConfigError for kernels that exclude each other, the precision or the sizes.

    precision: fp32 or bf16; packed_tokens: T of a micro-batch; tensor: ranks of the tensor axis.
    """
    _check_backend(model)
    _check_fused(model)
    attention = "te" if (model.backend, model.attention) == ("transformer_engine", "auto") else model.attention
    if precision != "bf16" and attention in _BF16_ATTENTION:
        raise ModelConfigError(
            f"model.attention={attention} has kernels for bf16 only, not {precision}: set train.precision=bf16 or "
            "model.attention=sdpa"
        )
    widest = _WIDEST_HEAD.get(attention)
    if widest and (model.vision.head_width % 8 or model.vision.head_width > widest):
        raise ModelConfigError(
            f"model.attention={attention} takes head widths in multiples of 8 up to {widest}, but "
            f"model.vision.head_width is {model.vision.head_width}: set model.attention=sdpa"
        )
    if model.fp8 != "none":
        multiple = FP8_MULTIPLES[model.fp8]
        if model.fp8 == "blockwise" and sequence_parallel:
            multiple = 128  # activations are gathered in fp8, in whole blocks (Float8BlockQuantizer.is_quantizable)
        _check_fp8(model, precision, packed_tokens // (tensor if sequence_parallel else 1), tensor, multiple)


def _check_backend(model: ModelConfig) -> None:
    asked = [
        f"model.{name}={value}"
        for name, value, from_te in (
            ("attention", model.attention, ("te",)),
            ("norm_kernel", model.norm_kernel, ("te",)),
            ("fp8", model.fp8, tuple(FP8_MULTIPLES)),
        )
        if value in from_te
    ]
    if asked and model.backend != "transformer_engine":
        fused = " and model.block_kernels=torch" if model.block_kernels == "fused" else ""
        raise ModelConfigError(
            f"{asked[0]} needs model.backend=transformer_engine, not {model.backend}: set it{fused}, or leave "
            f"{asked[0].split('=')[0]} out"
        )
    if model.norm_kernel in ("apex", "compiled") and model.vision.norm != "rms":
        raise ModelConfigError(
            f"model.norm_kernel={model.norm_kernel} is a fused RMSNorm, but model.vision.norm is {model.vision.norm}: "
            "choose torch"
        )


def _check_fused(model: ModelConfig) -> None:
    if model.block_kernels != "fused":
        return
    if model.backend != "local":
        fp8 = "" if model.fp8 == "none" else " and model.fp8=none"
        whose = "has kernels of its own" if model.backend == "transformer_engine" else "may choose others"
        raise ModelConfigError(
            f"model.block_kernels=fused works on the linears of model.backend=local, not {model.backend}, which "
            f"{whose}: set model.block_kernels=torch, or model.backend=local{fp8}"
        )
    if model.norm_kernel != "auto":
        raise ModelConfigError(
            f"model.block_kernels=fused has norms of its own, not those of model.norm_kernel={model.norm_kernel}: set "
            "model.norm_kernel=auto"
        )


def _check_fp8(model: ModelConfig, precision: str, own_tokens: int, tensor: int, multiple: int) -> None:
    if precision != "bf16":
        raise ModelConfigError(f"model.fp8={model.fp8} needs train.precision=bf16, not {precision}")
    odd = odd_in_fp8(model.vision, own_tokens, tensor, multiple)
    if odd is not None:
        raise ModelConfigError(
            f"model.fp8={model.fp8} needs multiples of {multiple} in every GEMM, but there are {odd}"
        )


def odd_in_fp8(vision: VisionConfig, own_tokens: int, tensor: int, multiple: int) -> str | None:
    """The first side of a product that is no such multiple, and what to choose instead; None where all are."""
    sizes = {
        "tokens of a micro-batch on a rank: choose another train.micro_batch_size": own_tokens,
        "of model.vision.width on a rank: choose another parallel.tensor": vision.width // tensor,
        "of model.vision.mlp_hidden on a rank: choose another parallel.tensor": vision.mlp_hidden // tensor,
    }
    return next((f"{size} {what}" for what, size in sizes.items() if size % multiple), None)
