# Sourced by the scripts of this folder. Pinned public packages, in a folder that goes away when the script ends:
# shellcheck shell=bash
#
#   install NAME==VERSION…        pip install into $PACKAGES, which every run of Python below finds first
#   unpack NAME==VERSION DIR      one wheel without its requirements, unpacked into DIR (Python 3.12's where it matters)
#   expect WHAT WANTED SEEN       says what was seen; ends with status 1 if it is not what was wanted
#
# FINDINGS_CACHE=DIR keeps what was installed, for running several scripts one after another.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
python=$("${PYTHON:-python3.11}" -c 'import sys; print(sys.executable)')  # not a shim, which needs a shell on the path

install() {
  local key
  key=$(printf '%s\n' "$@" | sha256sum | cut -c1-16)
  PACKAGES=${FINDINGS_CACHE:-$work}/$key
  if [ ! -f "$PACKAGES/.complete" ]; then
    "$python" -m venv "$work/pip-$key"
    "$work/pip-$key/bin/pip" install --quiet --target "$PACKAGES" "$@" 2> "$work/pip.log" || { cat "$work/pip.log" >&2; exit 1; }
    touch "$PACKAGES/.complete"
  fi
}

unpack() {
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --dest "$work/wheel-$2" "$1" \
    2> "$work/pip.log" || { cat "$work/pip.log" >&2; exit 1; }
  "$python" -m zipfile -e "$work/wheel-$2"/*.whl "$work/$2"
}

expect() {
  echo "$1: $3"
  case "$3" in
    *"$2"*) ;;
    *) echo "CHANGED: wanted: $2" >&2; exit 1 ;;
  esac
}
