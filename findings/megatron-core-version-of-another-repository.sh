#!/usr/bin/env bash
# megatron-core 0.19.2 (since 0.18; 0.16 and 0.17 do not do it).
# Guess: megatron.core.__version__ is a property of the package. Behaviour: at import it runs `git rev-parse` in its own
# folder, so an environment inside any repository (.venv in a project) reports that repository's commit as its own:
# 0.19.2+<commit of your project>. NO_VCS_VERSION=1 stops it. Needs git, and no other package.
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
unpack megatron-core==0.19.2 project
cd "$work/project"
git init -q . && git -c user.name=n -c user.email=e@example.org commit -q --allow-empty -m "a project of yours"
commit=$(git rev-parse --short HEAD)
read_version='import runpy; print(runpy.run_path("megatron/core/package_info.py")["__version__"] + ".")'
expect "inside a repository at $commit" "0.19.2+$commit" "$("$python" -c "$read_version")"
expect "with NO_VCS_VERSION=1" "0.19.2." "$(NO_VCS_VERSION=1 "$python" -c "$read_version")"
