# Sourced by the other scripts of this folder, after they have changed to the root of the repository.
#
#   print_head          the comment at the head of the script that was started
#   is_dry              whether DRY_RUN asks for commands to be printed and not started
#   start COMMAND…      start it, or print it
#
# DRY_RUN   1, yes, true, on: print the commands and start nothing; 0, no, false, off or unset: start them

print_head() {
  local script=$0
  [[ $script = /* ]] || script=${OLDPWD:-.}/$script  # named from where the script was started
  sed -n -e '2,/^[^#]/{/^#/!d; /^#SBATCH/d; s/^# \{0,1\}//; p;}' -- "$script"
}

# Any of the texts that people give to a switch becomes 1 or nothing; "rank" stays (examples/launch.sh).
_read_dry_run() {
  local given=${DRY_RUN:-}
  case "${given,,}" in
    1 | y | yes | t | true | on) DRY_RUN=1 ;;
    "" | 0 | n | no | f | false | off) DRY_RUN="" ;;
    rank) DRY_RUN=rank ;;
    *)
      echo "$0: DRY_RUN=$given is not one of 1, yes, true, on, 0, no, false, off" >&2
      exit 2
      ;;
  esac
}

is_dry() { [ "$DRY_RUN" = 1 ]; }

start() {
  if is_dry; then print_command "$@"; else "$@"; fi
}

print_command() {
  local word line=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,+-]+$ ]]; then line+=("$word"); else line+=("${word@Q}"); fi
  done
  echo "${line[*]}"
}

case "${1:-}" in
  -h | --help)
    print_head
    exit 0
    ;;
esac
_read_dry_run
