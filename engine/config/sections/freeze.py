"""What train.freeze means for a job: which tensors are not trained, and where in the towers training begins.

Everything that asks goes through `frozen_of`: the engine, the program of the step, checkpoints, the planner.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.config.errors import require
from models.config import ModelConfig
from models.tensors.freezing import frozen_names, idle_pattern, lowest_trained, nearest
from models.tensors.inventory import text_shapes, vision_shapes

if TYPE_CHECKING:
    from engine.config.schema import Config

_SCALE, _BIAS = "logit_scale.log_scale", "logit_bias.bias"


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """What of a job's model is not trained. Places of a tower are those of models/tensors/freezing.py, `layer_of`."""

    names: frozenset[str]
    """Logical tensors."""
    vision: int
    """Lowest place of the image tower that is trained, its depth + 2 where none is."""
    text: int
    """The same of the caption tower."""
    vision_depth: int
    text_depth: int

    @property
    def locks_vision(self) -> bool:
        """Whether nothing of the image tower is trained."""
        return self.vision > self.vision_depth + 1

    @property
    def locks_text(self) -> bool:
        """Whether nothing of the caption tower is trained."""
        return self.text > self.text_depth + 1

    @property
    def text_blocks_below(self) -> int:
        """Blocks of the caption tower that its replay leaves out."""
        return 0 if self.locks_text else blocks_below(self.text, range(self.text_depth))

    def vision_blocks_below(self, layers: range) -> int:
        """The same of a chunk of the image tower that holds `layers`."""
        return 0 if self.locks_vision else blocks_below(self.vision, layers)

    def first_chunk(self, chunks: Sequence[range]) -> int:
        """Number in tower order of the first chunk of the image tower with something to train; as many as there are
        chunks where none has.
        """
        if self.locks_vision:
            return len(chunks)
        if self.vision == 0:
            return 0
        return next((i for i, layers in enumerate(chunks) if self.vision - 1 in layers), len(chunks) - 1)


def blocks_below(lowest: int, layers: range) -> int:
    """Blocks of `layers` below the lowest place that is trained; the embedding alone is not worth a stash, so 0 there.

    It is run again: it costs less than a hundredth of a block, and its output would have to wait for every micro-batch.
    """
    return len(range(layers.start, min(lowest - 1, layers.stop)))


def frozen_of(config: "Config") -> Frozen:
    """What train.freeze says of this config's model. Without it nothing is looked for."""
    model, patterns = config.model, config.train.freeze
    names = trainable_names(config) if patterns else []
    return frozen_parts(model, frozen_names(patterns, names), names)


def frozen_parts(model: ModelConfig, frozen: frozenset[str], names: Sequence[str]) -> Frozen:
    """The same from the frozen ones among the names of a model; none frozen needs no names."""
    depths = {"vision": model.vision.depth, "text": model.text.depth}
    trained = [name for name in names if name not in frozen]
    vision, text = (lowest_trained(tower, depth, trained) if frozen else 0 for tower, depth in depths.items())
    return Frozen(names=frozen, vision=vision, text=text, vision_depth=depths["vision"], text_depth=depths["text"])


def trainable_names(config: "Config") -> list[str]:
    """Every parameter of a contrastive job's model, as checkpoints name it."""
    names = [*vision_shapes(config.model), *text_shapes(config.model)]
    return [
        *names,
        *([_SCALE] if config.train.logit_scale is None else []),
        *([_BIAS] if config.train.loss == "sigmoid" else []),
    ]


def check_freeze(config: "Config") -> None:
    """Raise ConfigError for patterns that match nothing or everything, and for settings that freezing leaves idle."""
    patterns = config.train.freeze
    if not patterns:
        return
    names = trainable_names(config)
    idle = idle_pattern(patterns, names)
    near = nearest(idle, names) if idle is not None else []
    require(
        idle is None,
        f"train.freeze: {idle} matches no parameter of this model (or its range reaches past the last block); "
        + (f"nearest: {', '.join(near)}" if near else "names are those of python -m tools.inspect on a checkpoint"),
    )
    frozen = frozen_of(config)
    require(
        len(frozen.names) < len(names), f"train.freeze {patterns} freezes every parameter: nothing is left to train"
    )
    require(
        not (frozen.locks_vision and config.train.offload_stash),
        "train.offload_stash has nothing to move with a locked image tower (train.freeze): no micro-batch is replayed, "
        "remove it",
    )
