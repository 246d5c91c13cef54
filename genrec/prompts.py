"""Prompts: Jinja files that people edit, checked when they are loaded and rendered to segments.

A prompt file has the blocks ``system`` and ``user`` and one of ``item`` and ``assistant``:

* A *sequence prompt* (block ``item``) is a head (system and user, which may read ``user``, the row of the users table)
  followed by the items of the history. ``item`` renders one event, its identifier first. Every identifier is trained.
* A *question prompt* (block ``assistant``) asks about one ``item``, or about a ``history`` (oldest first) whose next
  item is ``item``, or about one ``event``: what the interactions table says of it (rating, event, ...) is the answer,
  and the question may read the ``item`` that it is about and the ``history`` before it. The answer is trained.

Rendering gives segments, so that what came from data stays apart from what the template says: compiled blocks yield
text for the template's own words and a ``Segment`` for everything printed by ``{{ }}``; data never passes through
template text. A white list of syntax keeps templates harmless and linear in their data: no calls, no arithmetic, loops
only over given lists, and inside a loop only the loop's own variable. Jinja's names and rules hold, but for an empty
cell (``None``): it prints nothing, counts as false, loops zero times, and takes the ``default``.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined, nodes, pass_context
from jinja2.filters import do_title
from jinja2.lexer import TokenStream
from jinja2.nativetypes import NativeCodeGenerator
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from genrec.config import suggestion
from genrec.errors import PromptError

READABLE: dict[str, dict[str, tuple[str, ...]]] = {  # What each block may read.
    "sequence": {"system": ("user",), "user": ("user",), "item": ("item",)},
    "question": {"system": ("user",), "user": ("item", "history", "user"), "assistant": ("item", "event")},
}
LOOP_FIELDS = ("index", "index0", "first", "last", "length")
MAX_CHARACTERS = 65_536


@dataclass(frozen=True, slots=True)
class ItemRef:
    """What ``item.identifier`` is in the rows given to ``render``: an item index, whose tokens are spelled later."""

    index: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered block; ``text`` is empty and ``item`` the item index where ``kind`` is "identifier"."""

    kind: Literal["template", "data", "identifier"]
    text: str
    item: int = -1


@dataclass(frozen=True, order=True)
class Problem:
    """Something wrong with a prompt file: ``line`` and ``column`` count from 1; ``fix`` says what to write instead."""

    line: int
    column: int
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.line}:{self.column}: {self.message} {self.fix}"


@dataclass(frozen=True)
class Prompt:
    """A prompt that keeps the contract; made by ``load`` or ``parse``, safe to share between threads.

    Attributes:
        name: The file's name without ``.jinja``.
        source: The text of the file, with ``\\n`` line ends.
        hash: SHA-256 (hex) of ``source``.
        kind: "sequence" or "question".
        subject: What a question is about, "item", "history" or "event"; None for a sequence prompt.
        reads: The columns read of "item", "history" (the items before), "user" and "event"; ``identifier`` is not among
            them.
        blocks: The names of its blocks.
    """

    name: str
    source: str
    hash: str
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

        Variables are plain rows: ``item``, ``user`` and ``event`` dicts, ``history`` a list of dicts (oldest first),
        with ``"identifier": ItemRef(i)`` in the items' rows. Neighbours of one kind are merged, but for identifiers;
        empty texts are left out. White space that the template writes at the edges of a block is dropped, except in
        ``item``, which keeps the text exactly as it stands between the tags.

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
    ) -> list[Problem]:
        """What looks wrong in a prompt that loads: see the function ``check``."""
        return _Inspection(self.source).all_problems(item_columns, user_columns, event_columns)

    def _failure(self, block: str, variables: dict[str, Any], error: Exception) -> PromptError:
        """The error of rendering with the place in the prompt and the row."""
        offset, trace = 0, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == _FILENAME:
                offset = self._template.get_corresponding_lineno(trace.tb_lineno)
            trace = trace.tb_next
        line, column = _place(self.source, offset)
        row = variables.get("item")
        which = f" (item_id {row['item_id']!r})" if isinstance(row, dict) and "item_id" in row else ""
        return PromptError(f"{self._where}:{line}:{column}: in block `{block}`{which}: {error}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return _build, (self.source, self.name, self._where)  # Compiled code does not pickle.


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
) -> list[Problem]:
    """All problems of a prompt file in the order of the file: what ``load`` refuses, and what only looks wrong.

    The latter are a question that holds its own answer, a loop variable that is not used, and, where the columns of
    the items, users and interactions tables are given, columns that they lack, unless read under ``default`` or ``is
    defined``.

    Raises:
        PromptError: No such file, or it is not UTF-8 text.
    """
    return _Inspection(_read(Path(path))).all_problems(item_columns, user_columns, event_columns)


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
    found = _Inspection(source)
    if found.problems:
        raise PromptError(f"{where}:{min(found.problems)}")
    reads: dict[str, set[str]] = {"item": set(), "history": set(), "user": set(), "event": set()}
    for read in found.reads:
        if read.column != "identifier":
            reads[read.root].add(read.column)
    digest = hashlib.sha256(source.encode()).hexdigest()
    template = Template.from_code(_ENVIRONMENT, found.code, {})
    return Prompt(name, source, digest, found.kind, found.subject, reads, tuple(found.blocks), where, template)


