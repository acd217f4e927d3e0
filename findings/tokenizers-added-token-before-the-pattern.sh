#!/usr/bin/env bash
# tokenizers 0.23.3.
# Guess: an AddedToken stands for the alternative `<end_of_text>|…` at the front of CLIP's pattern. Behaviour: added tokens
# are cut out before the pre-tokenizer's pattern sees the text. CLIP's pattern goes from left to right: behind a "!" the run of
# punctuation takes the "<" along, and the rest is plain letters. Ids differ for captions that quote the token.
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
install --no-deps tokenizers==0.23.3
cat > "$work/run.py" <<'PY'
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
pattern = r"<end_of_text>|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
print("pattern:", [piece for piece, _ in split.pre_tokenize_str("a!<end_of_text>")])
words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "!": 2}, unk_token="[UNK]"))
words.pre_tokenizer = split
words.add_tokens([AddedToken("<end_of_text>", normalized=False)])
print("added:", words.encode("a!<end_of_text>").tokens)
PY
seen=$(PYTHONPATH=$PACKAGES "$python" "$work/run.py")
expect "by the pattern" "['a', '!<', 'end', '_', 'of', '_', 'text', '>']" "$(head -1 <<< "$seen")"
expect "as an added token" "['a', '!', '<end_of_text>']" "$(tail -1 <<< "$seen")"
