"""Both towers against the authors' code in one process: every block, features, logits, losses, every gradient.

The loss is written out here with torch alone, so that a failure points at the towers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.parallel.mesh import Mesh
from models.clip import LogitScale, embedding
from models.formats.eva_names import from_logical, to_logical
from models.tensors.naming import logical_name, logical_tensors
from models.towers.text import TextTower, trim_padding
from models.towers.vision import VisionTower
from tests.golden import (
    ARCHITECTURES,
    PATCH_DROPOUT_GRADIENTS,
    TOLERANCE,
    deviation,
    deviations,
    load_io,
    load_json,
    load_tensors,
    logical,
    model_of,
    pixels,
)


class Clip(nn.Module):
    """The whole model of a fixture with its weights."""

    def __init__(self, fixture: str, mesh: Mesh, block_kernels: str = "torch"):
        super().__init__()
        self.fixture = fixture
        self.io = load_io(fixture)
        model = replace(model_of(fixture), block_kernels=block_kernels)
        self.vision = VisionTower(model, groups=mesh.vision_groups())
        self.text = TextTower(model, groups=mesh.text_groups())
        self.logit_scale = LogitScale()
        weights = logical(fixture, "weights")
        with torch.no_grad():
            for name, parameter in self.logical_parameters().items():
                parameter.copy_(weights.pop(name))
        assert not weights, f"the model has no place for {sorted(weights)[:5]}"

    def logical_parameters(self) -> dict[str, nn.Parameter]:
        """Logical name -> parameter."""
        vision = logical_tensors(self.vision, "vision", 0, 1)
        named = {vision[local].name: parameter for local, parameter in self.vision.named_parameters()}
        named |= {logical_name(local, "text"): parameter for local, parameter in self.text.named_parameters()}
        return named | {"logit_scale.log_scale": self.logit_scale.log_scale}

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Logical name -> gradient; zeros for what takes no part."""
        named = self.logical_parameters()
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        pairs = zip(named.items(), found, strict=True)
        return {name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in pairs}


@dataclass
class Pass:
    """One forward pass of both towers."""

    clip: Clip
    image_features: Tensor
    text_features: Tensor
    seen: dict[str, Tensor] = field(default_factory=dict)
    """Name in the fixture -> [8, S, H], outputs of modules."""

    def logits(self, scale: Tensor | float) -> Tensor:
        """[8, 8], row image, column text."""
        return scale * embedding(self.image_features) @ embedding(self.text_features).T


def run(clip: Clip, kept: Tensor | None = None) -> Pass:
    """Forward with every block observed."""
    seen: dict[str, Tensor] = {}
    handles = [_observe(clip.vision.embed, "vis.embed", seen)]
    for prefix, tower in (("vis", clip.vision), ("txt", clip.text)):
        handles += [_observe(layer, f"{prefix}.block.{i}", seen) for i, layer in enumerate(tower.block.layers)]
    image_features = clip.vision(pixels(clip.fixture), kept, samples=8)
    text_features = clip.text(clip.io["text"])
    for handle in handles:
        handle.remove()
    return Pass(clip, image_features, text_features, seen)


def _observe(module: nn.Module, name: str, seen: dict[str, Tensor]):
    def keep(_module: nn.Module, _inputs: tuple, output) -> None:
        tokens = output[0] if isinstance(output, tuple) else output
        seen[name] = tokens.detach().reshape(8, -1, tokens.shape[-1])  # packed [T, 1, H] -> [8, S, H]

    return module.register_forward_hook(keep)


def contrastive(logits: Tensor) -> Tensor:
    """Mean cross-entropy over rows and over columns, the diagonal as target, halved sum."""
    diagonal = torch.arange(len(logits))
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


@pytest.fixture(scope="module", params=product(("torch", "fused"), ARCHITECTURES), ids="-".join)
def clip(request: pytest.FixtureRequest, mesh: Mesh) -> Iterator[Clip]:
    kernels, fixture = request.param
    with torch.compiler.set_stance("force_eager"):  # fused kernels as their functions are written
        yield Clip(fixture, mesh, kernels)


@pytest.fixture(scope="module")
def full(clip: Clip) -> Pass:
    return run(clip)


@pytest.fixture(scope="module")
def dropped(clip: Clip) -> Pass:
    return run(clip, clip.io["pd.keep_indices"])


def _read_rows(clip: Clip, name: str, reference: Tensor) -> Tensor:
    """[8, S, H] of the authors -> what this engine computes of it: behind the last block, the pooled rows [8, 1, H]."""
    if name in ("vis.block.3", "vis.norm", "pd.last_block"):
        return reference[:, :1]
    if name in ("txt.block.3", "txt.ln_final"):
        return reference[torch.arange(8), clip.io["eot_index"]].unsqueeze(1)
    return reference


def test_every_block_output(full: Pass) -> None:
    assert len(full.seen) == 1 + 4 + 4
    assert not deviations(full.seen, {name: _read_rows(full.clip, name, full.clip.io[name]) for name in full.seen})


