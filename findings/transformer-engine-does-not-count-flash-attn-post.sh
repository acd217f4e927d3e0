#!/usr/bin/env bash
# Transformer Engine 2.18.0 and 2.19.0, packaging 26.4; flash-attn 2.8.3.post2 is what `pip install flash-attn` gives.
# Guess: a bound `<= 2.8.3` lets a post-release of 2.8.3 pass. Behaviour: a post-release is above its release, so Transformer
# Engine up to 2.18 counts that flash-attn as not installed; 2.19 compares with `< 2.8.4`.
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
install packaging==26.4
compare="from packaging.version import Version as V; print(V('2.8.3.post2') <= V('2.8.3'), V('2.8.3.post2') < V('2.8.4'))"
expect "2.8.3.post2 <= 2.8.3, < 2.8.4" "False True" "$(PYTHONPATH="$PACKAGES" "$python" -c "$compare")"
for version in 2.18.0 2.19.0; do
  unpack "transformer-engine==$version" "$version"
  folder=$work/$version/transformer_engine/pytorch/attention/dot_product_attention
  seen=$(grep -hoE 'max_version = PkgVersion.*|version (<|<=) [A-Za-z_]+\.max_version' "$folder/utils.py" "$folder/backends.py" | sort -u | tr '\n' ';')
  case $version in
    2.18.0) expect "$version" 'max_version = PkgVersion("2.8.3");version <= fa_utils.max_version' "$seen" ;;
    *) expect "$version" 'max_version = PkgVersion("2.8.4");version < FlashAttentionUtils.max_version' "$seen" ;;
  esac
done
