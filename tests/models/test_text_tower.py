"""The caption tower's parts beside CLIP's and SigLIP's: rope, RMSNorm, SwiGLU, no biases; four ways of pooling."""

from dataclasses import replace
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.parallel.mesh import Mesh
from models.blocks.fused.block import FusedBlock
from models.config import ModelConfig, ModelConfigError, TextConfig
from models.formats import layout_of
from models.tensors.init import initialise
from models.tensors.inventory import text_shapes
from models.tensors.naming import logical_tensors
from models.towers.text import TextTower
from tests.golden import deviation
from tools.cost.counts import text_parameters

MODERN = TextConfig(
    context_length=12, vocab_size=50, width=24, depth=2, heads=3, mlp="swiglu", mlp_hidden=40, norm="rms", bias=False,
    rope=True, pos_embed=False, causal=False, pool="mean",
)  # fmt: skip
IDS = torch.tensor([[7, 3, 9, 4, 0, 0], [5, 5, 2, 8, 6, 1]])


def build(
    text: TextConfig, mesh: Mesh, kernels: str = "torch", dtype: torch.dtype = torch.float32
) -> tuple[TextTower, dict[str, Tensor]]:
    """The tower and its weights by logical name."""
    model = ModelConfig(embed_dim=16, text=text, block_kernels=kernels)
    tower = TextTower(model, groups=mesh.text_groups(), dtype=dtype)
    names = logical_tensors(tower, "text", 0, 1)
    initialise(tower, names, model, seed=0, tensor_rank=0, tensor_size=1)
    with torch.no_grad():
        for parameter in tower.parameters():  # gains that differ from 1, no bias of 0
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    weights = {names[local].name: parameter.detach().double() for local, parameter in tower.named_parameters()}
    assert {name: tuple(value.shape) for name, value in weights.items()} == text_shapes(model)
    assert text_parameters(model) == sum(prod(value.shape) for value in weights.values())
    return tower, weights


def turned(x: Tensor) -> Tensor:
    """[M, heads, L, d] by complex numbers: pair m of place p by the angle p / 10000^(2m / d)."""
    length, d = x.shape[-2:]
    angle = torch.arange(length).double()[:, None] / 10000 ** (torch.arange(0, d, 2).double() / d)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def written_out(text: TextConfig, w: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The modern tower in float64, sentence by sentence of its description."""
    norm = lambda x, gain: x / (x.square().mean(-1, keepdim=True) + text.norm_eps).sqrt() * gain  # noqa: E731
    x = w["text.token_embedding"][ids]
    for i in range(text.depth):
        b = {name.removeprefix(f"text.blocks.{i}."): value for name, value in w.items()}
        mixed = (norm(x, b["norm1.weight"]) @ b["attn.qkv.weight"].T).unflatten(-1, (text.heads, 3, -1))
        q, k, v = mixed.permute(3, 0, 2, 1, 4)
        answer = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=text.causal)
        x = x + answer.transpose(1, 2).flatten(2) @ b["attn.proj.weight"].T
        y = norm(x, b["norm2.weight"])
        x = x + (F.silu(y @ b["mlp.gate.weight"].T) * (y @ b["mlp.up.weight"].T)) @ b["mlp.down.weight"].T
    x = norm(x, w["text.norm.weight"])
    if text.pool == "mean":
        said = (ids != text.pad_id).unsqueeze(-1)
        x = (x * said).sum(1) / said.sum(1)
    else:
        x = x[torch.arange(len(ids)), {"first": 0, "last": -1, "end": ids.argmax(-1)}[text.pool]]
    return x @ w["text.projection.weight"].T


CLIP = TextConfig(context_length=12, vocab_size=50, width=24, depth=3, heads=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "text",
    [CLIP, replace(CLIP, mlp="quick_gelu"), replace(CLIP, mlp="gelu_tanh", causal=False, pool="last"), MODERN],
    ids=["clip", "openai", "siglip", "modern"],
)
def test_fused_blocks_have_the_same_features_and_gradients(text: TextConfig, dtype: torch.dtype, mesh: Mesh) -> None:
    found = []
    for kernels in ("torch", "fused"):
        tower, _ = build(text, mesh, kernels, dtype)
        assert isinstance(tower.block.layers[0], FusedBlock) == (kernels == "fused")
        with torch.compiler.set_stance("force_eager"):
            features = tower(IDS)
            features.backward(torch.linspace(-1, 1, features.numel()).view_as(features).to(dtype))
        gradients = {name: parameter.grad for name, parameter in tower.named_parameters()}
        found.append({"features": features, **gradients})
    limit = 1e-5 if dtype == torch.float32 else 5e-2  # as many roundings to 8 bits as operators
    plain, fused = found
    assert plain.keys() == fused.keys()
    for name, value in plain.items():
        other = fused[name]
        assert value is not None and other is not None and deviation(other.double(), value.double()) < limit, name


@pytest.mark.parametrize("pool", ["mean", "first", "last", "end"])
def test_the_modern_tower_is_what_it_says(pool: str, mesh: Mesh) -> None:
    text = replace(MODERN, pool=pool, causal=pool == "end")
    tower, weights = build(text, mesh)
    features = tower(IDS)
    assert deviation(features.double(), written_out(text, weights, IDS)) < 1e-5
    features.square().sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())


def test_padding_changes_a_mean_by_what_is_seen_of_it_alone(mesh: Mesh) -> None:
    """A causal tower does not see it."""
    tower, _ = build(replace(MODERN, causal=True), mesh)
    padded = F.pad(IDS, (0, 4))
    with torch.no_grad():
        torch.testing.assert_close(tower(padded), tower(IDS))
        assert tower.trimmed(padded) is padded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 1025}, "context_length is 1025: .* at most 1,024"),
        ({"pool": "first", "causal": True}, "pool=first reads a token that has seen itself only"),
        ({"pool": "eos"}, "choose one of end, last, first, mean"),
        ({"rope": False}, "pos_embed=false needs model.text.rope"),
        ({"norm": "batch"}, "choose one of layer, rms"),
        ({"width": 9, "heads": 3}, "turns pairs of channels"),
    ],
)
def test_towers_that_cannot_be_built(changes: dict, message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        ModelConfig(embed_dim=16, text=replace(MODERN, **changes)).check()


def test_no_other_layout_names_its_parts() -> None:
    with pytest.raises(ModelConfigError, match=r"text\.norm=rms, text\.bias=False, text\.rope=True.*take --to tower"):
        layout_of("openclip", ModelConfig(text=MODERN))
