"""Checks of a config against the ranks and the tokenizer of a job: no process group."""

from data.errors import DataError
from data.tokenizer import VOCAB_SIZE
from data.vocabulary.files import make_tokenizer
from engine.config.errors import ConfigError, require
from engine.config.schema import Config
from engine.objectives.registry import objective_of
from models.config import TextConfig


def check_layout(config: Config, world_size: int) -> int:
    """DP for this number of ranks, or ConfigError with every factor. Pure arithmetic: dry runs call it too."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    replica = tensor * pipeline
    require(
        world_size % replica == 0,
        f"{world_size} ranks cannot be cut into replicas of parallel.tensor {tensor} x parallel.pipeline {pipeline} = "
        f"{replica} ranks: start a multiple of {replica} ranks",
    )
    data = world_size // replica
    batch, micro, frames = config.train.global_batch_size, config.micro_batch_samples, config.data.frames
    per_micro = f"train.micro_batch_size {micro * frames}" + (f" / data.frames {frames}" if frames > 1 else "")
    require(
        batch % (data * micro) == 0,
        f"train.global_batch_size {batch} is not a multiple of DP {data} x {per_micro} = "
        f"{data * micro} (TP {tensor} x PP {pipeline} x DP {data} = {world_size} ranks)",
    )
    keep, local = config.train.keep_activations, batch // (data * micro)
    require(
        batch >= world_size or not objective_of(config).reads_captions,
        f"train.global_batch_size {batch} is smaller than the {world_size} ranks: each encodes captions of its own",
    )
    group, shard, together = config.parallel.round_size, config.parallel.shard, config.parallel.shard_ranks
    require(
        group is None or group <= local, f"parallel.round_size {group} exceeds the {local} micro-batches of a replica"
    )
    require(
        shard == "optimizer" or group in (None, local),
        f"parallel.round_size {group} with parallel.shard={shard} would gather and reduce every chunk once a round: "
        f"leave it out (all {local} micro-batches of a replica)",
    )
    require(
        together is None or data % together == 0,
        f"parallel.shard_ranks {together} does not divide DP {data} (TP {tensor} x PP {pipeline} x DP {data} = "
        f"{world_size} ranks)",
    )
    require(
        config.parallel.virtual == 1 or group is not None or shard != "optimizer" or local % pipeline == 0,
        f"parallel.virtual {config.parallel.virtual} works groups of parallel.pipeline {pipeline} micro-batches, but a "
        f"replica has {local}: change train.micro_batch_size or set parallel.virtual=1",
    )
    require(
        keep <= local, f"train.keep_activations {keep} exceeds the {local} micro-batches of a replica (-1 keeps all)"
    )
    require(
        keep < local or not config.train.offload_stash,
        f"train.offload_stash has nothing to move with train.keep_activations {keep}, all {local} micro-batches of a "
        "replica: lower it",
    )
    repeats = keep < local or config.train.recompute == "full"
    asked = config.train.asked_outputs
    require(
        repeats or not asked,
        f"{asked} has nothing to keep with train.keep_activations {keep}, all {local} micro-batches of a "
        "replica: lower it",
    )
    return data


def check_vocabulary(config: Config) -> None:
    """The tokenizer's ids must fit the token table, and the end-of-text id must be the highest (pooling); of teachers
    that read captions, too.

    Reads the file of data.tokenizer.
    """
    if not objective_of(config).reads_captions:
        return
    models = {f"train.distill[{number}].model": one.model for number, one in enumerate(config.train.distill)}
    for key, model in ({"model": config.model} | models).items():
        assert model is not None, "the config was not resolved"
        if config.data.tokenizer != "clip":
            _check_own_vocabulary(config, model.text, f"{key}.text")
            continue
        size = model.text.vocab_size
        require(
            size == VOCAB_SIZE,
            f"{key}.text.vocab_size is {size}, but the tokenizer of captions has {VOCAB_SIZE} ids: set it to "
            f"{VOCAB_SIZE}, or name the model's own tokenizer in data.tokenizer",
        )


def _check_own_vocabulary(config: Config, text: TextConfig, key: str) -> None:
    name = config.data.tokenizer
    try:
        tokenizer = make_tokenizer(name, config.data.cleaning, text.context_length)
    except DataError as error:
        raise ConfigError(str(error)) from None
    require(
        tokenizer.size <= text.vocab_size,
        f"data.tokenizer {name} has {tokenizer.size} ids, but {key}.vocab_size is {text.vocab_size}: set it to "
        f"{tokenizer.size}, or more",
    )
    require(
        text.pool != "end" or tokenizer.end_id == tokenizer.size - 1,
        f"{key}.pool=end reads the highest id of a caption, which is not the end ({tokenizer.end_id} of "
        f"{tokenizer.size}) in {name}: set {key}.pool=last or mean",
    )
    require(
        text.pool != "mean" or tokenizer.pad_id == text.pad_id,
        f"{key}.pool=mean leaves out id {text.pad_id}, but {name} pads with {tokenizer.pad_id}: set "
        f"{key}.pad_id={tokenizer.pad_id}",
    )
