"""The link that readers follow: moved to a verified output in one rename, and back."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from genrec import files
from genrec.batch.output import verify
from genrec.errors import StorageError


def publish(folder: Path, link: Path) -> None:
    """Move the symbolic link ``link`` to the output ``folder``; where it led before is remembered as ``LINK.previous``.

    Readers of ``link`` see the old output or the new one, whole, at any moment. The target is relative, so that both
    can be moved together. Where ``link`` leads to ``folder`` already, nothing changes.

    Raises:
        StorageError: The output is not whole (see ``verify``), something that is no link has one of the two names, or
            the operating system refused.
    """
    folder, link = Path(folder), Path(link)
    before = _target(link)
    _target(_previous(link))
    verify(folder)
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(folder.resolve(), link.parent.resolve())
    except OSError as error:
        raise _refused(link, error) from error
    if before == target:
        return
    if before is not None:
        _point(_previous(link), before)
    _point(link, target)


def publish_back(link: Path) -> None:
    """Let ``link`` lead again to where it led before, which is verified, and ``LINK.previous`` to where it leads now.

    Raises:
        StorageError: There is no output before, it is not whole, or as ``publish``.
    """
    link = Path(link)
    now, before = _target(link), _target(_previous(link))
    if now is None or before is None:
        raise StorageError(
            f"there is no way back: {_previous(link) if now is not None else link} does not exist. "
            f"Name the output: genrec publish DIR --link {link}"
        )
    verify(link.parent / before)
    _point(link, before)
    _point(_previous(link), now)


def _previous(link: Path) -> Path:
    return link.with_name(f"{link.name}.previous")


def _target(link: Path) -> str | None:
    """What a link says; None where there is none."""
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return None
    except OSError as error:
        if link.is_symlink() or not link.exists():
            raise _refused(link, error) from error
        raise StorageError(f"{link} is no symbolic link. Name another --link, or move it away.") from error


def _point(link: Path, target: str) -> None:
    """Make or move a link in one rename."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target, target_is_directory=True)
        temporary.replace(link)
        files.sync_folder(link.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _refused(link, error) from error


def _refused(link: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot make the link {link}: {error.strerror or error}. See to it, and publish again.")
