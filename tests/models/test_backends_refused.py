"""Kernels that exclude each other are refused with the config; a package that is missing, before anything is built."""

import sys
from pathlib import Path

import pytest
import torch

from engine.checkpoint.format.manifest import Manifest
from engine.config.read import Config, ConfigError, resolve, to_dict
from engine.evaluation.embedder import inference_config
from models.blocks import kernels, packages
from models.blocks.kernels import choose, require_kernels
from models.blocks.packages import APEX, FLASH_2, FLASH_3, FLASH_4, TRANSFORMER_ENGINE, Package, load, te_takes_flash
from models.config import LOCAL_KERNELS, ModelConfigError

TE = "model.backend=transformer_engine"
BF16 = "train.precision=bf16"
WIDE = ["model.vision.width=320", "model.vision.head_width=160"]
FITTING = "train.micro_batch_size=32"
EVALUATE = "evaluate={every_steps: 5, shards: [held-out.tar]}"


def _resolve(*options: str) -> Config:
    """Four blocks of width 64; 9 tokens a picture."""
    small = ["model.preset=tiny-18b", "train.global_batch_size=32", "train.patch_dropout=0.5"]
    return resolve({"data": {"shards": ["-"]}}, [*small, *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.backend=apex"], r"backend is 'apex': choose one of auto, local, transformer_engine"),
        (["model.attention=xformers"], r"attention is 'xformers': choose one of auto, sdpa"),
        (["model.norm_kernel=triton"], r"norm_kernel is 'triton'"),
        (
            ["model.fp8=delayed", TE, BF16],
            r"fp8 is 'delayed': choose one of none, current, blockwise, mxfp8 \(its",
        ),
        (["model.attention=te", BF16], r"attention=te needs model\.backend=transformer_engine, not local"),
        (["model.norm_kernel=te"], r"norm_kernel=te needs model\.backend=transformer_engine, not local"),
        (["model.fp8=current", BF16], r"fp8=current needs model\.backend=transformer_engine, not local"),
        (["model.fp8=current", "model.backend=auto", BF16], r"needs model\.backend=transformer_engine, not auto"),
        ([TE], r"attention=te has kernels for bf16 only, not fp32: set train\.precision=bf16 or model\.attention=sdpa"),
        (["model.attention=flash"], r"attention=flash has kernels for bf16 only, not fp32"),
        (["model.attention=flash3"], r"attention=flash3 has kernels for bf16 only"),
        (["model.attention=flash4"], r"attention=flash4 has kernels for bf16 only"),
        ([BF16, "model.attention=flash4", *WIDE], r"head widths in multiples of 8 up to 128, but .* is 160: set"),
        ([BF16, "model.attention=flash", "model.vision.head_width=4"], r"multiples of 8 up to 256, but .* is 4: set"),
        (["model.fp8=nvfp4", TE, BF16], r"fp8 is 'nvfp4': choose one of none, .*rounds gradients at random"),
        (["model.fp8=custom", TE, BF16], r"fp8 is 'custom': choose one of none, .*a replay must repeat"),
        (["model.norm_kernel=apex", "model.vision.norm=layer"], r"fused RMSNorm, but model\.vision\.norm is layer"),
        (["model.norm_kernel=compiled", "model.vision.norm=layer"], r"norm_kernel=compiled is a fused RMSNorm, but"),
        ([TE, "model.attention=sdpa", "model.fp8=current"], r"fp8=current needs train\.precision=bf16, not fp32"),
        ([TE, BF16, "model.fp8=current", "train.micro_batch_size=8"], r"multiples of 16 .*72 tokens of a micro-batch"),
        ([TE, BF16, "model.fp8=mxfp8", "train.micro_batch_size=16"], r"multiples of 32 .*144 tokens"),
        (
            [TE, BF16, "model.fp8=mxfp8", FITTING, "model.vision.mlp_hidden=304"],
            r"304 of model\.vision\.mlp_hidden on a rank: choose another parallel\.tensor",
        ),
        (
            [TE, BF16, "model.fp8=current", "parallel.tensor=4", FITTING],
            r"multiples of 16 in every GEMM, but there are 72 tokens",
        ),
        (
            [TE, BF16, "model.fp8=blockwise", "parallel.tensor=2", FITTING, "model.vision.width=128"],
            r"fp8=blockwise needs multiples of 128 .*144 tokens",
        ),
        (
            # 4 x 8 tokens of training would do, the 4 x 17 of an evaluation do not.
            [TE, BF16, "model.fp8=current", "train.micro_batch_size=4", "train.patch_dropout=0.55", EVALUATE],
            r"multiples of 16 in every GEMM, but there are 68 tokens",
        ),
        (["model.fp8_bf16_blocks=1"], r"fp8_bf16_blocks 1 .*needs model\.fp8 \(which is none\)"),
        ([TE, BF16, "model.fp8=current", "model.fp8_bf16_blocks=2", FITTING], r"each end of the 4 in bf16"),
        (["train.offload_stash=true"], r"offload_stash needs parallel\.pipeline or parallel\.virtual > 1"),
        (
            ["train.offload_stash=true", "parallel.pipeline=2", "train.keep_activations=-1"],
            r"offload_stash has nothing to move with train\.keep_activations=-1",
        ),
        (["parallel.timeout_minutes=0"], r"timeout_minutes is 0\.0: it must be at least 0\.001"),
    ],
)
def test_a_config_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        _resolve(*options)
    assert "\n" not in str(refusal.value)


