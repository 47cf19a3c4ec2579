"""Files and folders, written whole or not at all, and read within bounds."""

import os
import re
import shutil
import uuid
from pathlib import Path

from .safetensors import CheckpointError


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, or replace it, so that there is never half of it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write_synced(temporary, content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_text(path: Path, most: int = 2**24) -> str:
    """A text file of at most `most` bytes.

    Raises
    ------
    CheckpointError
        If it is missing, longer, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise CheckpointError(f"{path}: longer than {most} bytes")
        return content.decode()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not text in UTF-8") from error


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed had half written there, by the names that this file gives it."""
    for leftover in folder.glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", leftover.name):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
