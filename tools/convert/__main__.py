"""Convert weights between layouts, strictly: every tensor has its place or the file is refused.

One tensor is in memory at a time. Nothing is cast unless --dtype says so. What each tensor became stands in a table
beside the output (--table). docs/foreign_layouts.md has the table of layouts.
"""

import argparse
import sys
from pathlib import Path

from engine.checkpoint.format.disk import write_synced
from engine.checkpoint.format.manifest import AVERAGE, WEIGHT
from engine.checkpoint.state_dicts.files import read_json
from engine.config.read import ConfigError
from models.formats import LAYOUTS
from models.formats.eva_names import LayoutMismatch
from tools.cli import answer, command_parser
from tools.convert.export import export_huggingface, export_single_file, export_tower
from tools.convert.importing import import_weights
from tools.convert.outputs import Report, check_new_file

_EXAMPLES = (
    "python -m tools.convert --from eva --config EVA.json --weights FILE.pt --out DIR",
    "python -m tools.convert --from hf --weights FOLDER --out DIR",
    "python -m tools.convert --from openclip --model b16 --weights FILE.safetensors --out DIR",
    "python -m tools.convert --to eva --checkpoint runs/x --out FILE.safetensors --config-out FILE.json",
    "python -m tools.convert --to openclip --checkpoint runs/x --out FILE.pt",
    "python -m tools.convert --to hf --checkpoint runs/x --out FOLDER",
    "python -m tools.convert --to tower --tower vision --checkpoint runs/x --out FILE.safetensors",
)


def main(argv: list[str]) -> int:
    """Run the command; the exit status."""
    arguments = _arguments(argv)
    return answer(lambda: _convert(arguments), LayoutMismatch)


def _convert(arguments: argparse.Namespace) -> int:
    table = arguments.table or arguments.out.with_name(arguments.out.name + ".tensors.txt")
    check_new_file(table)
    report = _import(arguments) if arguments.source else _export(arguments)
    write_synced(table, "".join(f"{line}\n" for line in report.table).encode())
    for line in (*report.remarks, report.summary, f"{table}: what each tensor became"):
        print(line)
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("convert", __doc__, _EXAMPLES)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source", choices=LAYOUTS, help="layout to read")
    way.add_argument("--to", dest="target", choices=(*LAYOUTS, "tower"), help="layout to write")
    parser.add_argument("--config", type=Path, help="model config of the authors (JSON)")
    parser.add_argument(
        "--model", help="model as a preset, a public name of one, FILE.yaml or open_clip:FILE.json, instead of --config"
    )
    parser.add_argument("--weights", type=Path, help="file or folder to read")
    parser.add_argument("--entry", help="entry of a .pt file that holds the weights, where it has several (dotted)")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint or run folder to write from")
    parser.add_argument("--tower", choices=("vision", "text"), help="for --to tower")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="cast every tensor")
    parser.add_argument("--ema", action="store_true", default=None, help="write the averaged weights (optim.ema_decay)")
    parser.add_argument("--config-out", type=Path, help="also write the model's json, for --to eva and openclip")
    parser.add_argument("--table", type=Path, help="file for the line a tensor (default: OUT.tensors.txt)")
    parser.add_argument("--out", type=Path, required=True, help="folder or file to write; its name says which kind")
    arguments = parser.parse_args(argv)
    needed = ("weights",) if arguments.source else ("checkpoint",)
    missing = [f"--{name}" for name in needed if getattr(arguments, name) is None]
    idle = _idle(arguments)
    if missing or idle:
        parser.error(f"{', '.join(missing)} is missing" if missing else f"{', '.join(idle)} has no effect here")
    return arguments


def _idle(arguments: argparse.Namespace) -> list[str]:
    """Options that this way of converting would ignore."""
    allowed = {"config", "model", "weights", "entry"} if arguments.source else {"checkpoint", "ema"}
    allowed |= {"tower"} if arguments.target == "tower" else set()
    allowed |= {"config_out"} if arguments.target in ("eva", "openclip") else set()
    options = ("config", "model", "weights", "entry", "checkpoint", "tower", "ema", "config_out")
    return [f"--{o.replace('_', '-')}" for o in options if o not in allowed and getattr(arguments, o) is not None]


def _import(arguments: argparse.Namespace) -> Report:
    if arguments.config and arguments.model:
        raise ConfigError("--config and --model both name the model: give one")
    config = read_json(arguments.config) if arguments.config else None
    if config is not None and not isinstance(config, dict):
        raise ConfigError(f"{arguments.config} is no model config, but a JSON {type(config).__name__}")
    return import_weights(
        arguments.source,
        arguments.weights,
        arguments.out,
        config=config,
        preset=arguments.model,
        dtype=arguments.dtype,
        entry=arguments.entry,
    )


def _export(arguments: argparse.Namespace) -> Report:
    kind = AVERAGE if arguments.ema else WEIGHT
    if arguments.target == "hf":
        return export_huggingface(arguments.checkpoint, arguments.out, arguments.dtype, kind)
    if arguments.target == "tower":
        if arguments.tower is None:
            raise ConfigError("--to tower needs --tower vision or --tower text")
        return export_tower(arguments.checkpoint, arguments.out, arguments.tower, arguments.dtype, kind)
    return export_single_file(
        arguments.checkpoint, arguments.out, arguments.target, arguments.dtype, arguments.config_out, kind
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
