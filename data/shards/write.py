"""Writing tar shards in the layout that data/shards/index.py reads."""

import os
import tarfile
from collections.abc import Iterable, Mapping
from io import BytesIO


def write_shard(path: str, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Writes (key, {suffix: content}) samples as one tar, replacing `path` at the end.

    Times and owners are zero: the same samples give the same file.
    """
    temporary = f"{path}.tmp"
    with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples:
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    os.replace(temporary, path)
