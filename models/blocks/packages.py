"""The optional packages behind the kernels of the image tower: one import each, and what to do where it is missing."""

import importlib
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch

from models.config import ModelConfigError


@dataclass(frozen=True)
class Package:
    """A package that an option of the model asks for."""

    name: str
    """For people."""
    module: str
    """What is imported."""
    option: str
    """The setting that asks for it."""
    install: str
    """The command, or where it comes from."""

    @property
    def is_installed(self) -> bool:
        """Whether it is there at all; nothing is imported."""
        spec = find_spec(self.module.split(".", 1)[0])
        return spec is not None and spec.origin is not None  # flash-attn 4 alone leaves a bare folder `flash_attn`


TRANSFORMER_ENGINE = Package(
    "transformer-engine",
    "transformer_engine.pytorch",
    "model.backend=transformer_engine",
    "pip install --no-build-isolation 'transformer-engine[pytorch,core_cu13]>=2.9,<2.21'",
)
FLASH_2 = Package(
    "flash-attn",
    "flash_attn",
    "model.attention=flash",
    "pip install psutil && pip install --no-build-isolation 'flash-attn>=2.7.3,<=2.8.3'",
)
FLASH_3 = Package(
    "flash-attn 3",
    "flash_attn_interface",
    "model.attention=flash3",
    "a Hopper GPU, and `python setup.py install` in the folder hopper/ of the flash-attention source",
)
APEX = Package(
    "NVIDIA apex",
    "apex.normalization.fused_layer_norm",
    "model.norm_kernel=apex",
    "NVIDIA's source with its CUDA extensions, or an NGC container (the apex of PyPI is another project)",
)


def load(package: Package) -> ModuleType:
    """Import it; ModelConfigError names the package, the option that asked for it and how to install it."""
    try:
        module = importlib.import_module(package.module)
        if module.__file__ is None:
            raise ImportError(f"{package.module} is a folder of another package")
        return module
    except (ImportError, AssertionError, OSError) as error:  # a half-installed Transformer Engine raises the latter two
        why = " ".join(str(error).split())
        raise ModelConfigError(
            f"{package.option} needs {package.name}, which cannot be imported here ({why}); install: {package.install}"
        ) from None


def require_compiler() -> None:
    """Raise ModelConfigError where torch.compile cannot write kernels: Triton's for a GPU, C++ ones for a CPU."""
    given = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    missing = "" if any(shutil.which(name) for name in given) else f"a C++ compiler ({' or '.join(given)})"
    if torch.cuda.is_available() and find_spec("triton") is None:
        missing = "triton (part of torch's CUDA builds)"
    if missing:
        raise ModelConfigError(
            f"model.norm_kernel=compiled needs {missing}, which is not here: install it, or set model.norm_kernel=torch"
        )
