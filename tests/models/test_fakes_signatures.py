"""The stand-ins of tests/fakes have the constructors and calls of the real packages, read from their wheels' Python.

tests/fakes/signatures.json holds what the wheels say, with their versions: the newest that they follow, and the oldest
Transformer Engine of the range, which is not asked for what came later. Where a wheel is at hand, in .whl/ or the
folder that WHEELS names, it is read again: `pip download --no-deps --dest .whl NAME==VERSION` gets one (1.2 and 0.5
MB), EVA_WRITE_TABLES=1 writes the file. Nothing of the real packages is imported or run.
"""

import ast
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests" / "fakes"
TE, FLASH_4 = ("transformer_engine", "2.20.2"), ("flash_attn_4", "4.0.0b36")
OLDEST_TE = ("transformer_engine", "2.9.0")
FIXTURE = FAKES / "signatures.json"
RECIPES = "transformer_engine/common/recipe/__init__.py"
_DOT = "pytorch/attention/dot_product_attention/dot_product_attention.py"
CALLS = [
    (TE, f"transformer_engine/{real}", f"transformer_engine/pytorch/{fake}", name)
    for real, fake, name in (
        ("pytorch/module/linear.py", "linear.py", "Linear.__init__"),
        ("pytorch/module/linear.py", "linear.py", "Linear.forward"),
        ("pytorch/module/rmsnorm.py", "norms.py", "RMSNorm.__init__"),
        ("pytorch/module/layernorm.py", "norms.py", "LayerNorm.__init__"),
        (_DOT, "attention.py", "DotProductAttention.__init__"),
        (_DOT, "attention.py", "DotProductAttention.forward"),
        ("pytorch/quantization.py", "fp8.py", "fp8_autocast"),
        ("pytorch/quantization.py", "fp8.py", "fp8_model_init"),
        ("pytorch/distributed.py", "distributed.py", "checkpoint"),
    )
] + [(FLASH_4, "flash_attn/cute/interface.py", "flash_attn/cute/__init__.py", "flash_attn_varlen_func")]


def _source(package: tuple[str, str], path: str) -> str:
    name, version = package
    folders = [ROOT / ".whl", *([Path(os.environ["WHEELS"])] if "WHEELS" in os.environ else [])]
    for folder in folders:
        for wheel in folder.glob(f"{name}-{version}-*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                return archive.read(path).decode()
    pytest.skip(f"the wheel of {name} {version} is not at hand (.whl/, or the folder that WHEELS names)")


def _function(source: str, name: str) -> ast.FunctionDef:
    """The definition of a function, or of Class.function."""
    body: list[ast.stmt] = ast.parse(source).body
    for part in name.split("."):
        node = next(n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part)
        body = node.body
    assert isinstance(node, ast.FunctionDef)
    return node


def _own(name: str) -> str:
    """The stand-ins of the norms share one class."""
    return name.replace("RMSNorm", "_Norm").replace("LayerNorm", "_Norm")


def _signature(source: str, name: str) -> tuple[list[str], bool]:
    """(names of the parameters in order, whether others are taken as well)."""
    arguments = _function(source, name).args
    names = [a.arg for a in [*arguments.posonlyargs, *arguments.args]]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    return names, arguments.kwarg is not None


def _recipes(source: str) -> list[str]:
    names = {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    return sorted(name for name in names if name.endswith(("Scaling", "Recipe")))


def _read(package: tuple[str, str]) -> dict[str, Any]:
    """What the wheel of a package says."""
    ours = [(real, name) for owner, real, _, name in CALLS if owner[0] == package[0]]
    calls = {name: _signature(_source(package, real), name) for real, name in ours}
    found: dict[str, Any] = {name: {"parameters": names, "others": more} for name, (names, more) in calls.items()}
    return found | ({"recipes": _recipes(_source(package, RECIPES))} if package[0] == TE[0] else {})


def _kept(package: tuple[str, str]) -> dict[str, Any]:
    return json.loads(FIXTURE.read_text())[" ".join(package)]


@pytest.mark.parametrize("package", [TE, OLDEST_TE, FLASH_4], ids=" ".join)
def test_the_kept_signatures_are_the_wheels(package: tuple[str, str]) -> None:
    found = _read(package)
    if os.environ.get("EVA_WRITE_TABLES"):
        kept = json.loads(FIXTURE.read_text()) if FIXTURE.exists() else {}
        FIXTURE.write_text(json.dumps(kept | {" ".join(package): found}, indent=1) + "\n")
    assert found == _kept(package)


@pytest.mark.parametrize(("package", "real", "fake", "name"), CALLS, ids=[call[3] for call in CALLS])
def test_a_stand_in_is_called_like_the_real_one(package: tuple[str, str], real: str, fake: str, name: str) -> None:
    kept = _kept(package)[name]
    real_names, real_takes_more = kept["parameters"], kept["others"]
    fake_names, fake_takes_more = _signature((FAKES / fake).read_text(), _own(name))
    if fake_takes_more:  # what it leaves out stands behind what it has
        real_names = real_names[: len(fake_names)]
    elif real_takes_more:  # the device travels there
        fake_names = fake_names[: len(real_names)]
    assert fake_names == real_names


@pytest.mark.parametrize(("fake", "name"), [call[2:] for call in CALLS if call[0] == TE], ids=lambda value: value)
def test_the_oldest_is_asked_for_nothing_that_came_later(fake: str, name: str) -> None:
    """Nothing of it is gone or has another place; what was added since, the stand-in lets nobody pass."""
    oldest, newest = (_kept(package)[name]["parameters"] for package in (OLDEST_TE, TE))
    assert [parameter for parameter in newest if parameter in oldest] == oldest
    arguments = _function((FAKES / fake).read_text(), _own(name)).args
    names = [argument.arg for argument in arguments.args]
    defaults = dict(zip(reversed(names), reversed(arguments.defaults), strict=False))
    later = [name for name, default in defaults.items() if isinstance(default, ast.Name) and default.id == "LATER"]
    assert sorted(later) == sorted({*names} & ({*newest} - {*oldest}))


def test_the_recipes_exist_that_the_config_offers() -> None:
    offered = {"Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"}
    refused = {"DelayedScaling", "NVFP4BlockScaling", "CustomRecipe"}
    for package in (OLDEST_TE, TE):
        assert offered | refused | {"Recipe"} == set(_kept(package)["recipes"])
