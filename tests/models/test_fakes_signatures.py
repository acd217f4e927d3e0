"""The stand-ins of tests/fakes have the constructors and calls of the real packages, read from their wheels' Python.

A wheel is looked for in .whl/ and in the folder that WHEELS names; `pip download --no-deps --dest .whl NAME==VERSION`
gets one (1.2 and 0.5 MB). Without it a test is skipped and says so. Nothing of the real packages is imported or run.
"""

import ast
import os
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests" / "fakes"
TE, FLASH_4 = ("transformer_engine", "2.20.2"), ("flash_attn_4", "4.0.0b36")
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


def _signature(source: str, name: str) -> tuple[list[str], bool]:
    """(names of the parameters in order, whether others are taken as well) of a function or of Class.function."""
    body: list[ast.stmt] = ast.parse(source).body
    for part in name.split("."):
        node = next(n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part)
        body = node.body
    assert isinstance(node, ast.FunctionDef)
    arguments = node.args
    names = [a.arg for a in [*arguments.posonlyargs, *arguments.args]]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    return names, arguments.kwarg is not None


@pytest.mark.parametrize(("package", "real", "fake", "name"), CALLS, ids=[call[3] for call in CALLS])
def test_a_stand_in_is_called_like_the_real_one(package: tuple[str, str], real: str, fake: str, name: str) -> None:
    real_names, real_takes_more = _signature(_source(package, real), name)
    own = name.replace("RMSNorm", "_Norm").replace("LayerNorm", "_Norm")  # the stand-ins of the norms share it
    fake_names, fake_takes_more = _signature((FAKES / fake).read_text(), own)
    if fake_takes_more:  # what it leaves out stands behind what it has
        real_names = real_names[: len(fake_names)]
    elif real_takes_more:  # the device travels there
        fake_names = fake_names[: len(real_names)]
    assert fake_names == real_names


def test_the_recipes_exist_that_the_config_offers() -> None:
    source = _source(TE, "transformer_engine/common/recipe/__init__.py")
    names = {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    offered = {"Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"}
    refused = {"DelayedScaling", "NVFP4BlockScaling", "CustomRecipe"}
    assert offered | refused | {"Recipe"} == {name for name in names if name.endswith(("Scaling", "Recipe"))}
