from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from genrec.errors import DataError, StorageError
from genrec.files import file_hash, new_file, new_folder, sha256, text_hash, write_text

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def tree(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` with its text."""
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def save_file(path: Path) -> None:
    with new_file(path) as temporary:
        temporary.write_text("new")


def save_folder(path: Path) -> None:
    with new_folder(path, overwrite=True) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a").write_text("new")
        (folder / "b").write_text("new")


@contextmanager
def refusing(owner: Any, name: str, call: int) -> Iterator[list[int]]:
    """Let the ``call``-th call (from 0) of a function meet a full disk; the list counts the calls."""
    calls = [0]
    real = getattr(owner, name)

    def wrapper(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call + 1:
            raise FULL
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wrapper)
        yield calls


# Whole


def test_new_file_takes_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    with new_file(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("new")
        assert not path.exists()
    assert tree(tmp_path) == {"a/b.txt": "new"}
    write_text(path, "newer 三")
    assert tree(tmp_path) == {"a/b.txt": "newer 三"}


def test_new_folder_takes_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    save_folder(path)
    assert tree(tmp_path) == {"a/b/part/a": "new", "a/b/b": "new"}
    with pytest.raises(StorageError, match="exists already"), new_folder(path):
        pytest.fail("the body must not run")
    (path / "old").write_text("old")
    with new_folder(path, overwrite=True) as folder:
        (folder / "c").write_text("newer")
        assert (path / "old").exists()
    assert tree(tmp_path) == {"a/b/c": "newer"}


# Or not at all


@pytest.mark.parametrize("save", [save_file, save_folder])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(os, "fsync"), (Path, "replace"), (Path, "write_text"), (Path, "mkdir")],
    ids=["fsync", "replace", "write", "mkdir"],
)
@pytest.mark.parametrize("there", [False, True], ids=["nothing before", "something before"])
def test_failure_at_any_step_leaves_what_stood_there(
    save: Callable[[Path], None], owner: Any, name: str, there: bool, tmp_path: Path
) -> None:
    path = tmp_path / "out"
    with refusing(owner, name, -1) as calls:
        save(path)
    for file in (p for p in (path, *path.rglob("*")) if p.is_file()):
        file.write_text("old")
    if not there:
        path.rename(tmp_path / "aside")
    steps, before, names = calls[0], tree(tmp_path), os.listdir(tmp_path)
    steps += there and save is save_folder and name == "replace"  # The old folder is put aside first.
    steps -= name == "fsync"  # The last one flushes the folder around what is whole already.
    assert steps > 0
    for call in range(steps):
        with refusing(owner, name, call), pytest.raises(StorageError) as caught:
            save(path)
        assert str(caught.value).startswith(f"cannot write {path}: No space left on device. Nothing was left")
        assert tree(tmp_path) == before
        assert os.listdir(tmp_path) == names
    with refusing(owner, name, steps):
        save(path)
    assert {file.read_text() for file in (path, *path.rglob("*")) if file.is_file()} == {"new"}


def test_folder_that_cannot_be_flushed_is_a_failure_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for durable in (False, True):
        expected = pytest.raises(StorageError) if durable else nullcontext()
        with refusing(os, "fsync", 1), expected, new_file(path, durable=durable) as temporary:
            temporary.write_text("new")
        assert tree(tmp_path) == {"a.txt": "new"}
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):  # Some mounts say so to every flush of a folder.
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with new_file(path, durable=True) as temporary:
            temporary.write_text("newer")
    assert tree(tmp_path) == {"a.txt": "newer"}


@pytest.mark.parametrize("save", [new_file, new_folder])
def test_an_error_of_the_body_stays_what_it_is(save: Callable[[Path], Any], tmp_path: Path) -> None:
    for error in (KeyboardInterrupt(), ValueError("7"), DataError("x cannot be read: gone (os error 2)")):
        with pytest.raises(type(error)) as caught, save(tmp_path / "out"):
            raise error
        assert caught.value is error
        assert list(tmp_path.iterdir()) == []


def test_interrupted_exchange_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path / "out")
    before = tree(tmp_path)
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_folder(tmp_path / "out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("save", [save_file, save_folder])
def test_a_file_in_the_way(save: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(StorageError, match="cannot write"):
        save(tmp_path / "file" / "out")
    assert tree(tmp_path) == {"file": "old"}


def test_errors_of_other_libraries(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        pass

    for error in (
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("No space left on device (os error 28): 'x.parquet'"),
    ):
        match = r"cannot write .*out: No space left on device\."
        with pytest.raises(StorageError, match=match) as caught, new_file(tmp_path / "out"):
            raise error
        assert caught.value.__cause__ is error


WRITERS = {
    "polars": "import polars as pl; pl.DataFrame({'a': np.random.default_rng(0).random(9999)}).write_parquet(path)",
    "safetensors": "from safetensors.numpy import save_file; save_file({'a': np.zeros(99999, np.float32)}, path)",
    "python": "path.write_bytes(bytes(99999))",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_real_limit_is_a_storage_error(writer: str, tmp_path: Path) -> None:
    """No file may grow beyond 4 KB: the operating system refuses as it does on a full disk."""
    program = f"""
import resource, sys
from pathlib import Path
import numpy as np
from genrec.errors import StorageError
from genrec.files import new_file, new_folder

def write(path):
    {WRITERS[writer]}

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
out = Path(sys.argv[1])
for number, new in enumerate((new_file, new_folder)):
    try:
        with new(out / str(number)) as temporary:
            write(temporary if new is new_file else temporary / "x")
    except StorageError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(". ")[0] for line in lines] == [f"cannot write {tmp_path / n}: File too large" for n in "01"]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_read_is_named_and_not_called_unwritable(tmp_path: Path) -> None:
    gone = tmp_path / "weights"
    with pytest.raises(StorageError) as caught, new_folder(tmp_path / "out"):
        gone.read_bytes()
    assert str(caught.value).startswith(f"{gone}: No such file or directory. {tmp_path / 'out'} was not written.")
    with pytest.raises(StorageError, match=f"cannot write {tmp_path / 'out'}"), new_folder(tmp_path / "out") as folder:
        (folder / "missing" / "file").write_text("")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_a_killed_process_put_aside_comes_back(overwrite: bool, tmp_path: Path) -> None:
    old = tmp_path / ".out.123.old"
    other = tmp_path / ".out.b.123.old"  # Of a folder called out.b.
    for folder in (old, other):
        folder.mkdir()
        (folder / "a").write_text("old")
    with pytest.raises(DataError), new_folder(tmp_path / "out", overwrite=True):
        raise DataError("stopped")
    assert tree(tmp_path / "out") == {"a": "old"}
    old.mkdir()
    (old / "a").write_text("older")
    if overwrite:
        save_folder(tmp_path / "out")
        assert tree(tmp_path / "out") == {"part/a": "new", "b": "new"}
    else:
        with pytest.raises(StorageError, match="exists already"), new_folder(tmp_path / "out"):
            pytest.fail("the body must not run")
        assert tree(tmp_path / "out") == {"a": "old"}
    assert sorted(os.listdir(tmp_path)) == [other.name, "out"]


# Hashes


def test_file_hash(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"ab" * 2_000_000)
    b.write_bytes(b"c")
    assert sha256(b) == hashlib.sha256(b"c").hexdigest()
    assert file_hash(b) == hashlib.sha256(b"1:c").hexdigest()
    assert file_hash(a) == hashlib.sha256(b"4000000:" + a.read_bytes()).hexdigest()
    assert len({file_hash(), file_hash(a), file_hash(b), file_hash(a, b), file_hash(b, a)}) == 5
    before = file_hash(a, b)
    a.write_bytes(b"ab")
    b.write_bytes(b"ab" * 1_999_999 + b"c")
    assert file_hash(a, b) != before


def test_text_hash() -> None:
    assert text_hash("三") == hashlib.sha256("3:三".encode()).hexdigest()
    lists = [(), ("",), ("", ""), ("a", "b"), ("ab",), ("ab", ""), ("1:a",), ("b", "a"), ("\ud800",)]
    assert len({text_hash(*parts) for parts in lists}) == len(lists)