def _place(source: str, offset: int) -> tuple[int, int]:
    """Line and column, from 1, of a character of ``source``."""
    return source.count("\n", 0, offset) + 1, offset - source.rfind("\n", 0, offset)


# ---- What templates may compute -------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """A plain value as text."""
    if isinstance(value, str | int | float | Undefined):  # Undefined raises, naming what is missing.
        return str(value)
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        raise TypeError('a list cannot be printed as it is: write `| join(", ")`, or loop over it')
    raise TypeError(f"a value of type {type(value).__name__} cannot be printed: make the column text or a number")


def _each(value: Any) -> Any:
    """What a loop runs over: a list, or nothing for an empty cell."""
    if isinstance(value, list | tuple | Undefined):
        return value
    if value is None or value == "":
        return ()
    raise TypeError(f"a list is needed, and this is {type(value).__name__} ({str(value)[:40]!r}): print it as it is")


def _truncate(value: Any, length: int = 255) -> str:
    """Text of at most ``length`` characters, cut at the end of a word if it can, "..." in place of what was cut."""
    text = _text(value)
    return text if len(text) <= length else text[: max(length - 3, 0)].rsplit(" ", 1)[0] + "..."


FILTERS: dict[str, tuple[Callable[..., Any], tuple[type, ...]]] = {  # name -> function, types of its arguments
    "default": (lambda value, other="": other if _empty(value) else value, (object,)),
    "first": (lambda value: (_each(value) or ("",))[0], ()),
    "int": (lambda value: int(float(value or 0)), ()),
    "join": (lambda value, separator="": separator.join(map(_text, _each(value))), (str,)),
    "last": (lambda value: (_each(value) or ("",))[-1], ()),
    "length": (lambda value: len(value if isinstance(value, list | tuple) else _text(value)), ()),
    "lower": (lambda value: _text(value).lower(), ()),
    "round": (lambda value, digits=0: round(float(value or 0), digits), (int,)),
    "title": (lambda value: do_title(_text(value)), ()),
    "trim": (lambda value: _text(value).strip(), ()),
    "truncate": (_truncate, (int,)),
    "upper": (lambda value: _text(value).upper(), ()),
}


def _empty(value: Any) -> bool:
    return isinstance(value, Undefined) or value is None or value == ""


@pass_context  # With the context, Jinja computes nothing that is printed while it compiles.
def _output(context: Any, value: Any) -> Segment:
    if type(value) is ItemRef:
        return Segment("identifier", "", value.index)
    return Segment("data", value if type(value) is str else _text(value))


