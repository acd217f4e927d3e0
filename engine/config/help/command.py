"""What `python -m engine.train` answers about itself: --help, --explain KEY, --settings."""

from engine.config.errors import ConfigError
from engine.config.help.fields import as_markdown, explain, sections
from engine.config.tree import PRESETS

_USAGE = """usage: torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node N \\
         -m engine.train CONFIG.yaml [KEY=VALUE …]
       python -m engine.train --help | --explain KEY | --settings

Trains a CLIP on N ranks (DP = N / parallel.tensor / parallel.pipeline), or goes on with the run in run_dir.

  CONFIG.yaml      settings of the job; recipes are in examples/
  KEY=VALUE        a setting above the file's, such as train.steps=1000; model=NAME takes another model whole
  --explain KEY    what a setting (train.keep_activations) or a section (train) means, with types and defaults
  --settings       all of them, as a page (docs/settings.md)
  -h, --help       this text"""
_EXAMPLES = """examples:
  torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 8 -m engine.train examples/b16.yaml \\
    data.shards='/data/cc12m/{00000..01242}.tar' run_dir=runs/b16
  python -m engine.train examples/b16.yaml model=tiny-18b model.text.vocab_size=49408 data.shards=shards \\
    train.global_batch_size=32 train.micro_batch_size=32 train.steps=20 train.precision=fp32"""


def answer(arguments: list[str]) -> str:
    """The text for these arguments. Raises ConfigError for an option that there is not, or a key that is no setting."""
    match arguments:
        case [] | ["-h" | "--help", *_]:
            return _help()
        case ["--explain", key]:
            return explain(key)
        case ["--settings"]:
            return as_markdown().rstrip("\n")
        case ["--explain", *_]:
            raise ConfigError("--explain takes one setting or section, such as --explain train.keep_activations")
    raise ConfigError(
        f"{arguments[0]} is not an option (--help, --explain KEY, --settings): the config file comes first, and "
        "settings are KEY=VALUE without dashes"
    )


def _help() -> str:
    known = sections()
    width = max(map(len, known))
    listed = "\n".join(f"  {name:{width}}  {text}" for name, text in known.items())
    presets = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    return (
        f"{_USAGE}\n\nsections:\n{listed}\n\nmodels (model=NAME; also open_clip's, timm's and the hub's names, or a "
        f"FILE.yaml of your own, docs/models.md):\n  {presets}\n\nHow values are written: docs/config.md. Every "
        f"setting: docs/settings.md.\n\n{_EXAMPLES}"
    )
