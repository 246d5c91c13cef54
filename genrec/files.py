"""Files and folders that are written whole or not at all: temporary name, fsync, rename. Knows no formats."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from genrec.errors import GenrecError, StorageError


def _sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk; a system that cannot flush folders (Windows, some mounts) is let be."""
    unable = (errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in unable:
            raise


def _foreign(error: Exception, path: Path, temporary: Path) -> str | None:
    """The file that an error is about, where that is not what was being written: a file read on the way, say."""
    name = getattr(error, "filename", None)
    if not isinstance(error, OSError) or not isinstance(name, str | os.PathLike):
        return None
    found = Path(name).absolute()
    own = found in (path, temporary, *path.parents) or temporary in found.parents
    return None if own else str(name)


def _refusal(error: Exception) -> str | None:
    """What the operating system said when it refused, or None where ``error`` is something else.

    Libraries written in Rust (polars, safetensors, tokenizers) raise errors of their own that end in "(os error 28)".
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = None if isinstance(error, GenrecError) else re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(code[1])) if code else None


@contextmanager
def _refusals(path: Path, temporary: Path) -> Iterator[None]:
    """Raise a StorageError for everything that the operating system refuses, whichever library was writing."""
    try:
        yield
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        foreign = _foreign(error, path.absolute(), temporary.absolute())
        if foreign is not None:
            raise StorageError(
                f"{foreign}: {reason}. {path} was not written. See to that file, and run the same command again."
            ) from error
        raise StorageError(
            f"cannot write {path}: {reason}. Nothing was left half-written; "
            "free some space or choose another place, and run the same command again."
        ) from error


def _take_name(temporary: Path, path: Path, *, durable: bool = False) -> None:
    """Rename. The new content is whole from here on, so only ``durable`` calls it a failure that the folder cannot be
    flushed: an error is told once, so there is no second try."""
    temporary.replace(path)
    with nullcontext() if durable else suppress(OSError):
        sync_folder(path.parent)


def _restore(path: Path) -> None:
    """Give ``path`` back the folder that a killed process had put aside; remove it where a new one took the name."""
    stale = re.compile(rf"\.{re.escape(path.name)}\.\d+\.old")
    for old in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
        if stale.fullmatch(old.name):
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.replace(path)


@contextmanager
def new_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; on success it takes the name ``path``, on failure it is gone.

    With ``durable`` a folder that the disk refuses to flush is a failure as well: what is told of the file elsewhere
    (a job's manifest) must not outlive its name. The new content, which is whole, stays under ``path`` then.

    Raises:
        StorageError: The operating system refused (disk full, no permission); nothing stands under ``path`` that
            did not stand there before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _refusals(path, temporary):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _sync(temporary)
            _take_name(temporary, path, durable=durable)
        finally:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it takes the name ``path``, on failure it is gone.

    With ``overwrite`` an existing folder is replaced: the old one stands until the new one is complete. A process that
    is killed between the two renames leaves the old one as ``.NAME.PID.old``; the next call puts it back first.

    Raises:
        StorageError: ``path`` exists and ``overwrite`` is off, or the operating system refused; what stood under
            ``path`` before stands there still.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    with _refusals(path, temporary):
        _restore(path)
        if path.exists() and not overwrite:
            raise StorageError(f"{path} exists already. Choose another name, or replace it: --overwrite.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            readable = temporary.stat().st_mode & 0o666  # Some writers make files that nobody else can read.
            for entry in sorted(temporary.rglob("*")):
                if entry.is_file():
                    entry.chmod(readable)
                _sync(entry)
            _sync(temporary)
            if path.exists():
                path.replace(old)
            _take_name(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            if old.exists() and not path.exists():
                old.replace(path)
            shutil.rmtree(temporary, ignore_errors=True)


def shipped() -> Path:
    """The workspace that genrec ships: inside the wheel, or the repository root of an editable install."""
    package = Path(__file__).parent
    inside = package / "_workspace"
    return inside if inside.is_dir() else package.parent


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's content, as ``sha256sum`` tells it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(*paths: Path) -> str:
    """SHA-256 (hex) over the contents of ``paths``, in the order given, each with its length before it."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.stat().st_size}:".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def content_names(folder: Path) -> list[str]:
    """Names of the files below ``folder``, relative to it and sorted; hidden ones, the system's, are left out."""
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [name.as_posix() for name in found if not any(part.startswith(".") for part in name.parts)]


def content_hashes(folder: Path) -> dict[str, str]:
    """``file_hash`` of each of ``content_names``."""
    return {name: file_hash(folder / name) for name in content_names(folder)}


def text_hash(*parts: str) -> str:
    """SHA-256 (hex) over ``parts``, each with its length before it, so that no two lists of parts collide."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()
