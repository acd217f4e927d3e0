#!/usr/bin/env bash
# A new user's first day on a few small pictures: shards, training, going on at another layout, scores, embeddings,
# weights out and back, a plan, a report; and the one line that each of twelve wrong guesses is answered with.
#
#   bash tests/first_day.sh [FOLDER]     FOLDER is made and kept; without it a temporary one is used
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
. examples/common.sh
. examples/setup.sh
ensure_environment emoji

if [ $# -gt 0 ]; then
  day=$1
  mkdir -p -- "$day"
else
  day=$(mktemp -d)
  trap 'rm -rf -- "$day"' EXIT
fi
day=$(CDPATH='' cd -- "$day" && pwd)/"a day"  # a space, as people's folders have them
mkdir -p -- "$day"

step() { printf '\n== %s\n' "$1"; }

# refused WORD COMMAND…: it ends with another status than 0 and one line that has WORD, and no traceback.
refused() {
  local word=$1 said
  shift
  if said=$("$@" 2>&1 >/dev/null); then
    echo "not refused: $*" >&2
    return 1
  fi
  if [[ $said = *Traceback* ]] || ! [[ $said = *"error: "* && $said = *"$word"* ]]; then
    printf 'not answered with "%s": %s\n%s\n' "$word" "$*" "$said" >&2
    return 1
  fi
  printf '%.160s\n' "$(grep -F "error: " <<<"$said")"
}

train=(-m engine.train examples/quickstart/train.yaml "data.shards=$day/shards/train" "run_dir=$day/run")
train+=(train.global_batch_size=32 train.micro_batch_size=8 optim.warmup_steps=2 checkpoint.every_steps=2)
alone=(parallel.tensor=1 parallel.pipeline=1)

step "shards"
python -m tools.prepare_emoji --out "$day/shards" --size 48 --shards 2 --limit 150
python -m tools.inspect_shards "$day/shards/train" >"$day/shards.txt"

step "training on two stages, then going on alone"
ranks=(torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2)
"${ranks[@]}" "${train[@]}" parallel.tensor=1 parallel.pipeline=2 train.steps=2 >"$day/first.txt"
python "${train[@]}" "${alone[@]}" train.steps=4 >"$day/second.txt" 2>&1
grep -q "resumed from" "$day/second.txt"

step "scores, embeddings, weights out and back"
python -m tools.evaluate "$day/run" "$day/shards/heldout" --out "$day/run/result.json" >/dev/null
python -m tools.embed --checkpoint "$day/run" --shards "$day/shards/heldout" --out "$day/held.npz"
python -m tools.convert --to eva --checkpoint "$day/run" --out "$day/eva.safetensors" --config-out "$day/eva.json" \
  >/dev/null
python -m tools.convert --from eva --config "$day/eva.json" --weights "$day/eva.safetensors" --out "$day/back" >/dev/null
python -m tools.embed --checkpoint "$day/back" --shards "$day/shards/heldout" --out "$day/again.npz"
python - "$day/held.npz" "$day/again.npz" <<'PY'
import sys
import numpy as np
before, after = (np.load(path) for path in sys.argv[1:])
worst = max(np.abs(before[name] - after[name]).max() for name in ("image_embeddings", "text_embeddings"))
sys.exit(f"weights that went out and back embed differently: {worst}" if not worst < 1e-5 else 0)
PY

step "a notebook"
python -W ignore - "$day/run" <<'PY'
import sys
from PIL import Image
from engine import load_model
model = load_model(sys.argv[1])
print(model.classify(Image.new("RGB", (60, 40), "red"), ["a red square", "a blue square"]))
PY
python -m tools.reshard "$day/run" "$day/resharded" --pipeline 2 >/dev/null
python -m tools.inspect "$day/run" --diff "$day/resharded" >/dev/null

step "a plan and a report"
python -m tools.plan --model l14 --gpus 8 --gpu a100-80 --global-batch 4096 --write "$day/plan" >/dev/null
SHARDS=x DRY_RUN=yes bash "$day/plan/l14-8xa100-80.sh" >/dev/null
python -m tools.report "$day/run"

step "twelve wrong guesses"
refused "lr_vision" python "${train[@]}" optim.lr=1e-3
refused "precision" python "${train[@]}" precision=bf16
refused "tensor" python "${train[@]}" parallel.tp=2
refused "b17" python "${train[@]}" model=b17
refused "no-such" python -m engine.train examples/quickstart/train.yaml "data.shards=$day/no-such.tar" "${alone[@]}"
refused "no-config" python -m engine.train "$day/no-config.yaml"
refused "given twice" python "${train[@]}" train.micro_batch_size=7
refused "h101" python -m tools.plan --model l14 --gpus 8 --gpu h101 --global-batch 4096
refused "no-folder" python -m tools.report "$day/run" --out "$day/no-folder/page.html"
refused "is a folder" python -m tools.simulate --stages 2 --micro-batches 4 --encode-ms 1 --png "$day"
refused "exists" python -m tools.reshard "$day/run" "$day/resharded"
refused "metrics.jsonl" python -m tools.report "$day/shards"

step "done"
