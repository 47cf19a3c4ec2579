"""Files and folders that are written whole or not at all, and read within bounds."""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

MOST_LEVELS = 64  # of a JSON document


class CheckpointError(ValueError):
    """A file of a run or a checkpoint cannot be used; the message names the file and the fault.

    A message has at most about 2,000 characters: a damaged file may hold a string of ten megabytes.
    """

    def __init__(self, message: str):
        super().__init__(message if len(message) <= 2000 else f"{message[:1200]} [...] {message[-600:]}")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: renamed to it on success, removed on failure. Errors name `path`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with naming(path):
        try:
            yield temporary
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            remove(temporary)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system, such as a full disk, name this path."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write or replace a file; nobody ever sees half of it."""
    with whole(path) as temporary:
        write_synced(temporary, content)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder with its files, and the folders above it; all the files are there, or there is no folder."""
    make_parents(folder)
    with whole(folder) as temporary:
        temporary.mkdir()
        for name, content in files.items():
            write_synced(temporary / name, content)
        sync_folder(temporary)


def make_parents(path: Path) -> None:
    """Make the folders above a path, and wait until they are on the disk."""
    new = [parent for parent in path.parents if not parent.exists()]
    if not path.parents[len(new)].is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is not a folder", str(path.parents[len(new)]))
    path.parent.mkdir(parents=True, exist_ok=True)
    for parent in new:
        sync_folder(parent.parent)


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


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left behind."""
    for leftover in folder.glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", leftover.name):
            remove(leftover)


def open_regular(path: Path) -> BinaryIO:
    """A regular file, open to read; a pipe or a device is refused and never waited for."""
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path}: is not a regular file")
    return file


def read_bytes(path: Path, most: int = 2**32) -> bytes:
    """The content of a regular file of at most `most` bytes."""
    with open_regular(path) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > most:
        raise CheckpointError(f"{path}: longer than {most} bytes")
    return content


def read_text(path: Path, most: int = 2**24) -> str:
    """The text of a UTF-8 file of at most `most` bytes."""
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not text in UTF-8") from error


def json_object(document: str | bytes, name: str) -> dict[str, Any]:
    """The JSON object in a document from anywhere; errors begin with `name`.

    No name occurs twice in it, every number fits a float, and it is at most `MOST_LEVELS` deep.
    """

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(items)) < len(items):
            raise CheckpointError(
                f"{name.rstrip(':')}: {Counter(key for key, _ in items).most_common(1)[0][0]!a} occurs twice"
            )
        return dict(items)

    try:
        content = json.loads(document, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number without end, or too deep
        raise CheckpointError(f"{name} is not JSON: corrupted, or another kind of file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} is not a JSON object")
    level: list[Any] = [content]
    for _ in range(MOST_LEVELS):
        if any(type(x) in (int, float) and not abs(x) <= sys.float_info.max for x in level):
            raise CheckpointError(f"{name} has a number that is infinite or not a number")
        level = [
            x
            for each in level
            if isinstance(each, dict | list)
            for x in (each.values() if isinstance(each, dict) else each)
        ]
    if level:
        raise CheckpointError(f"{name} is deeper than {MOST_LEVELS} levels")
    return content
