# Sourced by the recipes. Start a recipe on every node of the job; under SLURM examples/slurm/stage.sbatch does that.
#
#   need VARIABLE…                  stop unless these are set
#   knob VARIABLE KEY               an environment variable, if set, becomes the setting KEY
#   launch CONFIG [KEY=VALUE …]     start the job's part on this node, with the knobs and these settings
#
# NODES             nodes of the job (each recipe has the paper's number)
# GPUS_PER_NODE     8
# HEAD_NODE, PORT   host name of the first node, and a free port there (29500)
# JOB_ID            name of the rendezvous, the same on all nodes and new for every start
# DRY_RUN=1         print the command and start nothing; what is not set stays as the YAML has it
# DRY_RUN=rank      run one rank of it at full size without a GPU: memory, FLOPs, traffic (tools.dryrun)

knobs=()

need() {
  local name
  for name in "$@"; do
    if [ -z "${!name:-}${DRY_RUN:-}" ]; then
      echo "$0: set $name (the head of the script says to what)" >&2
      exit 2
    fi
  done
}

knob() {
  if [ -n "${!1:-}" ]; then knobs+=("$2=${!1}"); fi
}

launch() {
  local config=$1 nodes=${NODES:-1} gpus=${GPUS_PER_NODE:-8} command
  shift
  if [ "${DRY_RUN:-}" = rank ]; then
    command=(python -m tools.dryrun "$config" --world-size $((nodes * gpus)))
  else
    command=(torchrun --nnodes "$nodes" --nproc-per-node "$gpus")
    if [ "$nodes" -gt 1 ]; then
      need HEAD_NODE
      command+=(--rdzv-backend c10d --rdzv-id "${JOB_ID:-eva-megatron}")
      command+=(--rdzv-endpoint "${HEAD_NODE:-HEAD_NODE}:${PORT:-29500}")
    else
      command+=(--standalone)
    fi
    command+=(-m engine.train "$config")
  fi
  command+=("${knobs[@]}" "$@")
  if [ "${DRY_RUN:-}" = 1 ]; then
    _print_command "${command[@]}"
    return
  fi
  # One hardware queue keeps the order in which communication and GEMMs are issued: sequence parallelism overlaps by it.
  export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
  # Captions of changing length fragment the allocator's fixed segments.
  export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
  exec "${command[@]}"
}

_print_command() {
  local word line=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,+-]+$ ]]; then line+=("$word"); else line+=("${word@Q}"); fi
  done
  echo "${line[*]}"
}
