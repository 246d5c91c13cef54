"""Files and folders that are written whole or not at all: temporary name, fsync, rename. Knows no formats."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genrec.errors import StorageError


def _sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; on success it takes the name ``path``, on failure it is gone.

    Raises:
        StorageError: The operating system refused (disk full, no permission); nothing stands under ``path`` that
            did not stand there before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}. Nothing was left half-written; "
            "free some space or choose another place, and run the same command again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it takes the name ``path``, on failure it is gone.

    With ``overwrite`` an existing folder is replaced: the old one stands until the new one is complete.

    Raises:
        StorageError: ``path`` exists and ``overwrite`` is off, or the operating system refused.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        if path.exists() and not overwrite:
            raise StorageError(f"{path} exists already. Remove it, or choose another name.")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            _sync(entry)
        _sync(temporary)
        if path.exists():
            path.replace(old)
        temporary.replace(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if old.exists() and not path.exists():
            old.replace(path)
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}. Nothing was left half-written; "
            "free some space or choose another place, and run the same command again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_hash(*paths: Path) -> str:
    """SHA-256 (hex) over the contents of ``paths``, in the order given, each with its length before it."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.stat().st_size}:".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def text_hash(*parts: str) -> str:
    """SHA-256 (hex) over ``parts``, each with its length before it, so that no two lists of parts collide."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()
