"""Evaluation sets made in the community's layouts, from real scans and from noise."""

import csv
import json
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.shards.write import write_shard
from tests.data.shard_factory import encode, picture

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NEEDS_SKLEARN = pytest.mark.skipif(find_spec("sklearn") is None, reason="the extra `eval` is not installed")
"""Looks for it without its import, which takes seconds in every worker and rank."""
TEMPLATES = ["a photo of the number {c}.", "a {c}."]


def digits(count: int, first: int = 0) -> list[tuple[Image.Image, int]]:
    """Scans of handwritten digits with their labels, from scikit-learn."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return [
        (Image.fromarray((data.images[i] * 15.9).astype(np.uint8)).convert("RGB").resize((40, 32)), int(data.target[i]))
        for i in range(first, first + count)
    ]


def class_files(folder: Path, names: list[str] | None = None, templates: list[str] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("\n".join(names or NAMES) + "\n", encoding="utf-8")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates or TEMPLATES) + "\n")


def tars(folder: Path, samples: list[tuple[str, dict[str, bytes]]], shards: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nshards.txt").write_text(f"{shards}\n")
    for number in range(shards):
        first, last = number * len(samples) // shards, (number + 1) * len(samples) // shards
        write_shard(str(folder / f"{number}.tar"), samples[first:last])


def digits_set(root: Path, count: int = 60, names: list[str] | None = None, train: int = 0) -> Path:
    """CLIP-benchmark's layout."""
    folder = root / "wds_digits"
    class_files(folder, names)
    made = [(f"s{i:05d}", {"png": encode(p), "cls": str(label).encode()}) for i, (p, label) in enumerate(digits(count))]
    tars(folder / "test", made)
    if train:
        more = digits(train, first=count)
        tars(folder / "train", [(f"t{i}", {"png": encode(p), "cls": str(c).encode()}) for i, (p, c) in enumerate(more)])
    return folder


def multilabel_set(root: Path, count: int = 20) -> Path:
    folder = root / "many"
    class_files(folder, ["red", "green", "blue"])
    samples = []
    for number in range(count):
        stream = BytesIO()
        np.save(stream, np.array([number % 2, number % 3 == 0, number % 5 == 0], dtype=np.int64))
        meta = json.dumps({"region": f"r{number % 3}"}).encode()
        samples.append((f"m{number}", {"png": encode(picture(number)), "npy": stream.getvalue(), "json": meta}))
    tars(folder / "test", samples, shards=1)
    return folder


def retrieval_set(root: Path, count: int = 12, captions: int = 5) -> Path:
    folder = root / "wds_pairs"
    words = ["large", "small", "loud", "still", "odd", "even"]
    samples = []
    for number in range(count):
        lines = "\n".join(f"{word} noise {number}" for word in words[:captions])
        samples.append((f"p{number}", {"png": encode(picture(number)), "txt": lines.encode()}))
    tars(folder / "test", samples, shards=1)
    return folder


def folder_set(root: Path, per_class: int = 3) -> Path:
    """A folder a class, named by ids, with labels.csv."""
    folder = root / "folders"
    class_files(folder, ["a cat", "a dog"])
    (folder / "labels.csv").write_text("id,name\n7,a cat\n3,a dog\n")
    for number, name in enumerate(("7", "3")):
        (folder / "test" / name).mkdir(parents=True)
        for at in range(per_class):
            picture(10 * number + at).save(folder / "test" / name / f"{at}.png")
    return folder


def list_set(root: Path, count: int = 6) -> Path:
    """A CSV list with a group of every picture."""
    folder = root / "list"
    class_files(folder, ["a cat", "a dog"])
    lines = ["path,label,place"]
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{'a dog' if number % 2 else 'a cat'},{'north' if number < 2 else 'south'}")
    (folder / "test.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    return folder


def clip_bytes(number: int, frames: int = 6) -> bytes:
    """A short mp4."""
    import av

    stream = BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=5)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        for frame in range(frames):
            image = picture(50 * number + frame, 48, 32)
            for packet in video.encode(av.VideoFrame.from_image(image)):
                container.mux(packet)
        for packet in video.encode():
            container.mux(packet)
    return stream.getvalue()


