"""Over the border of two phases: the first state of a phase from the last one of the phase before (docs/phases.md).

Weights and their average go on; where the resolution changes, the position table is interpolated (bicubic), in the
average, too. Moments go on or start at 0 as the phase says; those of an interpolated table always start at 0, because
an interpolated second moment can be negative.
"""

from engine.build import Towers
from engine.checkpoint.format.manifest import AVERAGE, WEIGHT, Position
from engine.checkpoint.format.matching import match
from engine.checkpoint.initial import Resized
from engine.checkpoint.load import fill, fill_moments, model_shapes, publish, same_run, training_position, updates_of
from engine.checkpoint.reader import Checkpoint
from engine.config.read import Config
from engine.config.sections.freeze import frozen_of
from engine.optim.average import restart_average
from engine.optim.optimizer import ShardedOptimizer
from engine.parallel.mesh import Mesh


def cross_border(
    checkpoint: Checkpoint,
    towers: Towers,
    optimizer: ShardedOptimizer,
    config: Config,
    mesh: Mesh,
    *,
    reset_optimizer: bool,
) -> tuple[Position, list[str]]:
    """Fill a phase that begins, or goes back to its beginning; returns the position and what was done, for people.

    Collective over the mesh. Raises CheckpointError: weights only, another model or seed, tensors that do not fit (the
    checkpoint's exceptions aside).
    """
    position = training_position(checkpoint)
    same_run(checkpoint, config, any_resolution=True)
    source = Resized(checkpoint, config.model, None, resize_patch=False)
    chosen = match(source.shapes(), model_shapes(towers, mesh), checkpoint.exceptions, str(checkpoint.folder))
    names, stored = set(chosen.load), checkpoint.shapes()
    fill(optimizer, mesh, names, lambda name, where, kind: source.read(name, where), (WEIGHT,))
    lines = [*chosen.lines(), *source.remarks]
    optimizer.reset_moments()  # a rewind finds those of the steps that it takes back
    optimizer.update_count = 0 if reset_optimizer else updates_of(position)
    if reset_optimizer:
        lines.append("moments start at 0")
        position.began = {}
        optimizer.began({})
    else:
        same_shape = {name for name in names if stored[name] == source.shapes()[name]}
        position.began, unfrozen = fill_moments(optimizer, mesh, same_shape, checkpoint, config)
        lines += [f"moments of {name} start at 0" for name in sorted(names - same_shape)]
        lines += [f"{len(unfrozen)} tensors are trained from here on, their moments start at 0"] if unfrozen else []
    frozen = frozen_of(config).names
    lines += [f"{len(frozen)} tensors are frozen"] if frozen else []
    publish(optimizer, towers)
    restart_average(optimizer)
    if optimizer.optim.ema_decay and checkpoint.manifest.shapes(AVERAGE):
        averages = Resized(checkpoint.kind(AVERAGE), config.model, None, resize_patch=False)
        fill(optimizer, mesh, names, lambda name, where, kind: averages.read(name, where), (AVERAGE,))
    return position, lines
