"""Prompts: Jinja files that people edit, checked when they are loaded and rendered to segments.

A prompt file has the blocks ``system`` and ``user`` and one of ``item`` and ``assistant``:

* A *sequence prompt* (block ``item``) is a head (system and user, which may read ``user``, the row of the users table,
  and ``context``, what is known of the moment) followed by the items of the history. ``item`` renders one event, its
  identifier first. Every identifier is trained.
* A *question prompt* (block ``assistant``) asks about one ``item``, or about a ``history`` (oldest first) whose next
  item is ``item``, or about one ``event``: what the interactions table says of it (rating, event, ...) is the answer,
  and the question may read the ``item`` that it is about and the ``history`` before it. The answer is trained.

``genrec.templates`` says what the blocks may compute, and why no data passes for words of the template.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from jinja2 import Template, TemplateError

from genrec.errors import PromptError, suggestion
from genrec.templates import (
    Inspection,
    ItemRef,
    Problem,
    Segment,
    contract,
    failed_at,
    line_column,
    lines_told,
    template,
)

__all__ = ["ItemRef", "Problem", "Prompt", "Segment", "changes", "check", "list_prompts"]
_SAMPLE = 1000  # Items that a prompt is tried with, at most.


class Tokens(Protocol):
    """What ``check`` asks of a ``genrec.tokenization.Tokenization``, which is built on this module."""

    tokenizer: Any
    items: Any
    max_length: int

    def head_ids(self, prompt: Prompt, user: None = None, /) -> np.ndarray: ...
    def history_budget(self, head: np.ndarray, /) -> int: ...
    def fragment_lengths(self, prompt: Prompt, history: np.ndarray, /) -> np.ndarray: ...
    def question(self, prompt: Prompt, item: int, /) -> Any: ...
    def question_ids(self, prompt: Prompt, item: int, /, *, room: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Prompt:
    """A prompt that keeps the contract; made by ``load`` or ``parse``, safe to share between threads.

    Attributes:
        name: The file's name without ``.jinja``.
        source: The text of the file, with ``\\n`` line ends.
        hash: SHA-256 (hex) of ``source``.
        contract: SHA-256 (hex) of what the model sees of it. Files of one contract make the same tokens of the same
            rows; comments, and space at the edges of blocks (but not of ``item``), are not among it.
        kind: "sequence" or "question".
        subject: What a question is about, "item", "history" or "event"; None for a sequence prompt.
        reads: The columns read of "item", "history" (the items before), "user", "context" and "event"; ``identifier``
            is not among them.
        blocks: The names of its blocks.

    Examples:
        >>> head = "{% block user %}For {{ user.name }}:{% endblock %}"
        >>> prompt = Prompt.parse(head + "{% block item %}{{ item.identifier }}{% endblock %}", "mine")
        >>> prompt.kind, prompt.reads["user"]
        ('sequence', {'name'})
        >>> [segment.text for segment in prompt.render("user", user={"name": "Ann"})]
        ['For ', 'Ann', ':']
        >>> prompt.check(user_columns=["user_id", "nome"])[0].column
        29
    """

    name: str
    source: str
    hash: str
    contract: str
    kind: Literal["sequence", "question"]
    subject: Literal["item", "history", "event"] | None
    reads: dict[str, set[str]]
    blocks: tuple[str, ...]
    _where: str = field(repr=False, compare=False)
    _template: Template = field(repr=False, compare=False)

    @classmethod
    def load(cls, path: str | Path) -> Prompt:
        """Read a prompt file.

        Raises:
            PromptError: No such file, or the first breach of the contract as ``file:line:column``.
        """
        return _build(_read(Path(path)), Path(path).stem, str(path))

    @classmethod
    def parse(cls, source: str, name: str) -> Prompt:
        """Make a prompt from its text. Raises PromptError as ``load`` does."""
        return _build(source, name, name)

    def render(self, block: str, **variables: Any) -> list[Segment]:
        """The segments of a block; none for a ``system`` or ``user`` that the file does not have.

        Variables are plain rows: ``item``, ``user``, ``context`` and ``event`` dicts, ``history`` a list of dicts
        (oldest first), with ``"identifier": ItemRef(i)`` in the items' rows. Neighbours of one kind are merged, but for
        identifiers; empty texts are left out. White space that the template writes at the edges of a block is dropped,
        except in ``item``, which keeps the text exactly as it stands between the tags.

        Raises:
            PromptError: A column that a row lacks, a value that has no plain text, or no such block.
        """
        if block not in self.blocks:
            if block in ("system", "user"):
                return []
            raise PromptError(f"{self._where}: this {self.kind} prompt has no block `{block}`.")
        segments: list[Segment] = []
        try:
            for piece in self._template.blocks[block](self._template.new_context(variables)):
                segment: Any = Segment("template", piece) if type(piece) is str else piece
                if segment.kind != "identifier":
                    if not segment.text:
                        continue
                    if segments and segments[-1].kind == segment.kind:
                        segment = Segment(segment.kind, segments.pop().text + segment.text)
                segments.append(segment)
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise self._failure(block, variables, error) from error
        if block != "item" and segments:
            if segments[0].kind == "template":
                segments[0] = Segment("template", segments[0].text.lstrip())
            if segments[-1].kind == "template":
                segments[-1] = Segment("template", segments[-1].text.rstrip())
            segments = [segment for segment in segments if segment.text or segment.kind == "identifier"]
        return segments

    def check(
        self,
        item_columns: Iterable[str] | None = None,
        user_columns: Iterable[str] | None = None,
        event_columns: Iterable[str] | None = None,
        tokenization: Tokens | None = None,
    ) -> list[Problem]:
        """What makes a prompt that loads other than it seems: see the function ``check``. Training refuses it."""
        columns = {"item": item_columns, "user": user_columns, "event": event_columns}
        found = Inspection(self.source)
        problems = found.all_problems(columns)
        if tokenization is not None:
            problems += self._spelled(found, tokenization)
            problems += [] if problems else self._unfit(found, tokenization)
        return sorted(problems)

    def _spelled(self, found: Inspection, tokenization: Tokens) -> Iterator[Problem]:
        """Words of the template that are spelled like a control or identifier token, and are read as plain text."""
        added = tokenization.tokenizer.get_added_vocab()
        for offset, text in found.texts:
            for match in re.finditer(r"<[^<>\s]{1,60}>|\[[^][\s]{1,60}\]", text):
                if match[0] in added:
                    message = f"`{match[0]}` is read as plain text, and never as the token of that name."
                    fix = "Remove it: the chat template stands around the blocks by itself."
                    yield Problem(*line_column(self.source, offset + match.start()), message, fix)

    def _unfit(self, found: Inspection, tokenization: Tokens) -> Iterator[Problem]:
        """The first thing that cannot be rendered or does not fit, for some items all over the catalogue."""
        n_items = len(tokenization.items)
        some = np.unique(np.linspace(0, n_items - 1, min(n_items, _SAMPLE)).astype(np.int64))
        block = "user" if "user" in found.blocks else self.blocks[0]
        try:
            if self.kind == "sequence":
                budget = tokenization.history_budget(tokenization.head_ids(self, None))
                block = "item"
                sizes = tokenization.fragment_lengths(self, some)
                longest = int(np.argmax(sizes))
                if sizes[longest] > budget:
                    item_id = tokenization.items["item_id"][int(some[longest])]
                    message = (
                        f"the item {item_id!r} takes {sizes[longest]} tokens, and the head leaves {budget} of the "
                        f"{tokenization.max_length} of max_length to the history, so that it is never read."
                    )
                    fix = "Shorten its text, as in {{ item.title | truncate(30) }}, or raise max_length."
                    yield Problem(*line_column(self.source, found.blocks[block].lineno), message, fix)
            for item in some.tolist() if self.kind == "question" else []:
                if self.subject == "event":  # Its answer is that of a row of the log.
                    tokenization.question_ids(self, item, room=1)
                else:
                    tokenization.question(self, item)
        except PromptError as error:
            told = str(error)
            place, fix = line_column(self.source, found.blocks[block].lineno), "Print another column, or guard it."
            if told.startswith(f"{self._where}:"):
                line, column, told = told[len(self._where) + 1 :].split(":", 2)
                place = int(line), int(column)
            else:
                told, _, fix = told.rpartition(". ")
                told += "."
            yield Problem(*place, told.strip(), fix)

    def _failure(self, block: str, variables: dict[str, Any], error: Exception) -> PromptError:
        """The error of rendering with the place in the prompt and the row."""
        line, column = line_column(self.source, failed_at(error, self._template))
        row = variables.get("item")
        which = f" (item_id {row['item_id']!r})" if isinstance(row, dict) and "item_id" in row else ""
        return PromptError(f"{self._where}:{line}:{column}: in block `{block}`{which}: {error}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return _build, (self.source, self.name, self._where)  # Compiled code does not pickle.


def changes(a: Prompt, b: Prompt, a_name: str, b_name: str) -> str:
    """The unified diff of two prompts of other contracts, without comments and blank lines where more differs."""
    told = lines_told(a.source), lines_told(b.source)
    if told[0] == told[1]:  # A blank line inside of a block.
        told = a.source.splitlines(), b.source.splitlines()
    return "\n".join(difflib.unified_diff(*told, a_name, b_name, lineterm=""))


def list_prompts(folder: str | Path) -> list[Path]:
    """The prompt files of a folder, sorted by name, valid or not. Raises PromptError when there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise PromptError(f"no folder of prompts at {folder}. Name one that holds *.jinja files.")
    return sorted(folder.glob("*.jinja"))