def video_sets(root: Path) -> None:
    """Classification by folders of clips, and retrieval by a list of sentences."""
    clips = root / "moves"
    class_files(clips, ["wave", "jump"])
    (clips / "labels.csv").write_text("id,name\n0,wave\n1,jump\n")
    for number in range(4):
        (clips / "test" / ("wave", "jump")[number % 2]).mkdir(parents=True, exist_ok=True)
        (clips / "test" / ("wave", "jump")[number % 2] / f"{number}.mp4").write_bytes(clip_bytes(number))
    told = root / "told"
    (told / "videos").mkdir(parents=True)
    lines = ["video_id,sentence"]
    for number in range(3):
        (told / "videos" / f"v{number}.mp4").write_bytes(clip_bytes(number))
        lines += [f'v{number},"somebody, in film {number}"', f"v{number},a film {number}"]
    (told / "test.csv").write_text("\n".join(lines) + "\n")


def association_set(root: Path) -> Path:
    """WinoGAViL's table and folder of pictures: three questions about five of them."""
    folder = root / "winogavil"
    (folder / "images").mkdir(parents=True)
    for number, name in enumerate("abcde"):
        picture(number).save(folder / "images" / f"{name}.png")
    questions = [
        ("full moon", ["a", "b", "c", "d", "e"], ["a", "b"]),
        ("Owl", ["a", "b", "c", "d", "e"], ["c", "d"]),
        ("forest", ["d", "e"], ["d"]),
    ]
    with (folder / "test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "candidates", "cue", "associations"])
        writer.writerows([[at, json.dumps(c), cue, json.dumps(right)] for at, (cue, c, right) in enumerate(questions)])
    return folder


GROUPS = {
    "an animal": (0x1F400, 0x1F43F),
    "food": (0x1F345, 0x1F37F),
    "a vehicle": (0x1F680, 0x1F6A4),
    "a face": (0x1F600, 0x1F637),
}
"""Ranges of Unicode as classes of OpenMoji's drawings."""


def emoji_groups_set(root: Path, per_class: int, size: int = 48) -> Path:
    """OpenMoji's drawings in a folder a group, with prompts."""
    from tools.prepare_emoji.pictures import draw, list_pictures

    folder = root / "openmoji"
    class_files(folder, list(GROUPS))
    pictures = {int(p.hexcode, 16): p for p in list_pictures() if "-" not in p.hexcode}
    for name, (first, last) in GROUPS.items():
        place = folder / "test" / name.replace(" ", "_")
        place.mkdir(parents=True)
        for code in [code for code in range(first, last + 1) if code in pictures][:per_class]:
            draw(pictures[code], size).save(place / f"{code:x}.png")
    return folder


def emoji_captions_set(root: Path, count: int, size: int = 48) -> Path:
    """OpenMoji's drawings with five captions each, the second one the same for two neighbours."""
    from tools.prepare_emoji.pictures import draw, list_pictures

    folder = root / "wds_told"
    samples = []
    for number, p in enumerate(list_pictures()[100 : 100 + count]):
        lines = [p.name, f"number {number // 2}", f"a drawing of {p.name}", f"{p.name} on white", f"the sign {p.name}"]
        samples.append((f"e{number}", {"png": encode(draw(p, size)), "txt": "\n".join(lines).encode()}))
    tars(folder / "test", samples, shards=1)
    return folder


def remuxed(clip: bytes, container: str) -> bytes:
    """The same encoded frames in another container: a stream copy."""
    import av

    stream = BytesIO()
    with av.open(BytesIO(clip), "r") as source, av.open(stream, "w", format=container) as target:
        video = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = video
                target.mux(packet)
    return stream.getvalue()


def reencoded(clip: bytes) -> bytes:
    """The decoded frames through another codec."""
    import av

    stream = BytesIO()
    with av.open(BytesIO(clip), "r") as source, av.open(stream, "w", format="mp4") as target:
        video = target.add_stream("mjpeg", rate=5)
        video.width, video.height, video.pix_fmt = 48, 32, "yuvj420p"
        for frame in source.decode(video=0):
            for packet in video.encode(frame.reformat(format="yuvj420p")):
                target.mux(packet)
        for packet in video.encode():
            target.mux(packet)
    return stream.getvalue()
