"""Labels, captions and groups of webdataset shards: members beside the pictures that the reader of samples skips."""

import io
import json
import tarfile
from dataclasses import dataclass, field

import numpy as np

from data.config import DataConfig
from data.each import EachReader
from data.errors import DataError
from data.shards.index_store import ONE_THREAD
from engine.evaluation.sets.spec import SetSpec
from engine.evaluation.text_files import caption_lines

_SMALL_BYTES = 1 << 20
"""A label is no longer than that."""
_ENDINGS = {"classification": ".cls", "multilabel": ".npy", "retrieval": ".txt"}


@dataclass(kw_only=True)
class Members:
    """What stands beside the pictures, in the reader's order of samples."""

    count: int
    labels: np.ndarray | None = None
    captions: list[list[str]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)


def read_members(shards: list[str], spec: SetSpec) -> Members:
    """Raises DataError for a sample without a label, or a label that is not what the kind of the set has."""
    ending = _ENDINGS[spec.scored_as]
    group_ending = {"json": ".json", "npy": ".npy"}.get(spec.groups.partition(":")[0], "")
    # Before the reader, which would go on with a shard that is cut off and say so.
    beside = [_small_members(shard, tuple(filter(None, (ending, group_ending)))) for shard in shards]
    reader = EachReader(
        DataConfig(shards=shards, shuffle=False), image_size=1, context_length=2, seed=0, train=False, captions=False
    )
    texts: list[bytes] = []
    groups: list[str] = []
    for number, (shard, found) in enumerate(zip(shards, beside, strict=True)):
        index = reader.sources.index(number)
        for sample in range(len(index)):
            key = index.key(sample)
            content = found.get((key, ending))
            if content is None:
                raise DataError(f"{shard}: sample {key!r} has no {ending} beside it")
            texts.append(content)
            if group_ending:
                groups.append(_group(f"{shard}: sample {key!r}", found.get((key, group_ending)), spec.groups))
    members = Members(count=len(texts), groups=groups)
    if ending == ".cls":
        members.labels = np.array([_class_of(spec, text) for text in texts], dtype=np.int64)
    elif ending == ".npy":
        members.labels = np.stack([_classes_of(spec, text) for text in texts])
    else:
        members.captions = [_captions_of(spec, text) for text in texts]
    return members


def _small_members(shard: str, endings: tuple[str, ...]) -> dict[tuple[str, str], bytes]:
    """(key, ending) -> content; a key is the name without its ending, and without all that follows its first dot.

    Empty for a file that is no tar: the reader says what it is instead.
    """
    found: dict[tuple[str, str], bytes] = {}
    try:
        opened = tarfile.open(shard, "r:")  # noqa: SIM115  # closed below
    except tarfile.ReadError:
        return found
    except OSError as error:
        raise DataError(f"{shard} cannot be read ({error.strerror})") from None
    try:
        with opened as tar:
            for member in tar:
                ending = next((e for e in endings if member.name.lower().endswith(e)), None)
                if ending is None or not member.isreg():
                    continue
                file = tar.extractfile(member)
                content = file.read(_SMALL_BYTES) if file is not None else b""
                name = member.name[: -len(ending)]
                folder, slash, base = name.rpartition("/")
                for key in (name, f"{folder}{slash}{base.partition('.')[0]}"):
                    found.setdefault((key, ending), content)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{shard} cannot be read to its end ({error}): complete the download") from None
    return found


def _class_of(spec: SetSpec, text: bytes) -> int:
    word = text.strip()
    if not word.isdigit():
        raise DataError(f"set {spec.name}: the label {word[:20]!r} of a .cls is no class number")
    return int(word)


def _classes_of(spec: SetSpec, content: bytes) -> np.ndarray:
    try:
        with ONE_THREAD.lock:
            labels = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"set {spec.name}: a .npy of labels cannot be read ({error})") from None
    if labels.ndim != 1 or not np.isin(labels, (0, 1)).all():
        raise DataError(f"set {spec.name}: a .npy of labels is one row of 0 and 1, not {labels.dtype} {labels.shape}")
    return labels.astype(np.uint8)


def _captions_of(spec: SetSpec, content: bytes) -> list[str]:
    try:
        return caption_lines(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"set {spec.name}: a .txt is not UTF-8 ({content[:30]!r})") from None


def _group(where: str, content: bytes | None, groups: str) -> str:
    """groups: json:FIELD, or npy:COLUMN of a row of numbers, which is how DataComp's shards hold their metadata."""
    kind, _, name = groups.partition(":")
    try:
        if kind == "json":
            return str(json.loads(content or b"")[name])
        row = np.load(io.BytesIO(content or b""), allow_pickle=False)
        return str(row.reshape(-1)[int(name)])
    except (ValueError, KeyError, TypeError, EOFError, IndexError):
        raise DataError(f"{where} has no {groups} beside it, and the metric needs it") from None
