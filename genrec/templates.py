"""What prompt files may say and compute: a restricted Jinja, and the inspection of a source against it.

Rendering gives segments, so that what came from data stays apart from what the template says: compiled blocks yield
text for the template's own words and a ``Segment`` for everything printed by ``{{ }}``; data never passes through
template text. A white list of syntax keeps templates harmless and linear in their data: no calls, no arithmetic, loops
only over given lists, and inside a loop only the loop's own variable. Jinja's names and rules hold, but for an empty
cell (``None``): it prints nothing, counts as false, loops zero times, and takes the ``default``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal, NamedTuple

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, Undefined, nodes, pass_context
from jinja2.filters import do_title
from jinja2.lexer import TokenStream
from jinja2.nativetypes import NativeCodeGenerator
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from genrec.errors import suggestion
from genrec.syntax import asked, explained, passed, says, start

READABLE: dict[str, dict[str, tuple[str, ...]]] = {  # What each block may read.
    "sequence": {"system": ("user", "context"), "user": ("user", "context"), "item": ("item",)},
    "question": {
        "system": ("user", "context"),
        "user": ("item", "history", "user", "context"),
        "assistant": ("item", "event"),
    },
}
_ROOTS = ("item", "history", "user", "context", "event")  # Rows, whose columns are read.
OUTCOMES = ("event", "rating", "weight")  # Columns of the log that come of a choice, and are no context of it.
_DERIVED = {"hour", "weekday"}  # Of its timestamp.
_UNREAD = {*OUTCOMES, "timestamp", "user_id", "item_id"}  # Columns of the log that say nothing before a choice.
LOOP_FIELDS = ("index", "index0", "first", "last", "length")
MAX_CHARACTERS = 65_536
_JOINERS = "\u200c\u200d"  # Belong to the spelling of Persian, of Indic languages and of emoji.


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


_FILENAME = "<genrec prompt>"  # Of compiled blocks, in tracebacks.
_ENVIRONMENT = _Environment(undefined=_Undefined, finalize=_output, optimized=False, autoescape=False)
_ENVIRONMENT.globals.clear()
_ENVIRONMENT.filters = {name: function for name, (function, _) in FILTERS.items()} | {"each": _each}
_ENVIRONMENT.tests = {"defined": lambda value: not isinstance(value, Undefined), "none": _empty}


def template(code: CodeType) -> Template:
    """What renders the compiled blocks of an ``Inspection``."""
    return Template.from_code(_ENVIRONMENT, code, {})


def failed_at(error: Exception, template: Template) -> int:
    """The offset in the source of what ``error``, raised by a block, could not compute; 0 where no block raised it."""
    offset, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _FILENAME:
            offset = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return offset


# ---- What templates may say -----------------------------------------------------------------------------------------


def line_column(source: str, offset: int) -> tuple[int, int]:
    """Line and column, from 1, of a character of ``source``."""
    return source.count("\n", 0, offset) + 1, offset - source.rfind("\n", 0, offset)


def contract(source: str) -> str:
    """SHA-256 (hex) of what decides the tokens: the blocks, without comments, and without space that never counts.

    That is space inside tags, outside of the blocks, and at the edges of a block, but for those of ``item``. Of two
    sources of one contract, every row makes the same tokens.

    Args:
        source: Of a prompt that ``Inspection`` found nothing wrong with.
    """
    told: dict[str, list[list[Any]]] = {}
    inside: list[list[Any]] = []
    tokens = iter(_ENVIRONMENT._tokenize(source, None))  # Without comments, and without space inside of tags.
    for token in tokens:
        if token.type == "block_begin":
            statement = next(tokens)
            if statement.value in ("block", "endblock"):
                inside = told.setdefault(next(tokens).value, []) if statement.value == "block" else []
                while token.type != "block_end":  # Of `{% endblock name %}` too.
                    token = next(tokens)
                continue
            inside += [["block_begin", ""], [statement.type, statement.value]]
        elif token.type == "data" and inside and inside[-1][0] == "data":
            inside[-1][1] += token.value
        else:
            inside.append([token.type, "" if token.type.endswith(("_begin", "_end")) else token.value])
    for name, parts in told.items():
        if name != "item":  # As ``Prompt.render``.
            for edge, strip in ((0, str.lstrip), (-1, str.rstrip)):
                if parts and parts[edge][0] == "data":
                    parts[edge][1] = strip(parts[edge][1])
        told[name] = [part for part in parts if part != ["data", ""]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def lines_told(source: str) -> list[str]:
    """The lines of a source without its comments, and without blank lines: what a reader compares."""
    comment = ("comment_begin", "comment", "comment_end")
    parts = _ENVIRONMENT.lexer.tokeniter(source, None)
    text = "".join(text for _, kind, text in parts if kind not in comment)
    return [line for line in text.splitlines() if line.strip()]


class _Read(NamedTuple):
    """A column read in a block; ``guarded``, by ``default`` or by a test that it is there, it may be missing."""

    block: str
    root: str
    column: str
    offset: int
    guarded: bool = False


def _problem(place: tuple[int, int], message: str, fix: str) -> Problem:
    return Problem(*place, f"{message}.", fix if fix.endswith(("?", ".")) else f"{fix}.")


class Inspection:
    """Reads a source once: its blocks, what they read, and everything that breaks the contract.

    Expressions have a type: "value", "identifier", "rows" (``history``), "loop", the root of a row ("item", "history",
    "user", "context", "event"), or "" where they have been refused. A scope maps the names that may be read to their
    types, and those outside of the loop to "hidden".
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[Problem] = []  # Breaches of the contract.
        self.lint: list[Problem] = []  # What makes a prompt other than it seems.
        self.remarks: list[Problem] = []  # What is odd and does no harm.
        self.reads: list[_Read] = []
        self.names: list[tuple[str, str, int]] = []  # Block, name and offset of every variable read.
        self.texts: list[tuple[int, str]] = []  # Offset and words of the template's own text.
        self.blocks: dict[str, nodes.Block] = {}
        self.kind: Literal["sequence", "question"] = "sequence"
        self.subject: Literal["item", "history", "event"] | None = None
        self.block = ""
        if len(source) > MAX_CHARACTERS:
            self.refuse(0, f"{len(source)} characters, and a prompt has at most {MAX_CHARACTERS}", "Shorten it")
            return
        for offset, character in enumerate(source):
            category = unicodedata.category(character)
            if category in ("Cc", "Cs") and character not in "\n\t":
                self.refuse(offset, f"the control character U+{ord(character):04X}", "Remove it")
            elif category == "Cf" and character not in _JOINERS:
                message = f"the character U+{ord(character):04X}, which nobody sees and the model reads"
                self.refuse(offset, message, "Remove it", self.remarks)
        if self.problems:
            return
        try:
            tree = Parser(_ENVIRONMENT, source).parse()
            self.file(tree)
            if not self.problems:
                self.code = _ENVIRONMENT.compile(tree, _FILENAME, _FILENAME)
        except TemplateSyntaxError as error:
            self.refuse(*explained(source, error.lineno, (error.message or "").rstrip(".")))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            self.refuse(0, f"this cannot be compiled ({error})", "Nest less deeply, and write smaller numbers")

    def refuse(
        self, where: nodes.Node | int, message: str, fix: str, among: list[Problem] | None = None
    ) -> Literal[""]:
        place = line_column(self.source, where if isinstance(where, int) else start(where))
        (self.problems if among is None else among).append(_problem(place, message, fix))
        return ""

    def all_problems(self, columns: Mapping[str, Iterable[str] | None]) -> list[Problem]:
        """Breaches and lint in the order of the file, without ``remarks``.

        Args:
            columns: Those of the tables of ``item``, ``user`` and ``event``; None: whatever is read is there.
        """
        known = {root: None if names is None else {*names} for root, names in columns.items()}
        if (items := known.get("item")) is not None:
            known["item"] = known["history"] = items | {"identifier"}
        if (events := known.get("event")) is not None:
            known["context"] = events | (_DERIVED if "timestamp" in events else set())
        found = {*self.problems, *self.lint}
        for read in self.reads:
            there = known.get(read.root)
            if there is not None and read.column not in there and not read.guarded:
                message = f"the table of `{read.root}` has no column `{read.column}`"
                fix = suggestion(read.column, there)
                if read.root == "context":
                    fix = suggestion(read.column, there - _UNREAD)
                    derived = read.column in _DERIVED
                    fix += (
                        " It follows from timestamps, which the log lacks." if derived
                        else f" A column of the log is kept by `genrec data import ... --context {read.column}`."
                    )  # fmt: skip
                found.add(_problem(line_column(self.source, read.offset), message, fix))
        return sorted(found)

    def file(self, tree: nodes.Template) -> None:
        outside = False  # Whether what stands between two blocks has been refused.
        for node in tree.body:
            if isinstance(node, nodes.Block):
                if node.name in self.blocks:
                    self.refuse(node, f"a second block `{node.name}`", "Keep one of them")
                self.blocks[node.name], outside = node, False
                continue
            if not isinstance(node, nodes.Output | nodes.If | nodes.For):
                self.refuse_node(node)
                continue
            for part in filter(says, node.nodes if isinstance(node, nodes.Output) else [node]):
                if outside:
                    break
                outside = True
                text = part.data if isinstance(part, nodes.TemplateData) else "."
                offset = start(part) + len(text) - len(text.lstrip())
                self.refuse(offset, "something outside of the blocks", "Move it into one, or into {# a comment #}")
        if ("item" in self.blocks) == ("assistant" in self.blocks):
            if self.unknown({name for roots in READABLE.values() for name in roots}):
                return
            message = "both `item` and `assistant`" if "item" in self.blocks else "neither `item` nor `assistant`"
            self.refuse(0, f"{message} among the blocks", "Have `item` for a sequence, or `assistant` for a question")
            return
        self.kind = "sequence" if "item" in self.blocks else "question"
        self.unknown({*READABLE[self.kind]})
        for name, block in self.blocks.items():
            if name not in READABLE[self.kind]:
                continue
            scope = {root: "rows" if root == "history" else root for root in READABLE[self.kind][name]}
            self.block = name
            identifiers = self.body(block.body, scope)
            if all(isinstance(node, nodes.Output) and not any(map(says, node.nodes)) for node in block.body):
                self.refuse(block, f"an empty block `{name}`", "Write into it, or remove it", self.remarks)
            if name == "item":
                first = block.body[0] if block.body else None
                if not (isinstance(first, nodes.Output) and identifiers[:1] == first.nodes[:1]):
                    fix = "Write `{{ item.identifier }}` directly after the tag"
                    self.refuse(block, "the block `item` does not begin with the item's identifier", fix)
                for extra in identifiers[1:]:
                    self.refuse(extra, "a second identifier in the block `item`", "Keep the first one alone")
        if self.kind == "question":
            self.question()

    def unknown(self, names: set[str]) -> bool:
        """Refuse the blocks that have none of the ``names``. Whether there are any."""
        unknown, free = self.blocks.keys() - names, names - self.blocks.keys()
        for name in unknown:
            fix = suggestion(name, free) if free else "Remove it"
            self.refuse(self.blocks[name], f"unknown block `{name}`", fix)
        return bool(unknown)

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
            if self.subject == "history" and not any(read.root == "history" for read in self.reads):
                fix = "Write `{% for past in history %}{{ past.title }}; {% endfor %}`"
                self.refuse(about["history"], "a history of which no item is told", fix, self.remarks)
        elif sound:
            fix = "Read `item` or `history` in the block `user`"
            self.refuse(self.blocks.get("user", 0), "a question about nothing", fix)
        if sound and not any(block == "assistant" for block, _, _ in self.names):
            fix = "Print `{{ item.identifier }}`, or a column of `item` or `event`"
            self.refuse(self.blocks["assistant"], "an answer that reads nothing", fix)
        answer = {(read.root, read.column) for read in self.reads if read.block == "assistant"}
        for block, root, column, offset, _ in self.reads:
            if root == "context" and column in OUTCOMES:
                continue  # That has been said.
            # What is known of the moment is a part of the log's row of the event.
            if block != "assistant" and ("event" if root == "context" else root, column) in answer:
                message = (
                    f"the answer leaks: `{root}.{column}` stands in the question, and the block `assistant` tells it"
                )
                self.refuse(offset, message, "Read it in one of the two", self.lint)

    def body(self, body: Iterable[nodes.Node], scope: dict[str, str]) -> list[nodes.Node]:
        """Inspect statements. Gives the outputs that print an identifier, in order."""
        identifiers: list[nodes.Node] = []
        for node in body:
            if isinstance(node, nodes.Output):
                for part in node.nodes:
                    if isinstance(part, nodes.TemplateData):
                        self.texts.append((part.lineno, part.data))
                    else:
                        if self.value(part, scope, printed=True) == "identifier":
                            identifiers.append(part)
                        part.lineno = start(part)  # Where an error of rendering is reported.
            elif isinstance(node, nodes.If):
                self.value(node.test, scope)
                before = len(self.reads)
                identifiers += self.body(node.body, scope)
                self.guard(before, columns=asked(node.test, scope))
                identifiers += self.body([*node.elif_, *node.else_], scope)
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
            self.refuse(target, message, "Print it, or drop the loop", self.lint)
        node.iter = nodes.Filter(over, "each", [], [], None, None, lineno=start(over))
        return identifiers + self.body(node.else_, scope)

    def value(self, node: nodes.Node, scope: dict[str, str], printed: bool = False) -> str:
        """The type of an expression that must have a value: an identifier has one only where it is printed."""
        kind = self.expression(node, scope)
        if kind == "identifier" and not printed:
            fix = "Print it on its own, as in `{{ item.identifier }}`"
            return self.refuse(node, "an identifier that is changed, compared, or joined to something", fix)
        if kind == "rows" and printed:
            return self.refuse(node, "`history` is a list of items", "Write `{% for past in history %}`")
        if kind in (*_ROOTS, "loop"):
            fix = f"Read one of {', '.join(LOOP_FIELDS)}" if kind == "loop" else "Read a column, as in `item.title`"
            return self.refuse(node, "this is no single value", fix)
        return kind

    def expression(self, node: nodes.Node, scope: dict[str, str]) -> str:
        match node:
            case nodes.Const(value=None):
                return self.refuse(node, "no column ever equals `none`", "Write `is none`")
            case nodes.Const(value=float(number)) if not math.isfinite(number):
                return self.refuse(node, "a number that is too large", "Write a smaller one")
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
                    return self.refuse(node, message, self.elsewhere(name) or suggestion(name, readable))
                return kind
            case nodes.Getattr(node=row, attr=key) | nodes.Getitem(node=row, arg=nodes.Const(value=str(key))):
                root = self.expression(row, scope)
                if root == "context" and key == "item_id":
                    return self.refuse(node, "`context.item_id` is the item to be told", "Remove it")
                outcome = root == "context" and key in OUTCOMES
                if outcome:
                    fix = "Read what is known before, as in `context.hour`"
                    message = f"`context.{key}` comes of the choice that is asked for"
                    self.refuse(node.lineno + 1, message, fix, self.lint)
                if root in _ROOTS and not key.startswith("__"):
                    self.reads.append(_Read(self.block, root, key, node.lineno + 1, guarded=outcome))
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
                self.guard(before, offsets=passed(node.node))
            case nodes.And(left=test, right=then) | nodes.CondExpr(test=test, expr1=then):
                self.value(test, scope)
                before = len(self.reads)
                self.value(then, scope)
                self.guard(before, columns=asked(test, scope))
                if isinstance(node, nodes.CondExpr):
                    node.expr2 = node.expr2 or nodes.Const("", lineno=node.lineno)
                    self.value(node.expr2, scope)
            case nodes.Compare() | nodes.Operand() | nodes.Not() | nodes.Or():
                for child in node.iter_child_nodes():
                    self.value(child, scope)
            case _:
                return self.refuse_node(node)
        return "value"

    def guard(self, first: int, *, offsets: Iterable[int] = (), columns: Iterable[tuple[str, str]] = ()) -> None:
        """Of the reads from number ``first`` on, those at the ``offsets``, and those of the ``columns``, may miss."""
        for number in range(first, len(self.reads)):
            read = self.reads[number]
            if read.offset in offsets or (read.root, read.column) in columns:
                self.reads[number] = read._replace(guarded=True)

    def elsewhere(self, name: str) -> str:
        """Where a prompt of this kind may read the root ``name``, which the block at hand may not; "" if none is."""
        if self.kind == "sequence" and name == "history":
            return "The history follows the head by itself: the block `item` says how each of its items is told"
        blocks = [block for block, roots in READABLE[self.kind].items() if name in roots]
        if blocks and self.block == "item":
            return f"It tells its own item alone: read `{name}` in the block `{blocks[-1]}`"
        if blocks:
            return f"Read it in the block `{blocks[-1]}`"
        return "A question alone reads it, in its block `assistant`" if name == "event" else ""

    def filter(self, node: nodes.Filter, name: str, scope: dict[str, str]) -> str:
        if name not in FILTERS:
            return self.refuse(node.lineno, f"the filter `{name}` is not allowed", suggestion(name, FILTERS))
        types, before = FILTERS[name][1], len(self.reads)
        if node.node is not None and self.value(node.node, scope) == "rows" and name != "length":
            self.refuse(node.lineno, f"`{name}` of a list of items", "Write `{% for past in history %}`")
        if name == "default" and node.node is not None:
            self.guard(before, offsets=passed(node.node))
        fits = len(node.args) <= len(types) and not (node.kwargs or node.dyn_args or node.dyn_kwargs)
        for argument, expected in zip(node.args, types, strict=False):
            self.value(argument, scope)
            fits &= expected is object or (isinstance(argument, nodes.Const) and type(argument.value) is expected)
        if not fits:
            takes = ", ".join("a value" if type_ is object else f"one constant {type_.__name__}" for type_ in types)
            self.refuse(node.lineno, f"wrong arguments for `{name}`", f"It takes {takes or 'none'}")
        return "value"

    def refuse_node(self, node: nodes.Node) -> str:
        text = re.split(r"\n|[-+]?[%}]}", self.source[start(node) :], maxsplit=1)[0].strip()
        fix = "Use text, `{{ }}`, `if`, `for` over a given list, `is defined`, and filters"
        if isinstance(node, nodes.Stmt):
            return self.refuse(node, f"`{text.split(maxsplit=1)[0]}` is not allowed in a prompt", fix)
        if isinstance(node, nodes.Call):
            name = getattr(node.node, "attr", getattr(node.node, "name", ""))
            fix = f"Write the filter `| {name}`" if name in FILTERS else fix
        return self.refuse(node, f"`{text[:60]}` is not allowed in a prompt ({type(node).__name__})", fix)
