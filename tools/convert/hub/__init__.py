"""Files that `--to hf` puts beside EVA weights, for transformers; this project itself does not import them."""
