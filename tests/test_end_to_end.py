"""The documents carried out: the guide from top to bottom, and the README's Python.

Quickly, in this process and with a shorter training; and, marked slow, exactly as a reader does it: every block in a
process of its own, nothing changed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pytest
from polars.testing import assert_frame_equal

import genrec
from genrec.cli import main

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "own-data.md"
PROMPTS = ROOT / "docs" / "prompts.md"
SHORTER = ("training.num_train_epochs", 2)  # What the quick run changes, as the guide says that one can.


class Block(NamedTuple):
    """A fenced block of a document, and the last file that the text before it names in backticks."""

    language: str
    text: str
    file: str


def blocks(document: Path, section: str = "") -> Iterator[Block]:
    """The blocks of a document, or of the one section of it that has this heading."""
    text = document.read_text("utf-8")
    if section:
        _, text = text.split(f"\n## {section}\n")
        text = text.split("\n## ")[0]
    before = ""
    for match in re.finditer(r"(.*?)^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        before += match[1]
        files = re.findall(r"`([\w./-]+\.(?:toml|csv|jinja))`", before)
        yield Block(match[2], match[3], files[-1] if files else "")


def readme_python() -> str:
    (block,) = (block.text for block in blocks(ROOT / "README.md") if block.language == "python")
    return block


class Reader:
    """Somebody who does what a document says, and notes what each command printed.

    Attributes:
        folder: Where the shell stands.
        quick: In this process with a shorter training, or as it stands in processes of its own.
        printed: (command, standard output) of every command, in order.
    """

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.printed: list[tuple[str, str]] = []

    def shell(self, line: str) -> None:
        """Run one line of a bash block."""
        words = shlex.split(line, comments=True)
        if words[0] == "cd":
            self.folder = self.folder / words[1]
            return
        assert words[0] == "genrec", f"the guide runs {words[0]}"
        if words[1] == "train" and self.quick:
            key, value = SHORTER
            words.append(f"{key}={value}")
        self.printed.append((line, self._genrec(words) if self.quick else self._process("bash", "-c", line)))

    def python(self, code: str) -> str:
        """Run a Python block, by itself."""
        if not self.quick:
            return self._process(sys.executable, "-c", code)
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "<document>", "exec"), {"__name__": "__main__"})
        return out.getvalue()

    def _genrec(self, words: list[str]) -> str:
        """What the console script does, without loading torch anew for every command."""
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(io.StringIO()) as out,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as stopped:
                main()
        assert not stopped.value.code, shlex.join(words)
        return out.getvalue()

    def _process(self, *command: str) -> str:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            command, cwd=self.folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def follow(self, block: Block) -> None:
        """Do what a block is there for: run it, write it, put it in the place of a line, or compare it."""
        file = self.folder / block.file
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                self.shell(line)
        elif block.language == "python":
            self.python(block.text)
        elif block.language == "toml":
            file.write_text(block.text)
        elif block.language == "jinja":
            *head, last = file.read_text().splitlines()
            tag = block.text[: block.text.index("%}")]
            assert last.startswith(tag)
            file.write_text("\n".join([*head, block.text]))
        elif block.language not in ("console", "text"):  # What nobody here can run, or is printed, is there to be read.
            assert block.language == "csv", f"nobody knows what to do with a block of {block.language!r}"
            assert file.read_text().startswith(block.text), f"{block.file} begins otherwise than the guide says"


def ids_in(text: str) -> list[str]:
    return re.findall(r"\b[a-z]+-\d+\b", text)


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["quick", "as it stands"])
def test_guide_and_readme(tmp_path: Path, quick: bool) -> None:
    reader = Reader(tmp_path, quick=quick)
    lists = pl.DataFrame()
    for block in blocks(GUIDE):
        if "genrec train" in block.text and block.language == "bash" and lists.is_empty():
            # The README's reader has the same files, recipe and base, and goes on in Python.
            shutil.copytree(reader.folder, tmp_path / "readme")
        reader.follow(block)
        if "genrec batch" in block.text:
            lists = pl.read_parquet(reader.folder / "recommendations" / "shop" / "*.parquet")
    check_data(reader)
    check_lists(reader, lists)
    check_report(reader.folder / "eval" / "results" / "shop.json")
    check_edited_prompt(reader)
    check_prompt_guide(reader)

    shutil.copy(reader.folder / "eval" / "shop.toml", tmp_path / "readme" / "eval")
    recipe = tmp_path / "readme" / "adapters" / "shop.toml"
    if quick:
        name, value = SHORTER[0].split(".")[1], SHORTER[1]
        recipe.write_text(re.sub(rf"^{name} = .*$", f"{name} = {value}", recipe.read_text(), flags=re.MULTILINE))
    printed = Reader(tmp_path / "readme", quick=quick).python(readme_python())
    check_readme(tmp_path / "readme", printed, lists)
    if not quick:
        rows = json.loads((reader.folder / "eval" / "results" / "shop.json").read_text())["rows"]
        assert rows["shop"]["ndcg@10"]["low"] > rows["popularity"]["ndcg@10"]["high"]  # It has learnt something.


def check_data(reader: Reader) -> None:
    """The data set holds the catalogue and the purchases of the files, no more and no less."""
    with open(reader.folder / "log.csv", newline="", encoding="utf-8") as file:
        bought = [row for row in csv.DictReader(file) if row["event"] == "purchase"]
    with open(reader.folder / "items.csv", newline="", encoding="utf-8") as file:
        items = list(csv.DictReader(file))
    data = genrec.Dataset.load(reader.folder / "data" / "shop")
    assert data.interactions.height == len(bought)
    assert set(data.user_ids) == {row["customer"] for row in bought}
    assert data.item_ids == [row["sku"] for row in items]
    assert data.items["categories"].to_list() == [row["categories"].split("|") for row in items]
    (inspected,) = (text for command, text in reader.printed if "inspect" in command)
    for count in (len(data.user_ids), len(items), len(bought)):
        assert str(count) in inspected


def check_lists(reader: Reader, lists: pl.DataFrame) -> None:
    """Every list holds as many items of the catalogue as were asked for, best first, and none of the history."""
    data = genrec.Dataset.load(reader.folder / "data" / "shop")
    history = dict(data.history_frame().iter_rows())
    commands = [(shlex.split(line), text) for line, text in reader.printed if line.startswith("genrec recommend")]
    assert len(commands) >= 3
    for words, text in commands:
        if "--user" in words:
            seen = history[words[words.index("--user") + 1]]
        else:
            seen = ids_in(words[words.index("--history") + 1])
        found = [item["item_id"] for item in json.loads(text)] if "--json" in words else ids_in(text)
        assert len(set(found)) == int(words[words.index("-k") + 1])
        assert set(found) <= {*data.item_ids} - {*seen}

    assert lists["user_id"].unique(maintain_order=True).to_list() == data.user_ids
    assert lists.height == 10 * len(data.user_ids)
    for (user,), rows in lists.group_by("user_id", maintain_order=True):
        assert rows["rank"].to_list() == list(range(1, 11))
        assert rows["score"].is_sorted(descending=True)
        assert {*rows["item_id"]} <= {*data.item_ids} - {*history[user]}


def check_report(path: Path) -> None:
    report = json.loads(path.read_text())
    assert [*report["rows"]] == ["popularity", "item_knn", "transitions_text", "shop"]
    assert report["protocol"]["catalogue"] == 60
    for row in report["rows"].values():
        assert {"recall@5", "recall@10", "ndcg@5", "ndcg@10"} <= {*row}
        for value in row.values():
            if "low" in value:
                assert 0 <= value["low"] <= value["mean"] <= value["high"] <= 1
    assert path.with_suffix(".md").is_file()


def check_edited_prompt(reader: Reader) -> None:
    """The edited prompt was rendered with titles, and is what the adapter trained on it reads; the first stays."""
    ((_, checked), (_, rendered)) = ((line, text) for line, text in reader.printed if "prompts" in line)
    assert "good" in checked
    first, recommender = (
        genrec.Recommender.load(reader.folder / "adapters" / name, engine="dummy") for name in ("shop", "shop-titles")
    )
    history, _ = recommender.user_history("c1", reader.folder / "data" / "shop")
    titles = [recommender.titles[index] for index in recommender.indices(history)]
    assert history
    for text in (rendered, recommender.prompt(history)):
        assert all(title in text for title in titles)
    assert titles[0] not in first.prompt(history)


def check_prompt_guide(reader: Reader) -> None:
    """The guide to prompts, which goes on in the workspace of the guide to data."""
    done = len(reader.printed)
    for block in blocks(PROMPTS, "Write your own prompt in ten minutes"):
        reader.follow(block)
    printed = {tuple(shlex.split(line)[1:3]): text for line, text in reader.printed[done:]}
    assert "prompts/mine.jinja" in printed["prompts", "new"]
    assert printed["prompts", "check"] == "prompts/mine.jinja: good\n"
    assert "Brand 1" in printed["prompts", "render"]
    assert "(not as trained)" in printed["prompts", "diff"]
    adapter = genrec.Recommender.load(reader.folder / "adapters" / "shop-mine", engine="dummy").adapter
    assert adapter.prompt.source == (reader.folder / "prompts" / "mine.jinja").read_text()
    (compared,) = (text for line, text in reader.printed if "--compare" in line and line.startswith("genrec eval"))
    assert "mine" in compared
    rows = json.loads((reader.folder / "eval" / "results" / "shop-mine.json").read_text())["rows"]
    assert {"shop", "mine"} <= {*rows}


def check_readme(folder: Path, printed: str, lists: pl.DataFrame) -> None:
    """The README's way gives what the guide's gives: the same lists, from the same data, recipe and base."""
    assert len({*ids_in(printed)}) == 5
    (jobs,) = {path.parent for path in (folder / "recommendations").glob("*/job.json")}
    again = pl.read_parquet(jobs / "*.parquet")
    assert_frame_equal(again.filter(pl.col("rank") <= 10), lists)


def test_readme_python_is_short() -> None:
    assert len([line for line in readme_python().splitlines() if line.strip()]) <= 14


def test_readme_commands_on_the_shop_are_those_of_the_guide() -> None:
    readme, guide = (
        {line for block in blocks(document) if block.language == "bash" for line in block.text.splitlines()}
        for document in (ROOT / "README.md", GUIDE)
    )
    on_the_shop = {line for line in readme if "shop" in line}
    assert on_the_shop
    assert on_the_shop <= guide