FP8, LOCAL, FUSED, TORCH = (
    "model.fp8=current",
    "model.backend=local",
    "model.block_kernels=fused",
    "model.block_kernels=torch",
)
KEPT, NO_FP8 = "train.keep_outputs=fc2", "model.fp8=none"


@pytest.mark.parametrize(
    ("options", "fixes"),
    [
        ([TE, KEPT], [LOCAL]),
        ([TE, FP8, KEPT], [LOCAL, NO_FP8]),
        ([TE, FUSED], [TORCH]),
        ([TE, FUSED], [LOCAL]),
        ([TE, FUSED, FP8], [LOCAL, NO_FP8]),
        ([FUSED, "model.backend=auto"], [LOCAL]),
        ([FUSED, FP8], [TE, TORCH]),
    ],
    ids=str,
)
def test_a_refusal_says_all_that_is_to_be_set(options: list[str], fixes: list[str]) -> None:
    given = dict(option.split("=", 1) for option in (BF16, FITTING, *options))
    with pytest.raises(ConfigError) as refusal:
        _resolve(*map("=".join, given.items()))
    assert all(fix in str(refusal.value) for fix in fixes)
    _resolve(*map("=".join, (given | dict(fix.split("=", 1) for fix in fixes)).items()))


@pytest.mark.parametrize(
    "options",
    [
        [TE, "model.attention=sdpa"],
        [TE, BF16, "model.fp8=current", "model.fp8_bf16_blocks=1", FITTING],
        [TE, BF16, "model.fp8=mxfp8", FITTING, "parallel.tensor=2", "parallel.sequence=false"],
        [TE, BF16, "model.fp8=blockwise", FITTING, EVALUATE],
        [TE, BF16, "model.fp8=current", "train.micro_batch_size=4", "train.patch_dropout=0.55"],
        [BF16, "model.attention=flash", "model.norm_kernel=apex"],
        [BF16, "model.attention=flash3", *WIDE],
        [BF16, "model.attention=flash4", "model.vision.width=224", "model.vision.head_width=112"],
        ["train.offload_stash=true", "parallel.pipeline=2", "train.keep_activations=1"],
    ],
)
def test_what_fits_is_accepted_where_no_package_is_installed(options: list[str]) -> None:
    _resolve(*options)


@pytest.mark.parametrize(
    ("package", "options"),
    [
        (TRANSFORMER_ENGINE, [TE, "model.attention=sdpa"]),
        (FLASH_2, [BF16, "model.attention=flash"]),
        (FLASH_3, [BF16, "model.attention=flash3"]),
        (FLASH_4, [BF16, "model.attention=flash4"]),
        (APEX, ["model.norm_kernel=apex"]),
    ],
    ids=lambda value: value.name if isinstance(value, Package) else "",
)
def test_a_missing_package_is_named_with_its_command(package: Package, options: list[str]) -> None:
    if package.is_installed:
        pytest.skip(f"{package.name} is installed here")
    config = _resolve(*options)
    with pytest.raises(ModelConfigError) as refusal:
        require_kernels(config.model, torch.bfloat16)
    text = str(refusal.value)
    assert "\n" not in text
    for part in (package.name, package.option, package.install):
        assert part in text


def test_the_default_and_auto_are_told_apart() -> None:
    assert str(choose(_resolve().model, torch.float32)) == (
        "kernels of the image tower: local linears, sdpa attention, torch norms"
    )
    te = choose(_resolve(TE, BF16).model, torch.bfloat16)
    assert (te.backend, te.attention, te.norm_kernel) == ("transformer_engine", "te", "te")


