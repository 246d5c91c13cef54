from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_output import run

from genrec.batch.output import verify
from genrec.batch.publication import publish, publish_back
from genrec.errors import StorageError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("monday", "tuesday", "wednesday"):
        run(tmp_path / "recs" / name)
    return tmp_path


def leads(link: Path) -> str:
    verify(link)
    return link.resolve().name


def test_link_goes_forth_and_back(root: Path) -> None:
    link, before = root / "serve" / "current", root / "serve" / "current.previous"
    publish(root / "recs" / "monday", link)
    assert (leads(link), before.exists()) == ("monday", False)
    publish(root / "recs" / "tuesday", link)
    assert (leads(link), leads(before)) == ("tuesday", "monday")
    publish(root / "recs" / "wednesday", link)
    assert (leads(link), leads(before)) == ("wednesday", "tuesday")
    publish_back(link)
    assert (leads(link), leads(before)) == ("tuesday", "wednesday")
    publish_back(link)
    assert (leads(link), leads(before)) == ("wednesday", "tuesday")
    assert sorted(os.listdir(root / "serve")) == ["current", "current.previous"]


def test_publishing_again_keeps_the_way_back(root: Path) -> None:
    link = root / "current"
    for name in ("monday", "tuesday", "tuesday"):
        publish(root / "recs" / name, link)
    assert (leads(link), leads(root / "current.previous")) == ("tuesday", "monday")


def test_links_move_with_what_they_lead_to(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root / "recs")
    publish(Path("monday"), Path("current"))
    publish(Path("tuesday"), Path("../recs/current"))
    assert os.readlink("current") == "tuesday"
    shutil.move(root / "recs", root / "moved")
    assert leads(root / "moved" / "current") == "tuesday"
    publish_back(root / "moved" / "current")
    assert leads(root / "moved" / "current") == "monday"


def test_link_through_a_link(root: Path) -> None:
    (root / "alias").symlink_to(root / "recs", target_is_directory=True)
    publish(root / "alias" / "monday", root / "alias" / "current")
    assert os.readlink(root / "recs" / "current") == "monday"


def test_broken_output_is_not_published(root: Path) -> None:
    link = root / "current"
    publish(root / "recs" / "monday", link)
    (root / "recs" / "tuesday" / "part-00001.parquet").unlink()
    with pytest.raises(StorageError, match=r"part-00001.parquet is missing"):
        publish(root / "recs" / "tuesday", link)
    assert leads(link) == "monday"
    assert not (root / "current.previous").exists()


def test_nobody_goes_back_to_a_broken_output(root: Path) -> None:
    link = root / "current"
    publish(root / "recs" / "monday", link)
    publish(root / "recs" / "tuesday", link)
    shutil.rmtree(root / "recs" / "monday")
    with pytest.raises(StorageError, match="holds no batch job"):
        publish_back(link)
    assert leads(link) == "tuesday"


def test_no_way_back(root: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no way back: .*current does not exist. Name the output: genrec"):
        publish_back(root / "current")
    publish(root / "recs" / "monday", root / "current")
    with pytest.raises(StorageError, match=r"there is no way back: .*current.previous does not exist"):
        publish_back(root / "current")


@pytest.mark.parametrize("name", ["current", "current.previous"])
@pytest.mark.parametrize("folder", [False, True])
def test_what_is_no_link_is_left_alone(root: Path, name: str, folder: bool) -> None:
    path = root / name
    if folder:
        path.mkdir()
    else:
        path.write_text("mine")
    for call in (lambda: publish(root / "recs" / "monday", root / "current"), lambda: publish_back(root / "current")):
        with pytest.raises(StorageError, match=f"{name} is no symbolic link. Name another --link, or move it away"):
            call()
    assert path.is_dir() == folder
    assert not path.is_symlink()


@pytest.mark.parametrize("call", range(3))
def test_refused_rename_leaves_a_whole_output_behind_the_link(
    root: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    link = root / "current"
    publish(root / "recs" / "monday", link)
    real, calls = os.replace, [0]

    def refusing(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == call + 1:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(os, "replace", refusing)
    if call < 2:
        with pytest.raises(StorageError, match=r"cannot make the link .*current.*: No space left on device. See to it"):
            publish(root / "recs" / "tuesday", link)
        assert leads(link) == "monday"
    else:
        publish(root / "recs" / "tuesday", link)
        assert leads(link) == "tuesday"
    assert not [name for name in os.listdir(root) if name.endswith(".tmp")]


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(root: Path) -> None:
    (root / "serve").mkdir(mode=0o500)
    with pytest.raises(StorageError, match=r"cannot make the link .*serve/current: Permission denied"):
        publish(root / "recs" / "monday", root / "serve" / "current")


def test_a_link_in_a_folder_that_is_a_file_is_refused_with_its_name(root: Path) -> None:
    (root / "serve").write_text("mine")
    with pytest.raises(StorageError, match=r"cannot make the link .*serve/current: Not a directory"):
        publish(root / "recs" / "monday", root / "serve" / "current")
    with pytest.raises(StorageError, match=r"cannot make the link .*serve/current: Not a directory"):
        publish_back(root / "serve" / "current")


def test_a_folder_that_cannot_be_made_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refusing)
    with pytest.raises(StorageError, match=r"cannot make the link .*serve/current: Read-only file system\. See to it"):
        publish(root / "recs" / "monday", root / "serve" / "current")


def test_folders_above_the_link_are_made_and_a_stale_temporary_one_goes(root: Path) -> None:
    link = root / "serve" / "eu" / "current"
    publish(root / "recs" / "monday", link)
    (link.parent / f".current.{os.getpid()}.tmp").symlink_to("nowhere")
    publish(root / "recs" / "tuesday", link)
    assert leads(link) == "tuesday"
    assert sorted(os.listdir(link.parent)) == ["current", "current.previous"]
