"""Which kernels a dry run has. No torch: a config is refused at once."""

from engine.config.read import Config, ConfigError
from models.config import ModelConfig

_COUNTED = {
    "backend": ("local", "auto"),
    "attention": ("sdpa", "auto"),
    "norm_kernel": ("torch", "auto"),
    "block_kernels": ("torch", "auto", "fused"),
    "fp8": ("none",),
}
"""Setting of a model -> values that run here."""


def models_of(config: Config) -> dict[str, ModelConfig]:
    """Key of the config -> model that its job runs."""
    teacher = config.mim.teacher_model
    found = {"model": config.model} | ({} if teacher is None else {"mim.teacher_model": teacher})
    taught = {f"train.distill[{number}].model": one.model for number, one in enumerate(config.train.distill)}
    return found | {key: model for key, model in taught.items() if model is not None}


def check_countable(config: Config) -> None:
    """Raise ConfigError for what is not run here, so that no number is given for something else."""
    for name, model in models_of(config).items():
        for key, counted in _COUNTED.items():
            value = getattr(model, key)
            if value not in counted:
                raise ConfigError(
                    f"{name}.{key}={value} is a kernel that does not run here; the dry run counts torch's: add "
                    f"{name}.{key}={counted[0]} (the products, their FLOPs and the traffic are the same)"
                )