def test_the_last_block_gives_every_row_to_who_asks_for_all(clip: Clip) -> None:
    """As a MIM teacher and student do."""
    tower, images = clip.vision, pixels(clip.fixture)
    with torch.no_grad():
        hidden = tower.run_blocks(tower.embed(images, None), tower._tokens(8, None, images.device))
    assert deviation(hidden.reshape(8, -1, tower.vision.width), clip.io["vis.block.3"]) < TOLERANCE


def test_final_norms(full: Pass) -> None:
    clip = full.clip
    for of, block, name in (("vision.head.norm", "vis", "vis.norm"), ("text.norm", "txt", "txt.ln_final")):
        norm = clip.get_submodule(of)
        reference = _read_rows(clip, name, clip.io[name])
        assert deviation(norm(full.seen[f"{block}.block.3"]), reference) < TOLERANCE


def test_features(full: Pass) -> None:
    for name in ("image_features", "text_features"):
        features = getattr(full, name)
        assert deviation(features, full.clip.io[name]) < TOLERANCE
        assert deviation(embedding(features), full.clip.io[f"{name}_norm"]) < TOLERANCE


def test_trimmed_captions_have_the_same_features(full: Pass) -> None:
    """Behind the longest end-of-text token nothing is computed: what is left out must not matter."""
    ids = full.clip.io["text"]
    shorter = ids[1:][full.clip.io["eot_index"][1:] < 15]
    assert trim_padding(shorter).shape[1] < 16
    rows = [i for i in range(1, 8) if full.clip.io["eot_index"][i] < 15]
    assert deviation(full.clip.text(trim_padding(shorter)), full.clip.io["text_features"][rows]) < TOLERANCE


@pytest.mark.parametrize("scale", ["learned", "fixed"])
def test_logits_and_loss(full: Pass, scale: str) -> None:
    io = full.clip.io
    logits = full.logits(full.clip.logit_scale() if scale == "learned" else 100.0)
    assert deviation(logits, io[f"{scale}.logits_per_image"]) < TOLERANCE
    assert math.isclose(contrastive(logits).item(), io[f"{scale}.loss"].item(), rel_tol=1e-5)


def test_every_gradient(full: Pass) -> None:
    loss = contrastive(full.logits(full.clip.logit_scale()))
    assert not deviations(full.clip.gradients(loss), logical(full.clip.fixture, "grads"))


def test_every_gradient_at_a_fixed_scale(mesh: Mesh) -> None:
    observed = run(Clip("tiny-18b", mesh))
    gradients = observed.clip.gradients(contrastive(observed.logits(100.0)))
    reference = logical("tiny-18b", "grads_fixed_scale")
    assert gradients.pop("logit_scale.log_scale") == reference.pop("logit_scale.log_scale") == 0
    assert not deviations(gradients, reference)


def test_patch_dropout_forward(dropped: Pass) -> None:
    io = dropped.clip.io
    assert deviation(dropped.seen["vis.embed"], io["pd.embed"]) < TOLERANCE
    last = _read_rows(dropped.clip, "pd.last_block", io["pd.last_block"])
    assert deviation(dropped.seen["vis.block.3"], last) < TOLERANCE
    assert deviation(dropped.image_features, io["pd.image_features"]) < TOLERANCE
    assert deviation(embedding(dropped.image_features), io["pd.image_features_norm"]) < TOLERANCE
    logits = dropped.logits(dropped.clip.logit_scale())
    assert deviation(logits, io["pd.learned.logits_per_image"]) < TOLERANCE
    assert math.isclose(contrastive(logits).item(), io["pd.learned.loss"].item(), rel_tol=1e-5)


def test_patch_dropout_gradients(dropped: Pass) -> None:
    clip = dropped.clip
    gradients = clip.gradients(contrastive(dropped.logits(clip.logit_scale())))
    if clip.fixture in PATCH_DROPOUT_GRADIENTS:
        assert not deviations(gradients, logical(clip.fixture, "grads_patch_dropout"))
    theirs = from_logical(gradients, model_of(clip.fixture))
    names = load_json(f"{clip.fixture}/meta.json")["sorted_param_names"]
    norms = torch.stack([theirs[name].norm() for name in names])
    torch.testing.assert_close(norms, clip.io["pd.grad_norms"], rtol=TOLERANCE, atol=0)


def test_the_order_of_kept_patches_does_not_matter(dropped: Pass) -> None:
    """The authors keep patches in the order of their random scores, this engine in grid order."""
    in_grid_order = run(dropped.clip, dropped.clip.io["pd.keep_indices"].sort(dim=1).values)
    assert deviation(in_grid_order.image_features, dropped.clip.io["pd.image_features"]) < TOLERANCE


@pytest.mark.parametrize("fixture", ARCHITECTURES)
def test_no_reference_gradient_is_so_small_that_a_relative_measure_is_noise(fixture: str) -> None:
    """Why the tests above need no absolute floor: the smallest gradient norm stands far above fp32 rounding."""
    gradients = to_logical(load_tensors(f"{fixture}/grads"), model_of(fixture))
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    assert min(float(gradient.norm()) for gradient in gradients.values()) > 1e-4 * largest
