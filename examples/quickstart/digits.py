"""Scikit-learn's digits as a set in CLIP-benchmark's layout: python examples/quickstart/digits.py FOLDER."""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from data.shards.write import write_shard

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SUITE = """\
# Scans of handwritten digits have nothing to do with what the quickstart trains on: zero-shot is near chance, and the
# probes say how much of a digit is in the features all the same.
title: Handwritten digits
source: scikit-learn's copy of the UCI optical recognition set (8 x 8 scans), CC BY 4.0.
sets:
  - {name: digits, title: Digits, classes: 10, samples: 597, metric: top1}
"""
TRAIN = 1200
SIDE = 48


def main(root: Path) -> None:
    """Write FOLDER/wds_digits, 1,200 scans to fit probes on and 597 to score, and FOLDER/suite.yaml."""
    folder, digits = root / "wds_digits", load_digits()
    samples = [
        (f"{number:04d}", {"png": _png(image), "cls": str(label).encode()})
        for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True))
    ]
    for split, part in (("train", samples[:TRAIN]), ("test", samples[TRAIN:])):
        (folder / split).mkdir(parents=True, exist_ok=True)
        write_shard(str(folder / split / "0.tar"), part)
        (folder / split / "nshards.txt").write_text("1\n")
    (root / "suite.yaml").write_text(SUITE)
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("the number {c}\n{c}\n")


def _png(scan: np.ndarray) -> bytes:
    """scan: float [8, 8], 0 to 16, dark on white in the file."""
    stream = io.BytesIO()
    grey = Image.fromarray((255 - scan * 255 / 16).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grey.convert("RGB").save(stream, "PNG")
    return stream.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
