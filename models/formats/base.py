"""What a layout is: how it names, cuts and turns the authors' tensors; and the table of a whole model in it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from models.config import ModelConfig
from models.formats.eva_names import LayoutMismatch, authors_name, from_logical, to_logical
from models.tensors.inventory import MIM_TENSORS, Shapes, clip_shapes, mim_shapes, vision_shapes

ANCHOR = "visual.patch_embed.proj.weight"
"""The authors' name of a tensor that every image tower has."""


class Layout(ABC):
    """A way to lay out the authors' tensors in a file. Pure functions; shapes of any dtype and device."""

    name: str
    """For people."""

    @abstractmethod
    def names(self, eva: str) -> tuple[str, ...]:
        """The names of the tensors that hold the authors' tensor `eva`."""

    def split(self, eva: str, value: Tensor) -> tuple[Tensor, ...]:
        """The authors' tensor as this layout's tensors, in the order of `names`."""
        return (value,)

    def join(self, eva: str, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        return parts[0]

    def normalised(self, name: str) -> str:
        """The layout's own name of a tensor that a file may hold under a variant of it; wrappers' prefixes are gone."""
        return name

    @abstractmethod
    def is_derived(self, name: str) -> bool:
        """Whether a tensor of a file is computed from the config (rope tables, position ids) and is left out."""

    def why_left_out(self, name: str) -> str:
        """What to say of a derived tensor."""
        return "computed from the config"

    def has_place(self, eva: str) -> bool:
        """Whether the layout has a tensor for the authors' tensor `eva`; an image tower's has none for captions."""
        return True

    def derived(self, model: ModelConfig) -> dict[str, Tensor]:
        """The derived tensors that a file of this layout holds beside the learned ones, fp32."""
        return {}


class StateKind(Enum):
    """What a file holds, seen from its names."""

    CLIP = "both towers"
    VISION = "an image tower"
    MIM = "an image tower pretrained by masked image modelling"


@dataclass(frozen=True)
class Entry:
    """One logical tensor and the tensors that hold it in a layout."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout
    model: ModelConfig

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        """This layout's tensors -> the logical tensor, contiguous."""
        eva = authors_name(self.ours)
        return to_logical({eva: self.layout.join(eva, parts)}, self.model)[self.ours]

    def to_theirs(self, value: Tensor) -> tuple[Tensor, ...]:
        """The logical tensor -> this layout's tensors, contiguous."""
        eva = authors_name(self.ours)
        value = from_logical({self.ours: value}, self.model)[eva]
        return tuple(part.contiguous() for part in self.layout.split(eva, value))

    def their_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes in the layout of a logical tensor of `shape`."""
        parts = self.to_theirs(torch.empty(shape, device="meta"))
        return {name: tuple(part.shape) for name, part in zip(self.theirs, parts, strict=True)}


def entries(layout: Layout, model: ModelConfig, shapes: Shapes) -> list[Entry]:
    """The table of the logical tensors in `shapes`."""
    return [Entry(ours, layout.names(authors_name(ours)), layout, model) for ours in shapes]


def state_kind(names: Sequence[str], layout: Layout) -> StateKind:
    """What a file with these names holds. Raises LayoutMismatch when no image tower is in it."""
    present = set(names)
    if not present.issuperset(layout.names(ANCHOR)):
        raise LayoutMismatch(f"no {layout.names(ANCHOR)[0]} in it: no image tower in the {layout.name}")
    if present & set(layout.names("text.positional_embedding")):
        return StateKind.CLIP
    mim = {name for ours in MIM_TENSORS for name in layout.names(authors_name(ours))}
    return StateKind.MIM if present & mim else StateKind.VISION


def expected_shapes(kind: StateKind, names: Sequence[str], layout: Layout, model: ModelConfig, target: int) -> Shapes:
    """Logical tensors that a file of this kind must hold, all of them; target: width of a MIM head, 0 if unknown.

    A file with both towers may lack the logit scale (a fixed temperature is none). A file with one tower may lack its
    head (the MIM students do), a MIM file its mask token or its prediction head.
    """
    if kind is StateKind.CLIP:
        shapes = clip_shapes(model)
        if not set(names) & set(layout.names("logit_scale")):
            del shapes["logit_scale.log_scale"]  # a run with a fixed temperature has none
        if set(names) & set(layout.names("logit_bias")):
            shapes["logit_bias.bias"] = (1,)
        return shapes
    present = set(names)
    has_head = present.issuperset(
        layout.names("visual.head.weight" if model.vision.projection else "visual.pool.probe")
    )
    shapes = vision_shapes(model, head=has_head)
    mim = {
        ours: shape
        for ours, shape in mim_shapes(model, target).items()
        if present & set(layout.names(authors_name(ours)))
    }
    return shapes | mim
