# Sourced by the recipes. Start a recipe on every node of the job; under SLURM examples/slurm/stage.sbatch does that.
#
#   need VARIABLE…                  stop unless these are set
#   knob VARIABLE KEY               an environment variable, if set, becomes the setting KEY
#   yaml_text TEXT                  TEXT as one value inside a YAML list or mapping, whatever characters it has
#   launch CONFIG [KEY=VALUE …]     start the job's part on this node, with the knobs and these settings; the module is
#                                   engine.train, or MODULE
#
# NODES             nodes of the job (each recipe has the paper's number); MIN:MAX goes on with those that are left when
#                   some are lost (parallel.elastic; python -m tools.elastic says which numbers work; RESTARTS=3)
# GPUS_PER_NODE     8
# HEAD_NODE, PORT   host name of the first node, and a free port there (29500)
# JOB_ID            name of the rendezvous, the same on all nodes and new for every start
# RESTARTS          times that torchrun starts the ranks again after a failure (0)
# GRACE_S           seconds that a step and its checkpoint may take once the job is told to stop (300)
# DRY_RUN=1         print the command and start nothing; what is not set stays as the YAML has it (yes, true, on: too)
# DRY_RUN=rank      run one rank of it at full size without a GPU: memory, FLOPs, traffic (tools.dryrun)

# shellcheck source=examples/common.sh
. examples/common.sh
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

yaml_text() {
  local quote="'"
  if [[ $1 = \[*\] ]]; then echo "$1"; else echo "'${1//$quote/$quote$quote}'"; fi
}

# Stop unless a variable is a whole number from 1 up.
_count() {
  if ! [[ ${!1} =~ ^[1-9][0-9]*$ ]]; then
    echo "$0: $1=${!1} must be a whole number, at least 1" >&2
    exit 2
  fi
}

launch() {
  local config=$1 command most
  shift
  : "${NODES:=1}" "${GPUS_PER_NODE:=8}" "${PORT:=29500}"
  most=${NODES#*:}  # of MIN:MAX
  if ! [[ $NODES =~ ^[1-9][0-9]*:[1-9][0-9]*$ ]]; then _count NODES; fi
  if [ "$most" != "$NODES" ] && [ "${MODULE:-engine.train}" != engine.train ]; then
    echo "$0: NODES=$NODES: only training goes on with fewer nodes, give one number" >&2
    exit 2
  fi
  _count GPUS_PER_NODE
  _count PORT
  if [ "$DRY_RUN" = rank ]; then
    command=(python -m tools.dryrun "$config" --world-size $((most * GPUS_PER_NODE)))
  else
    command=(torchrun --nnodes "$NODES" --nproc-per-node "$GPUS_PER_NODE")
    if [ "$most" -gt 1 ]; then
      need HEAD_NODE
      command+=(--rdzv-backend c10d --rdzv-id "${JOB_ID:-eva-megatron}")
      command+=(--rdzv-endpoint "${HEAD_NODE:-HEAD_NODE}:$PORT")
    else
      command+=(--standalone --local-addr 127.0.0.1)  # a host name that does not resolve would be waited for
    fi
    if [ -n "${RESTARTS:-}" ]; then command+=(--max-restarts "$RESTARTS"); fi
    command+=(-m "${MODULE:-engine.train}" "$config")
  fi
  command+=("${knobs[@]}" "$@")
  if [ "$most" != "$NODES" ] && [ "$DRY_RUN" != rank ]; then command+=(parallel.elastic=true); fi
  if is_dry; then
    print_command "${command[@]}"
    return
  fi
  # One hardware queue keeps the order in which communication and GEMMs are issued: sequence parallelism overlaps by it.
  export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
  # Captions of changing length fragment the allocator's fixed segments.
  export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE_S:-300}"
  _run_and_forward "$(_run_dir_of "$config" "${knobs[@]}" "$@")" "${command[@]}"
}

# Run a command that is told to stop in order by TERM, INT, HUP or USR1; 75 if the run has stopped so (torchrun says 1), or
# was told to before it began. A status that an earlier start has left says nothing about this one.
_run_and_forward() {
  local run_dir=$1 child="" early="" status told=0 heard before after apart=()
  shift
  before=$(cat "$run_dir/status.json" 2>/dev/null || true)
  # Before the command starts: what comes in between would end this script and leave the command behind.
  trap 'told=$((told + 1)); if [ -n "$child" ]; then pkill -USR1 -P "$child" || true; else early=1; fi' USR1
  trap 'told=$((told + 1)); if [ -n "$child" ]; then kill -TERM "$child" || true; else early=1; fi' TERM INT HUP
  # nohup: torchrun would hear HUP all the same, and end. What a terminal tells its session does not reach another one.
  if [[ $(trap -p HUP) = "trap -- '' "* ]]; then apart=(setsid); fi
  (
    trap '' USR1  # torchrun would end by it at once and leave its ranks behind: it inherits that it is ignored
    exec "${apart[@]}" "$@"
  ) &
  child=$!
  if [ -n "$early" ]; then kill -TERM "$child" || true; fi
  while  # a signal ends the wait, with a status of its own; the next one has the command's, also when that is over
    heard=$told status=0
    wait "$child" || status=$?
    [ "$told" != "$heard" ]
  do :; done
  trap - USR1 TERM INT HUP
  after=$(cat "$run_dir/status.json" 2>/dev/null || true)
  if [ "$status" != 0 ]; then
    case $after in
      "$before" | *'"outcome": "starting"'*) if [ "$told" != 0 ]; then status=75; fi ;;
      *'"outcome": "stopped"'*) status=75 ;;
    esac
  fi
  return "$status"
}

_run_dir_of() {
  local config=$1 setting run_dir
  shift
  run_dir=$(sed -n 's/^run_dir: *//p' "$config" | head -n 1)
  for setting in "$@"; do
    case $setting in run_dir=*) run_dir=${setting#run_dir=} ;; esac
  done
  echo "$run_dir"
}
