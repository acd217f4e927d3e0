"""Files that are on disk when they are said to be; no torch, because a start looks for checkpoints before it."""

import os
from pathlib import Path

from engine.checkpoint.format.errors import CheckpointError

MANIFEST = "manifest.json"


def write_synced(path: Path, content: bytes) -> None:
    """Write and fsync a small file. Raises CheckpointError when the disk refuses."""
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"writing {path} failed: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (a rename is not, until its folder is synced)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
