"""The versions that this code was written for, and the one line that any other version gets.

An older one is refused, because it lacks what is called here. A newer one is used after a line on standard error: it
may work, and nobody has seen it. docs/results/install.md says what was run with what.

This file and engine/__init__.py are read by Pythons below the range as well, which are to get as far as their line:
hence the annotations that nobody evaluates, and nothing of a later Python at import.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Supported:
    """A range of versions, both ends included, compared by as many numbers as the bound has."""

    name: str
    """Distribution, as pip knows it."""
    oldest: str
    newest: str
    cure: str
    """The command that leads into the range."""

    @property
    def text(self) -> str:
        """The range for people: torch 2.11 to 2.15."""
        return f"{self.name} {self.oldest} to {self.newest}"

    def refusal(self, found: str | None) -> str:
        """The line for a version below the range; empty for all others and where nothing is known (None)."""
        return f"{self._told(found)}: {self.cure}" if found and _numbers(found) < _numbers(self.oldest) else ""

    def warning(self, found: str | None) -> str:
        """The line for a version above the range; empty for all others."""
        bound = _numbers(self.newest)
        if not found or _numbers(found)[: len(bound)] <= bound:
            return ""
        return f"{self._told(found)}, newer than anything this was run with; should it fail: {self.cure}"

    def _told(self, found: str | None) -> str:
        return f"{self.name} {found} is here, but eva-megatron is for {self.text}"


PYTHON = Supported("Python", "3.11", "3.13", "make the environment with python3.12 -m venv")
TORCH = Supported("torch", "2.11", "2.15", "pip install 'torch>=2.11,<2.16'")
NUMPY = Supported("numpy", "1.26", "2", "pip install 'numpy>=1.26,<3'")
PILLOW = Supported("pillow", "11", "13", "pip install 'pillow>=11,<14'")
MEGATRON_CORE = Supported("megatron-core", "0.16.1", "0.19", "pip install --no-deps 'megatron-core>=0.16.1,<0.20'")
TRANSFORMER_ENGINE = Supported(
    "transformer-engine",
    "2.9",
    "2.20",
    "pip install --no-build-isolation 'transformer-engine[pytorch,core_cu13]>=2.9,<2.21'",
)
FLASH_ATTN_2 = Supported(
    "flash-attn",
    "2.7.3",
    "2.8",
    "pip install psutil && pip install --no-build-isolation 'flash-attn>=2.7.3,<2.9'",
)
FLASH_ATTN_3 = Supported(
    "flash-attn-3",
    "3.0",
    "3.0",
    "a Hopper GPU, and `python setup.py install` in the folder hopper/ of the flash-attention source",
)
FLASH_ATTN_4 = Supported(
    "flash-attn-4",
    "4.0",
    "4.0",
    "a GPU from Hopper on, and pip install --pre 'flash-attn-4>=4.0.0b36,<4.1'",
)
_MODULES = {
    "torch": "torch",
    "numpy": "numpy",
    "packaging": "packaging",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "ftfy": "ftfy",
    "tokenizers": "tokenizers",
    "rich": "rich",
}
"""What every command imports -> its distribution; megatron-core is looked for by its files."""


def _numbers(version: str) -> tuple[int, ...]:
    """2.14.0a0+git1234 -> (2, 14, 0): an image's build of a release counts as that release."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def installed_version(distribution: str) -> str | None:
    """Version by the metadata of a distribution; None where it has none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def megatron_core_version() -> str | None:
    """Version of the megatron-core that would be imported: often a checkout on PYTHONPATH without metadata.

    Reads its package_info.py; running it would ask git for the commit of whatever repository is around it.
    """
    spec = find_spec("megatron")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        info = Path(folder) / "core" / "package_info.py"
        if info.is_file():
            found = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)", info.read_text(), flags=re.MULTILINE))
            return ".".join(found.get(part, "0") for part in ("MAJOR", "MINOR", "PATCH"))
    return None


def required() -> list[tuple[Supported, str | None]]:
    """What every run needs, with the version that is here; imports none of it."""
    python = ".".join(map(str, sys.version_info[:3]))
    installed = [(supported, installed_version(supported.name)) for supported in (TORCH, NUMPY, PILLOW)]
    return [(PYTHON, python), *installed, (MEGATRON_CORE, megatron_core_version())]


def missing(root: Path) -> str:
    """The line for what every command imports and is not installed; empty where all of it is. Imports none of it.

    root: the folder that holds the rooms, a checkout or site-packages.
    """
    absent = [distribution for module, distribution in _MODULES.items() if find_spec(module) is None]
    absent += [MEGATRON_CORE.name] if megatron_core_version() is None else []
    if not absent:
        return ""
    ours = f"pip install -e {root}" if (root / "setup.cfg").is_file() else "pip install eva-megatron"
    first = "the torch build of your machine first (pip install torch==2.13.0), then " if "torch" in absent else ""
    return f"{sys.executable} lacks {', '.join(absent)}: {first}{ours}"
