#!/usr/bin/env bash
# flash-attn-4 4.0.0b36 beside flash-attn 2 (2.8.3, sources not needed: its fourth parameter is cu_seqlens_q).
# Guess: flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, …) may be called by place in every version, and the
# module's __version__ tells which. Behaviour: in 4 the fourth parameter is `qv`, a tensor as well; __version__ asks for a
# distribution `fa4`, which is not its name on PyPI, and falls back to "0.0.0".
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
unpack flash-attn-4==4.0.0b36 fa4
read_signature='
import ast, sys
tree = ast.parse(open(sys.argv[1]).read())
f = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "flash_attn_varlen_func")
print([a.arg for a in f.args.args][:6])'
expect "parameters" "['q', 'k', 'v', 'qv', 'cu_seqlens_q', 'cu_seqlens_k']" \
  "$("$python" -c "$read_signature" "$work/fa4/flash_attn/cute/interface.py")"
asks='
import importlib.metadata as m
names = sorted(d.metadata["Name"] for d in m.distributions() if d.metadata["Name"].startswith(("fa4", "flash")))
print(names, end=" ")
try:
    print(m.version("fa4"))
except m.PackageNotFoundError:
    print("no fa4")'
expect "distribution" "['flash-attn-4'] no fa4" "$(PYTHONPATH=$work/fa4 "$python" -S -c "$asks")"
expect "asked for" 'version("fa4")' "$(grep -h 'version(' "$work/fa4/flash_attn/cute/__init__.py")"
