"""The kernels that the config's choices come to, and whether what a job asks for can be imported."""

from collections.abc import Callable

import torch

from data.errors import DataError
from data.pixels.decode import make_decoder
from engine.build import DTYPES
from engine.config.read import Config
from models.blocks.kernels import choose, require_kernels
from models.config import ModelConfig, ModelConfigError
from tools.doctor.rows import WRONG, Row

_KERNELS = "kernels of the image tower: "


def kernel_rows(model: ModelConfig) -> list[Row]:
    """What `model` would compute with, in the two precisions."""
    rows = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rows.append(Row(f"kernels in {name}", str(choose(model, dtype)).removeprefix(_KERNELS)))
    return rows


def job_rows(config: Config) -> list[Row]:
    """Whether what a job asks for can be imported here: the kernels of its model, its decoder."""
    asked: list[tuple[str, Callable[[], str]]] = [
        ("the job's kernels", lambda: str(require_kernels(config.model, DTYPES[config.train.precision]))),
        ("the job's decoder", lambda: type(make_decoder(config.data.decoder, max_pixels=1)).__name__),
    ]
    rows = []
    for what, load in asked:
        try:
            rows.append(Row(what, load().removeprefix(_KERNELS)))
        except (ModelConfigError, DataError) as error:
            rows.append(Row(what, str(error), WRONG))
    return rows