def test_a_checkpoint_is_used_on_local_kernels_wherever_it_was_trained() -> None:
    trained = _resolve(TE, BF16, "model.fp8=current", "model.fp8_bf16_blocks=1", FITTING)
    manifest = Manifest(content="weights", config=to_dict(trained), layout={}, tensors={}, files={})
    model = inference_config(manifest, [], world_size=1, micro_batch=3).model
    assert {key: getattr(model, key) for key in LOCAL_KERNELS} == LOCAL_KERNELS
    chosen = inference_config(manifest, [TE, "model.attention=sdpa"], world_size=1, micro_batch=3).model
    assert (chosen.backend, chosen.attention) == ("transformer_engine", "sdpa")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: auto may pick another backend")
def test_auto_says_why_it_stays_local_and_takes_plain_products_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for multiplies, attention in ((False, "sdpa"), (True, "matmul")):
        monkeypatch.setattr(kernels, "multiplies_bf16", lambda multiplies=multiplies: multiplies)
        choice = choose(_resolve("model.backend=auto").model, torch.bfloat16)
        assert (choice.backend, choice.attention) == ("local", attention)
    assert str(choice).endswith("(model.backend=auto: there is no CUDA device)")


def _folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    return root


def test_the_bare_folder_of_flash_attn_4_is_no_flash_attn_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if FLASH_2.is_installed or FLASH_4.is_installed:
        pytest.skip("flash-attn is installed here")
    monkeypatch.syspath_prepend(_folder(tmp_path, "flash_attn/cute/__init__.py"))
    assert (FLASH_2.is_installed, FLASH_4.is_installed) == (False, True)
    with pytest.raises(ModelConfigError, match=r"model\.attention=flash needs flash-attn, .*is a folder of another"):
        load(FLASH_2)
    sys.modules.pop("flash_attn", None)  # monkeypatch would bring it back at the end


def test_the_early_files_in_flash_attn_2_are_no_flash_attn_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn 2.8.3 brings a flash_attn/cute without max_seqlen_q, and writes it over that of flash-attn 4."""
    if FLASH_2.is_installed or FLASH_4.is_installed:
        pytest.skip("flash-attn is installed here")
    monkeypatch.syspath_prepend(_folder(tmp_path, "flash_attn/__init__.py", "flash_attn/cute/__init__.py"))
    early = "def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None): ..."
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text(early)
    assert (FLASH_2.is_installed, FLASH_4.is_installed) == (True, False)
    with pytest.raises(ModelConfigError, match=r"flash4 needs flash-attn-4, .*no max_seqlen_q: .*force-reinstall"):
        load(FLASH_4)
    _folder(tmp_path, "flash_attn_4-4.0.0b36.dist-info/METADATA")
    (tmp_path / "flash_attn_4-4.0.0b36.dist-info" / "METADATA").write_text("Name: flash-attn-4\nVersion: 4.0.0b36\n")
    assert FLASH_4.is_installed
    with pytest.raises(ModelConfigError, match="no max_seqlen_q"):
        load(FLASH_4)
    for name in ("flash_attn.cute", "flash_attn"):
        sys.modules.pop(name, None)


def test_apex_of_pypi_is_not_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if APEX.is_installed:
        pytest.skip("apex is installed here")
    monkeypatch.syspath_prepend(_folder(tmp_path, "apex/__init__.py", "apex/interfaces.py"))
    assert not APEX.is_installed


@pytest.mark.parametrize(
    ("te", "flash", "taken"),
    [
        ("2.11.0", "2.8.3", True),
        ("2.18.0", "2.8.3.post2", False),
        ("2.18.0+abc", "2.7.4.post1", True),
        ("2.19.0", "2.8.3.post2", True),
        ("2.20.2", "2.8.4", False),
        (None, "2.8.3.post2", True),
        ("2.18.0", None, True),
        ("2.18.0", "of-mine", True),
    ],
)
def test_which_flash_attn_2_transformer_engine_takes(te: str | None, flash: str | None, taken: bool) -> None:
    assert te_takes_flash(te, flash) is taken


def test_an_old_package_is_refused_with_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installed_version", lambda _: "2.8.0")
    with pytest.raises(ModelConfigError, match=r"transformer-engine 2\.8\.0 is here, but .* 2\.9 to 2\.20: pip"):
        load(TRANSFORMER_ENGINE)
