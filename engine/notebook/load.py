"""`load_model`: a checkpoint of any layout, a run folder or a preset as one nn.Module, without a process group."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engine.build import DTYPES
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.folders import resolve_checkpoint
from engine.checkpoint.format.manifest import AVERAGE, WEIGHT
from engine.checkpoint.reader import Checkpoint
from engine.config.read import Config, ConfigError, resolve
from engine.evaluation.embedder import Encoders, build_encoders, inference_config, load_encoders
from engine.evaluation.vocabulary import remark_on
from engine.notebook.alone import lone_mesh
from engine.notebook.model import ClipModel
from engine.notebook.pictures import Pictures
from engine.parallel.device import prepare
from engine.parallel.mesh import Mesh
from models.tensors.init import initialise
from models.tensors.inventory import MIM_TENSORS
from models.tensors.naming import logical_tensors

_LOG_SCALE, _BIAS = "logit_scale.log_scale", "logit_bias.bias"
_PRECISIONS = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()} | {n: n for n in DTYPES}


def load_model(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "fp32",
    image_size: int | None = None,
    transform: str = "squash",
    ema: bool = False,
    verify: bool = True,
    seed: int = 0,
) -> ClipModel:
    """A model on one device, from a checkpoint at whatever layout it was saved, a run folder (its latest), or a preset.

    Args:
        source: the folder; or a preset, a public name of one, or a FILE.yaml: random weights, with a warning.
        device: where it computes; by default the current CUDA device if there is one, else the CPU.
        dtype: of weights and products, fp32 or bf16; embeddings are always float32.
        image_size: pixels a side where it is not the model's own; positions are interpolated.
        transform: squash (as tools.embed) or crop, what becomes of pictures that are not square.
        ema: the averaged weights of the checkpoint (optim.ema_decay).
        verify: check the hashes of the checkpoint's files, which reads them twice.
        seed: of random weights.

    Raises:
        CheckpointError, ConfigError: one line that says what does not fit.
    """
    place = _place(device)
    overrides = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false"]
    overrides += [f"train.precision={_precision(dtype)}"]
    overrides += [] if image_size is None else [f"model.vision.image_size={image_size}"]
    with _undisturbed(place):
        mesh = lone_mesh()
        if Path(source).is_dir():
            model = _of_checkpoint(Path(source), overrides, mesh, place, transform, ema=ema, verify=verify)
        else:
            model = _of_preset(str(source), overrides, mesh, place, transform, seed)
    if model.text is not None and (remark := remark_on(model.config.text)):
        warnings.warn(remark, stacklevel=2)
    return model.to(place).eval()


def _of_checkpoint(
    folder: Path, overrides: list[str], mesh: Mesh, device: torch.device, transform: str, *, ema: bool, verify: bool
) -> ClipModel:
    checkpoint = Checkpoint(resolve_checkpoint(folder))
    try:
        kind, shapes = AVERAGE if ema else WEIGHT, checkpoint.shapes()
        if MIM_TENSORS[0] in shapes:
            raise CheckpointError(
                f"{checkpoint.folder} is the student of a MIM stage, which has no embeddings: a CLIP starts from it as "
                "init.vision"
            )
        if verify:
            checkpoint.verify()
        config = inference_config(checkpoint.manifest, overrides, 1, 1)
        has = {tower: any(name.startswith(f"{tower}.") for name in shapes) for tower in ("vision", "text")}
        encoders, remarks = load_encoders(
            checkpoint, config, mesh, device, images=has["vision"], texts=has["text"], kind=kind
        )
        for remark in remarks:
            warnings.warn(remark, stacklevel=3)
        train = checkpoint.manifest.config["train"]
        scale = checkpoint.read_whole(_LOG_SCALE, kind).exp() if _LOG_SCALE in shapes else train["logit_scale"]
        bias = float(checkpoint.read_whole(_BIAS, kind)) if _BIAS in shapes else None
        return _clip(config, encoders, transform, scale, bias, str(checkpoint.folder))
    finally:
        checkpoint.close()


def _of_preset(
    name: str, overrides: list[str], mesh: Mesh, device: torch.device, transform: str, seed: int
) -> ClipModel:
    try:
        config = resolve({"model": name, "data": {"shards": ["-"]}}, overrides, source="load_model")
    except ConfigError as error:
        if "is not a preset" not in str(error):
            raise
        fix = ": weights of others become a checkpoint with python -m tools.convert" if Path(name).is_file() else ""
        raise ConfigError(f"{name} is neither a folder with a checkpoint nor a model{fix}; {error}") from None
    encoders = build_encoders(config, mesh, device)
    for module, tower in ((encoders.vision[0], "vision"), (encoders.text, "text")):
        assert module is not None
        initialise(module, logical_tensors(module, tower, 0, 1), config.model, seed, 0, 1)
    warnings.warn(
        f"{name} is a model without weights: they are random (seed {seed}); load_model(FOLDER) reads a checkpoint",
        stacklevel=3,
    )
    return _clip(config, encoders, transform, config.train.logit_scale, None, f"{name}, random weights")


def _clip(config: Config, encoders: Encoders, transform: str, scale: Any, bias: float | None, source: str) -> ClipModel:
    vision = config.model.vision
    pictures = Pictures(
        size=vision.image_size, pixel_norm=vision.pixel_norm, transform=transform, max_pixels=config.data.max_pixels
    )
    return ClipModel(
        config.model,
        encoders.vision[0] if encoders.vision else None,
        encoders.text,
        pictures=pictures,
        logit_scale=100.0 if scale is None else float(scale),
        logit_bias=bias,
        source=source,
    )


def _place(device: str | torch.device | None) -> torch.device:
    try:
        place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(1, device=place)
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return place


def _precision(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in _PRECISIONS:
        raise ConfigError(f"dtype {dtype} is not one of {', '.join(DTYPES)} (float32, bfloat16)")
    return _PRECISIONS[name]


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Leave the random generators and the current CUDA device of the process as they are."""
    gpus = [] if not torch.cuda.is_available() else [device.index or 0] if device.type == "cuda" else [0]
    before = torch.cuda.current_device() if gpus else None
    with torch.random.fork_rng(devices=gpus):
        try:
            prepare()
            if gpus:
                torch.cuda.set_device(gpus[0])
            yield
        finally:
            if before is not None:
                torch.cuda.set_device(before)
