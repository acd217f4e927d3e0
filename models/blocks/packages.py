"""The optional packages behind the kernels of the image tower: one import each, and what to do where it is missing."""

import importlib
import inspect
import os
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from packaging.version import InvalidVersion, Version

from models import versions
from models.config import ModelConfigError
from models.versions import Supported, installed_version


@dataclass(frozen=True)
class Package:
    """A package that an option of the model asks for."""

    name: str
    """For people, and for its metadata where it has a distribution."""
    module: str
    """What is imported."""
    option: str
    """The setting that asks for it."""
    install: str
    """The command, or where it comes from."""
    supported: Supported | None = None
    """The range of versions, where the package has releases that tell."""
    takes: tuple[str, str] | None = None
    """A function and an argument of it that older files of the same names lack, where another package brings such."""

    @property
    def is_installed(self) -> bool:
        """Whether it is there at all; nothing is imported."""
        top, *below = self.module.split(".")
        spec = find_spec(top)
        if spec is None:
            return False
        if not below:
            return spec.origin is not None  # flash-attn 4 alone leaves a bare folder `flash_attn`
        if self.takes and spec.origin is not None and self.version is None:
            return False  # the files are those that the other package brings along
        places = [Path(folder, *below) for folder in spec.submodule_search_locations or []]
        return any(place.is_dir() or place.with_suffix(".py").is_file() for place in places)

    @property
    def version(self) -> str | None:
        """Version by its metadata; None where there is none."""
        return installed_version(self.name)


TRANSFORMER_ENGINE = Package(
    "transformer-engine",
    "transformer_engine.pytorch",
    "model.backend=transformer_engine",
    versions.TRANSFORMER_ENGINE.cure,
    versions.TRANSFORMER_ENGINE,
)
FLASH_2 = Package(
    "flash-attn",
    "flash_attn",
    "model.attention=flash",
    versions.FLASH_ATTN_2.cure,
    versions.FLASH_ATTN_2,
)
FLASH_3 = Package(
    "flash-attn-3",
    "flash_attn_interface",
    "model.attention=flash3",
    versions.FLASH_ATTN_3.cure,
    versions.FLASH_ATTN_3,
)
FLASH_4 = Package(
    "flash-attn-4",
    "flash_attn.cute",
    "model.attention=flash4",
    versions.FLASH_ATTN_4.cure,
    versions.FLASH_ATTN_4,
    ("flash_attn_varlen_func", "max_seqlen_q"),  # flash-attn 2.8.3 has an early flash_attn/cute without it
)
APEX = Package(
    "NVIDIA apex",
    "apex.normalization.fused_layer_norm",
    "model.norm_kernel=apex",
    "NVIDIA's source with its CUDA extensions, or an NGC container (the apex of PyPI is another project)",
)


def load(package: Package) -> ModuleType:
    """Import it; ModelConfigError names the package, the option that asked for it and how to install it.

    A version below the range is an error as well; one above it is told on standard error.
    """
    _check_version(package)
    try:
        module = importlib.import_module(package.module)
        if module.__file__ is None:
            raise ImportError(f"{package.module} is a folder of another package")
        if package.takes:
            _check_arguments(module, *package.takes)
        return module
    except (ImportError, AssertionError, OSError) as error:  # a half-installed Transformer Engine raises the latter two
        why = " ".join(str(error).split())
        raise ModelConfigError(
            f"{package.option} needs {package.name}, which cannot be imported here ({why}); install: {package.install}"
        ) from None


def _check_arguments(module: ModuleType, function: str, argument: str) -> None:
    if argument not in inspect.signature(getattr(module, function, lambda: None)).parameters:
        raise ImportError(
            f"{function} of {module.__file__} has no {argument}: these are older files, which another package brought "
            "or wrote over the newer ones; pip install --force-reinstall --no-deps puts those back"
        )


def _check_version(package: Package) -> None:
    if package.supported is None:
        return
    if refusal := package.supported.refusal(package.version):
        raise ModelConfigError(f"{package.option}: {refusal}")
    if (warning := package.supported.warning(package.version)) and os.environ.get("RANK", "0") == "0":
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def flash_2_serves_te() -> bool:
    """Whether Transformer Engine attends through the flash-attn 2 that is installed.

    Before 2.19 it takes `<= 2.8.3`, which the post-releases of 2.8.3 are not; 2.19 and later take `< 2.8.4`
    (max_version in its attention/dot_product_attention/utils.py).
    """
    return FLASH_2.is_installed and te_takes_flash(TRANSFORMER_ENGINE.version, FLASH_2.version)


def te_takes_flash(te: str | None, flash: str | None) -> bool:
    """Whether the two versions go together; True where one has no metadata."""
    try:
        engine, kernel = Version(te or "2.20"), Version(flash or "2.8.3")
    except InvalidVersion:
        return True
    return kernel < Version("2.8.4") if engine.release[:2] >= (2, 19) else kernel <= Version("2.8.3")


def require_compiler(option: str) -> None:
    """Raise ModelConfigError where torch.compile cannot write kernels: Triton's for a GPU, C++ ones for a CPU.

    option: what asks for them, "model.key=value"; `torch` is the value that does not.
    """
    given = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    missing = "" if any(shutil.which(name) for name in given) else f"a C++ compiler ({' or '.join(given)})"
    if torch.cuda.is_available() and find_spec("triton") is None:
        missing = "triton (part of torch's CUDA builds)"
    if missing:
        raise ModelConfigError(
            f"{option} needs {missing}, which is not here: install it, or set {option.partition('=')[0]}=torch"
        )
