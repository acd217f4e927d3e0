"""Image embeddings of a set on disk, written block by block and taken up again after a kill."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batch import BadSample
from engine.evaluation.embedder import Embedder
from engine.evaluation.inputs import Block, SampleInput
from engine.evaluation.progress import Progress
from engine.evaluation.scores import LeftOut, check_embeddings
from engine.evaluation.text_files import write_whole
from engine.parallel.agree import everyone

_DIGEST_BYTES = 16


class FileRows:
    """fp32 [N, D] in a file, of which a part at a time is in memory."""

    def __init__(self, path: Path, width: int):
        self._path, self._width = path, width
        self._count = path.stat().st_size // (4 * width)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self._count)
        found = np.fromfile(self._path, np.float32, (stop - start) * self._width, offset=4 * start * self._width)
        return torch.from_numpy(found.reshape(-1, self._width))


@dataclass(kw_only=True)
class Features:
    """What the first rank knows of the embeddings of one part of a set."""

    folder: Path
    fingerprint: str
    """Fingerprint of the checkpoint and the samples: features of another are not taken up."""
    done: int = 0
    """Samples whose rows are on disk."""
    key_bytes: int = 0
    """Bytes of their keys."""
    bad: list[BadSample] = field(default_factory=list)
    """What could not be read of them."""

    @property
    def left_out(self) -> LeftOut:
        """Pictures that could not be read; their rows are NaN."""
        return LeftOut([bad for bad in self.bad if bad.reason != "missing_caption"])

    def rows(self, width: int) -> FileRows:
        """The embeddings."""
        return FileRows(self.folder / "images.f32", width)

    def keys(self) -> list[str]:
        """The key of every sample within its tar, or its path."""
        return [json.loads(line) for line in (self.folder / "keys.jsonl").read_text(encoding="utf-8").splitlines()]

    def pictures(self) -> np.ndarray:
        """uint8 [N, 16]: which pictures are the same."""
        return np.fromfile(self.folder / "pictures.u8", np.uint8).reshape(-1, _DIGEST_BYTES)

    @property
    def scored(self) -> Tensor:
        """int64 [n]: the samples that have a row."""
        gone = {bad.position for bad in self.left_out.samples}
        return torch.tensor([row for row in range(self.done) if row not in gone], dtype=torch.int64)

    def discard(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take_up(self, width: int) -> None:
        """Go on behind what an earlier run has written for the same fingerprint; else begin anew."""
        state = self.folder / "state.json"
        if state.is_file():
            stored = json.loads(state.read_text(encoding="utf-8"))
            if stored["fingerprint"] == self.fingerprint:
                self.done, self.key_bytes = stored["done"], stored["key_bytes"]
                self.bad = [BadSample(**bad) for bad in stored["bad"]]
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes = {"images.f32": 4 * width * self.done, "pictures.u8": _DIGEST_BYTES * self.done}
        for name, size_bytes in (sizes | {"keys.jsonl": self.key_bytes}).items():
            (self.folder / name).touch()
            os.truncate(self.folder / name, size_bytes)  # a kill may have left half a block

    def _append(self, images: np.ndarray, block: Block) -> None:
        keys = "".join(f"{json.dumps(key)}\n" for key in block.keys).encode()
        self.key_bytes += len(keys)
        contents = {"images.f32": images.tobytes(), "pictures.u8": b"".join(block.pictures), "keys.jsonl": keys}
        for name, content in contents.items():
            with (self.folder / name).open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self.done, self.bad = block.stop, self.bad + block.bad
        state = {"fingerprint": self.fingerprint, "done": self.done, "key_bytes": self.key_bytes}
        state["bad"] = [asdict(bad) for bad in self.bad]
        write_whole(self.folder / "state.json", json.dumps(state))


def embed_part(embedder: Embedder, source: SampleInput, size: int, features: Features, name: str) -> Features:
    """Embed what is not on disk yet. Collective over the mesh; files are written and known on the first rank alone."""
    world, width = source.mesh.world, embedder.encoders.embed_dim
    first_rank = world.rank == 0
    if first_rank:
        features._take_up(width)
    start = everyone(features.done, world)[0]
    progress = Progress(name, len(source), shown=first_rank and start < len(source), done=start)
    for block in source.blocks(size, start):
        assert block.pixels is not None and block.has_image is not None
        image = embedder.images(block.pixels, block.stop - block.start).cpu()
        rows = block.has_image.nonzero()[:, 0]
        check_embeddings(image[rows], "image", [block.keys[row] for row in rows.tolist()])
        image[~block.has_image] = torch.nan
        if first_rank:
            features._append(image.numpy(), block)
        progress.advance(block.stop)
    if start < len(source):
        rate = (len(source) - start) / progress.seconds
        progress.finish(f"{len(source):,} samples, {rate:,.1f} samples/s")
    return features