def check(
    path: str | Path,
    item_columns: Iterable[str] | None = None,
    user_columns: Iterable[str] | None = None,
    event_columns: Iterable[str] | None = None,
    tokenization: Tokens | None = None,
) -> list[Problem]:
    """All problems of a prompt file in the order of the file: what ``load`` refuses, and what only looks wrong.

    The latter are a question that tells its own answer, ``context`` that is known only afterwards, a loop variable that
    is not used; a history of which no item is told, an empty block and characters that nobody sees, which do no harm;
    and

    * where the columns of the items, users and interactions tables are given, columns that they lack, unless
      ``default`` follows them, or they are read where ``is defined`` or ``is not none`` has said that they are there;
    * where a ``genrec.tokenization.Tokenization`` is given, words that are spelled like a control token, and what
      cannot be rendered or does not fit ``max_length``, of up to 1,000 items spread over the catalogue.

    Raises:
        PromptError: No such file, or it is not UTF-8 text.
    """
    source = _read(Path(path))
    found = Inspection(source)
    if found.problems:
        problems = found.all_problems({"item": item_columns, "user": user_columns, "event": event_columns})
    else:
        prompt = _build(source, Path(path).stem, str(path))
        problems = prompt.check(item_columns, user_columns, event_columns, tokenization)
    return sorted([*problems, *found.remarks])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text (byte {error.start}). Save the file as UTF-8.") from error
    except OSError as error:
        there = sorted(other.name for other in path.parent.glob("*.jinja"))
        hint = suggestion(path.name, there) if there else "Name a *.jinja file."
        hint += " `genrec init` writes the shipped prompts that a workspace lacks."
        raise PromptError(f"cannot read the prompt {path}: {error.strerror}. {hint}") from error


def _build(source: str, name: str, where: str) -> Prompt:
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    found = Inspection(source)
    if found.problems:
        raise PromptError(f"{where}:{min(found.problems)}")
    reads: dict[str, set[str]] = {root: set() for root in ("item", "history", "user", "context", "event")}
    for read in found.reads:
        if read.column != "identifier" or read.root not in ("item", "history"):  # There alone it is no column.
            reads[read.root].add(read.column)
    digest = hashlib.sha256(source.encode()).hexdigest()
    return Prompt(
        name, source, digest, contract(source), found.kind, found.subject, reads, tuple(found.blocks), where,
        template(found.code),
    )  # fmt: skip