class _Undefined(StrictUndefined):
    """Says which row lacks which column, once somebody uses it."""

    __slots__ = ()

    @property
    def _undefined_message(self) -> str:
        row, name = self._undefined_obj, self._undefined_name
        if isinstance(row, dict):
            return f"no column `{name}` in this row ({str(row)[:60]}). {suggestion(str(name), row)}"
        return f"`{name}` is not given here: guard it with `{{% if {name} is defined %}}`"


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja that yields values instead of text, looks names up in rows alone, and knows the column of every node."""

    code_generator_class = NativeCodeGenerator

    def _tokenize(
        self, source: str, name: str | None, filename: str | None = None, state: str | None = None
    ) -> TokenStream:
        """Tokens that carry their character offset where Jinja keeps the line, and hence nodes that do."""

        def located() -> Iterator[tuple[int, str, str]]:
            offset = 0
            try:
                for _, kind, text in self.lexer.tokeniter(source, name, filename, state):
                    offset = source.index(text, offset)  # Jinja drops nothing but white space.
                    yield offset, kind, text
                    offset += len(text)
            except TemplateSyntaxError as error:
                raise TemplateSyntaxError(error.message or "", offset) from error

        return TokenStream(self.lexer.wrap(located()), name, filename)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """A key of a dict and nothing else: attributes of Python objects are out of reach, whatever the syntax."""
        if isinstance(obj, dict):
            if attribute not in obj:
                return self.undefined(obj=obj, name=attribute)
            value = obj[attribute]
            return "" if value is None else value
        if isinstance(obj, LoopContext) and attribute in LOOP_FIELDS:
            return getattr(obj, attribute)
        return obj if isinstance(obj, Undefined) else self.undefined(name=attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self.getattr(obj, argument)


_FILENAME = "<genrec prompt>"
_ENVIRONMENT = _Environment(undefined=_Undefined, finalize=_output, optimized=False, autoescape=False)
_ENVIRONMENT.globals.clear()
_ENVIRONMENT.filters = {name: function for name, (function, _) in FILTERS.items()} | {"each": _each}
_ENVIRONMENT.tests = {"defined": lambda value: not isinstance(value, Undefined), "none": _empty}


# ---- What templates may say -----------------------------------------------------------------------------------------


class _Read(NamedTuple):
    """A column read in a block; ``guarded``, under ``default`` or ``is defined``, it may be missing."""

    block: str
    root: str
    column: str
    offset: int
    guarded: bool = False


def _problem(place: tuple[int, int], message: str, fix: str) -> Problem:
    return Problem(*place, f"{message}.", fix if fix.endswith(("?", ".")) else f"{fix}.")


def _start(node: nodes.Node) -> int:
    """The offset of the first character of an expression."""
    inner = getattr(node, "node", None)
    if isinstance(inner, nodes.Node) and not isinstance(node, nodes.Not):
        return _start(inner)
    return node.lineno if node.lineno is not None else _start(next(node.iter_child_nodes()))


class _Inspection:
    """Reads a source once: its blocks, what they read, and everything that breaks the contract.

    Expressions have a type: "value", "identifier", "rows" (``history``), "loop", the root of a row ("item", "history",
    "user", "event"), or "" where they have been refused. A scope maps the names that may be read to their types, and
    those outside of the loop to "hidden".
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[Problem] = []  # Breaches of the contract.
        self.lint: list[Problem] = []
        self.reads: list[_Read] = []
        self.names: list[tuple[str, str, int]] = []  # Block, name and offset of every variable read.
        self.blocks: dict[str, nodes.Block] = {}
        self.kind: Literal["sequence", "question"] = "sequence"
        self.subject: Literal["item", "history", "event"] | None = None
        self.block = ""
        if len(source) > MAX_CHARACTERS:
            self.refuse(0, f"{len(source)} characters, and a prompt has at most {MAX_CHARACTERS}", "Shorten it")
            return
        for offset, character in enumerate(source):
            if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t":
                self.refuse(offset, f"the control character U+{ord(character):04X}", "Remove it")
        if self.problems:
            return
        try:
            tree = Parser(_ENVIRONMENT, source).parse()
            self.file(tree)
            if not self.problems:
                self.code = _ENVIRONMENT.compile(tree, _FILENAME, _FILENAME)
        except TemplateSyntaxError as error:
            self.refuse(error.lineno, (error.message or "").rstrip("."), "Correct the syntax")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            self.refuse(0, f"this cannot be compiled ({error})", "Nest less deeply, and write smaller numbers")

    def refuse(self, where: nodes.Node | int, message: str, fix: str, lint: bool = False) -> str:
        place = _place(self.source, where if isinstance(where, int) else _start(where))
        (self.lint if lint else self.problems).append(_problem(place, message, fix))
        return ""

    def all_problems(
        self, items: Iterable[str] | None, users: Iterable[str] | None, events: Iterable[str] | None
    ) -> list[Problem]:
        """Breaches and lint in the order of the file, with columns that the tables lack."""
        item_columns = None if items is None else {*items, "identifier"}
        columns = {"item": item_columns, "history": item_columns}
        columns |= {"user": None if users is None else {*users}, "event": None if events is None else {*events}}
        found = {*self.problems, *self.lint}
        for read in self.reads:
            known = columns[read.root]
            if known is not None and read.column not in known and not read.guarded:
                message = f"the table of `{read.root}` has no column `{read.column}`"
                place = _place(self.source, read.offset)
                found.add(_problem(place, message, suggestion(read.column, known)))
        return sorted(found)

    def file(self, tree: nodes.Template) -> None:
        for node in tree.body:
            if isinstance(node, nodes.Block):
                if node.name in self.blocks:
                    self.refuse(node, f"a second block `{node.name}`", "Keep one of them")
                self.blocks[node.name] = node
                continue
            for part in node.nodes if isinstance(node, nodes.Output) else [node]:
                text = part.data if isinstance(part, nodes.TemplateData) else "."
                if text.strip():
                    offset = _start(part) + len(text) - len(text.lstrip())
                    self.refuse(offset, "something outside of the blocks", "Move it into one, or into {# a comment #}")
        if ("item" in self.blocks) == ("assistant" in self.blocks):
            message = "both `item` and `assistant`" if "item" in self.blocks else "neither `item` nor `assistant`"
            self.refuse(0, f"{message} among the blocks", "Have `item` for a sequence, or `assistant` for a question")
            return
        self.kind = "sequence" if "item" in self.blocks else "question"
        for name, block in self.blocks.items():
            if name not in READABLE[self.kind]:
                self.refuse(block, f"unknown block `{name}`", suggestion(name, READABLE[self.kind]))
                continue
            scope = {root: "rows" if root == "history" else root for root in READABLE[self.kind][name]}
            self.block = name
            identifiers = self.body(block.body, scope)
            if name == "item":
                first = block.body[0] if block.body else None
                if not (isinstance(first, nodes.Output) and identifiers[:1] == first.nodes[:1]):
                    fix = "Write `{{ item.identifier }}` directly after the tag"
                    self.refuse(block, "the block `item` does not begin with the item's identifier", fix)
                for extra in identifiers[1:]:
                    self.refuse(extra, "a second identifier in the block `item`", "Keep the first one alone")
        if self.kind == "question":
            self.question()

    def question(self) -> None:
        """What a question is about, and whether it holds its own answer."""
        sound = not self.problems  # What has been refused is not counted as read.
        about = {name: at for block, name, at in self.names if block == "user" and name in ("item", "history")}
        told = {name: at for block, name, at in self.names if block == "assistant" and name in ("item", "event")}
        if "event" in told:
            self.subject = "event"
            if "item" in told:
                self.refuse(
                    told["item"], "an answer that reads `item` beside `event`", "Read `item` in the block `user`"
                )
        if about and self.subject == "event":
            pass  # The answer is what the event says, so its item may be read together with the history.
        elif len(about) > 1:
            fix = "Read `item` in the block `assistant` alone, or leave out `history`"
            self.refuse(about["item"], "with `history`, `item` is the item that came next, and this tells it", fix)
        elif about:
            self.subject = "item" if "item" in about else "history"
        elif sound:
            fix = "Read `item` or `history` in the block `user`"
            self.refuse(self.blocks.get("user", 0), "a question about nothing", fix)
        if sound and not any(block == "assistant" for block, _, _ in self.names):
            fix = "Print `{{ item.identifier }}`, or a column of `item` or `event`"
            self.refuse(self.blocks["assistant"], "an answer that reads nothing", fix)
        answer = {(read.root, read.column) for read in self.reads if read.block == "assistant"}
        for block, root, column, offset, _ in self.reads:
            if block != "assistant" and (root, column) in answer:
                message = f"the answer leaks: `{root}.{column}` stands in the question and in the block `assistant`"
                self.refuse(offset, message, "Read it in one of the two", lint=True)

    def body(self, body: Iterable[nodes.Node], scope: dict[str, str]) -> list[nodes.Node]:
        """Inspect statements. Gives the outputs that print an identifier, in order."""
        identifiers: list[nodes.Node] = []
        for node in body:
            if isinstance(node, nodes.Output):
                for part in node.nodes:
                    if not isinstance(part, nodes.TemplateData):
                        if self.value(part, scope, printed=True) == "identifier":
                            identifiers.append(part)
                        part.lineno = _start(part)  # Where an error of rendering is reported.
            elif isinstance(node, nodes.If):
                self.value(node.test, scope)
                identifiers += self.body([*node.body, *node.elif_, *node.else_], scope)
            elif isinstance(node, nodes.For):
                identifiers += self.loop(node, scope)
            else:
                self.refuse_node(node)
        return identifiers

    def loop(self, node: nodes.For, scope: dict[str, str]) -> list[nodes.Node]:
        over, target = node.iter, node.target
        kind = self.value(over, scope)
        column = isinstance(over, nodes.Getattr | nodes.Getitem)
        if kind and not column and not (kind == "rows" and isinstance(over, nodes.Name)):
            self.refuse(over, "a loop over something that is no given list", "Loop over `history` or over a column")
        if not isinstance(target, nodes.Name) or target.name in scope or node.recursive:
            self.refuse(target, "a loop that is recursive or has no new name", "Write `{% for past in history %}`")
            return []
        # A body that reads nothing but its own variable is linear in the list that it runs over.
        inside = dict.fromkeys(scope, "hidden") | {target.name: "history" if kind == "rows" else "value"}
        before = len(self.names)
        if node.test is not None:
            self.value(node.test, inside)
        identifiers = self.body(node.body, inside | {"loop": "loop"})
        if not any(name == target.name for _, name, _ in self.names[before:]):
            message = f"the loop variable `{target.name}` is not used"
            self.refuse(target, message, "Print it, or drop the loop", lint=True)
        node.iter = nodes.Filter(over, "each", [], [], None, None, lineno=_start(over))
        return identifiers + self.body(node.else_, scope)

    def value(self, node: nodes.Node, scope: dict[str, str], printed: bool = False) -> str:
        """The type of an expression that must have a value: an identifier has one only where it is printed."""
        kind = self.expression(node, scope)
        if kind == "identifier" and not printed:
            fix = "Print it on its own, as in `{{ item.identifier }}`"
            return self.refuse(node, "an identifier that is changed, compared, or joined to something", fix)
        if kind == "rows" and printed:
            return self.refuse(node, "`history` is a list of items", "Write `{% for past in history %}`")
        if kind in ("item", "history", "user", "event", "loop"):
            fix = f"Read one of {', '.join(LOOP_FIELDS)}" if kind == "loop" else "Read a column, as in `item.title`"
            return self.refuse(node, "this is no single value", fix)
        return kind

    def expression(self, node: nodes.Node, scope: dict[str, str]) -> str:
        match node:
            case nodes.Const(value=None):
                return self.refuse(node, "no column ever equals `none`", "Write `is none`")
            case nodes.Const():
                return "value"
            case nodes.Name(name=name):
                self.names.append((self.block, name, node.lineno))
                kind = scope.get(name, "")
                readable = [known for known, type_ in scope.items() if type_ != "hidden"]
                if kind == "hidden":
                    return self.refuse(node, f"`{name}` inside a loop", f"Read only `{readable[0]}` there")
                if not kind:
                    message = f"the block `{self.block}` cannot read `{name}`"
                    return self.refuse(node, message, suggestion(name, readable))
                return kind
            case nodes.Getattr(node=row, attr=key) | nodes.Getitem(node=row, arg=nodes.Const(value=str(key))):
                root = self.expression(row, scope)
                if root in ("item", "history", "user", "event") and not key.startswith("__"):
                    self.reads.append(_Read(self.block, root, key, node.lineno + 1))
                    return "identifier" if key == "identifier" and root in ("item", "history") else "value"
                if root == "loop" and key in LOOP_FIELDS:
                    return "value"
                fix = "Read a column of a row, as in `item.title`"
                return root and self.refuse(node, f"`{key}` cannot be read here", fix)
            case nodes.Filter(name=str(name), node=nodes.Expr()):
                return self.filter(node, name, scope)
            case nodes.Test(name="defined" | "none", args=[], kwargs=[], dyn_args=None, dyn_kwargs=None):
                before = len(self.reads)
                self.expression(node.node, scope)  # Also of a whole row: `user is defined`.
                self.reads[before:] = [read._replace(guarded=True) for read in self.reads[before:]]
            case nodes.Compare() | nodes.Operand() | nodes.Not() | nodes.And() | nodes.Or() | nodes.CondExpr():
                if isinstance(node, nodes.CondExpr) and node.expr2 is None:
                    node.expr2 = nodes.Const("", lineno=node.lineno)
                for child in node.iter_child_nodes():
                    self.value(child, scope)
            case _:
                return self.refuse_node(node)
        return "value"

    def filter(self, node: nodes.Filter, name: str, scope: dict[str, str]) -> str:
        if name not in FILTERS:
            return self.refuse(node.lineno, f"the filter `{name}` is not allowed", suggestion(name, FILTERS))
        types, before = FILTERS[name][1], len(self.reads)
        if node.node is not None and self.value(node.node, scope) == "rows" and name != "length":
            self.refuse(node.lineno, f"`{name}` of a list of items", "Write `{% for past in history %}`")
        if name == "default":
            self.reads[before:] = [read._replace(guarded=True) for read in self.reads[before:]]
        fits = len(node.args) <= len(types) and not (node.kwargs or node.dyn_args or node.dyn_kwargs)
        for argument, expected in zip(node.args, types, strict=False):
            self.value(argument, scope)
            fits &= expected is object or (isinstance(argument, nodes.Const) and type(argument.value) is expected)
        if not fits:
            takes = ", ".join("a value" if type_ is object else f"one constant {type_.__name__}" for type_ in types)
            self.refuse(node.lineno, f"wrong arguments for `{name}`", f"It takes {takes or 'none'}")
        return "value"

    def refuse_node(self, node: nodes.Node) -> str:
        text = re.split(r"\n|[-+]?[%}]}", self.source[_start(node) :], maxsplit=1)[0].strip()
        fix = "Use text, `{{ }}`, `if`, `for` over a given list, `is defined`, and filters"
        return self.refuse(node, f"`{text[:60]}` is not allowed in a prompt ({type(node).__name__})", fix)
