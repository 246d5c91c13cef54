"""What prompts may say: payloads and grammars against the white list, the cost of what passes, the contract, lint."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from genrec.errors import PromptError
from genrec.prompts import ItemRef, Problem, Prompt, Segment
from genrec.templates import Inspection, contract


def question(user: str, assistant: str = "{{ item.answer }}") -> str:
    return f"{{% block user %}}{user}{{% endblock %}}\n{{% block assistant %}}{assistant}{{% endblock %}}"


def sequence(item: str = "{{ item.identifier }}", user: str = "Next:") -> str:
    return f"{{% block user %}}{user}{{% endblock %}}\n{{% block item %}}{item}{{% endblock %}}"


# ---- No escape ------------------------------------------------------------------------------------------------------

# What the advisories on Jinja's sandbox and Jinja's own tests of it try, written for the names that a prompt knows.
PAYLOADS = [
    # CVE-2016-10745: `str.format` reaches attributes of its arguments.
    "{{ '{0.__class__.__base__}'.format(item) }}",
    "{{ 'a{0.__class__}b'.format(42) }}",
    "{{ ('a{0.__class__}b{1}' | safe).format(42, '<foo>') }}",
    "{{ item.title.format(item) }}",
    "{{ '%s' | format(item) }}",
    # CVE-2019-10906: so does `str.format_map`.
    "{{ 'a{x.__class__}b'.format_map({'x': 42}) }}",
    "{{ ('a{x.foo}b{y}' | safe).format_map({'x': {'foo': 42}, 'y': '<foo>'}) }}",
    "{{ item.title.format_map(item) }}",
    # CVE-2024-56201: names that the compiler writes into the code, in branches that never run.
    "{% if false %}{{ 1 | a.b }}{% endif %}",
    "{% if false %}{{ 1 is a.b }}{% endif %}",
    "{% include '{x!r}' ~ item %}",
    "{% import '\"}{{item}}' as y %}",
    "{% from item.title import y %}",
    "{% extends \"{'a'!r}\" %}",
    # CVE-2024-56326: a reference to `str.format` is kept, and called by a filter.
    "{% set ns = namespace() %}{% set ns.run = '{0.__call__.__builtins__}'.format %}{{ ns | run(item) }}",
    "{% for f in ['{0.__class__}'.format] %}{{ f(item) }}{% endfor %}",
    "{{ [item.title] | map('format', item) | first }}",
    "{{ item.list | map(attribute='__class__') | first }}",
    "{{ dict(run='{0.__class__}'.format).run(item) }}",
    # CVE-2025-27516: the filter `attr` hands out `str.format`.
    "{{ '{0.__call__.__builtins__[__import__]}' | attr('format')(item) }}",
    "{{ item | attr('__class__') }}",
    "{{ item.list | attr('__subclasses__')() }}",
    "{{ item.list | selectattr('__class__') | first }}",
    "{{ item.list | groupby('__class__') }}",
    # Jinja's tests of its sandbox.
    "{{ item.foo() }}",
    "{{ item._foo() }}",
    "{{ item.__class__ }}",
    "{{ item.func_code }}{{ item.__class__.__subclasses__() }}",
    "{{ [].append(23) }}",
    "{{ {1: 2}.clear() }}",
    "{% for item.attribute in item.list %}...{% endfor %}",
    "{% for foo, bar.baz in item.list %}...{% endfor %}",
    "{% macro say_hello(name) %}<p>{{ name }}</p>{% endmacro %}{{ say_hello('<blink>') }}",
    "{{ 1 + 2 }}",
    "{{ item.year + 2 }}",
    "{{ -1 }}",
    "{{ -item.year }}",
    # Other ways out that have been shown.
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ item['__class__'] }}",
    "{{ item['__cl' 'ass__'] }}",
    "{{ item['__cl' ~ 'ass__'] }}",
    "{{ item[item.title] }}",
    "{{ item.title.__class__ }}",
    "{{ loop.__class__ }}",
    "{% for past in history %}{{ loop.__class__ }}{{ past.title }}{% endfor %}",
    "{% for past in history %}{{ loop._iterable }}{{ past.title }}{% endfor %}",
    "{% for past in history %}{{ loop.previtem }}{{ past.title }}{% endfor %}",
    "{% for past in history %}{{ loop(past.list) }}{% endfor %}",
    "{{ lipsum.__globals__ }}",
    "{{ request.application }}",
    "{{ config.items() }}",
    "{% debug %}",
    "{% trans %}x{% endtrans %}",
    "{% break %}",
    "{{ 1e999 }}",
    "{{ item.title | default(1e999) }}",
]


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda text: text[:50])
def test_payloads_are_refused_when_the_prompt_is_loaded_with_their_line(payload: str) -> None:
    with pytest.raises(PromptError, match=r"^test:3:"):
        Prompt.parse("{# 1 #}\n" + question("\n" + payload + "\n{{ item.title }}", "{{ event.rating }}"), "test")


# A grammar of what is allowed, in which now and then something stands that is not, or that no value fits.
_VALUES = ["item.title", "item.year", "user.age", "user.title", "context.hour", "7", "1.5", "'a'", "'<|s|>'", "true"]
_ENTRY = ["tag", "loop.index", "loop.first", "loop.length", "3", "'a'"]
_INSIDE = {"item.list": _ENTRY, "past.list": _ENTRY}
_INSIDE |= {"history": ["past.title", "past.year", "loop.index", "loop.last", "2", "'b'"]}
_FOUL = [
    "item.__class__", "item.title.format(item)", "item.title | attr('format')", "range(9)", "9 ** 9", "'a' * 9",
    "item.title ~ item.title", "item.title | replace('', 'aa')", "history", "item", "loop", "item.identifier | upper",
    "self", "[1, 2]", "{'a': item}", "item.title[0]", "history[0]", "none", "item.title == none", "x", "cycler('a')",
    "item.list", "item.title | round", "item.title < 1", "item.absent", "event.rating", "1e999", "item['list']",
]  # fmt: skip
_STATEMENTS = [
    "{% set x = 1 %}", "{% macro m() %}{% endmacro %}", "{% include 'x' %}", "{% for past in history %}{% break %}",
    "{% for a in history %}{% for b in history %}{{ b.title }}{% endfor %}{% endfor %}", "{% endif %}",
    "{% for tag in item.list %}{% for tag in item.list %}{{ tag }}{% endfor %}{% endfor %}", "{% block x %}", "{{",
    "{% for tag in item.list recursive %}{{ loop(item.list) }}{% endfor %}", "{{ item.title | each }}",
]  # fmt: skip


@st.composite
def expressions(draw: st.DrawFn, values: list[str], depth: int = 2) -> str:
    if draw(st.integers(0, 40)) == 17:
        return draw(st.sampled_from(_FOUL))
    shape = draw(st.integers(0, 9)) if depth else 0
    inner = [draw(expressions(values, depth - 1)) for _ in range((0, 1, 1, 1, 2, 2, 2, 3, 1, 1)[shape])]
    match shape:
        case 0:
            return draw(st.sampled_from(values))
        case 1 | 2:
            return f"{inner[0]} | {draw(st.sampled_from(['upper', 'lower', 'title', 'trim', 'length', 'truncate(9)']))}"
        case 3:
            lists = {"item.title": "item.list", "past.title": "past.list"}
            return f"{lists[values[0]]} | join('; ')" if values[0] in lists else inner[0]
        case 4:
            return f"({inner[0]}) | default({inner[1]})"
        case 5:
            return f"({inner[0]} {draw(st.sampled_from(['and', 'or', '==', '!=']))} {inner[1]})"
        case 6:
            return f"(({inner[0]}) | lower in ({inner[1]}) | lower)"
        case 7:
            return f"({inner[0]} if {inner[1]} else {inner[2]})"
        case 8:
            return f"(not {inner[0]})"
        case _:
            return f"({inner[0]} is {draw(st.sampled_from(['defined', 'none', 'not none']))})"


@st.composite
def templates(draw: st.DrawFn, values: list[str] = _VALUES, lists: tuple[str, ...] = ("history", "item.list")) -> str:
    pieces = []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.sampled_from(["text", "print", "print", "if", "for", "for"]))
        if draw(st.integers(0, 40)) == 17:
            pieces.append(draw(st.sampled_from(_STATEMENTS)))
        elif shape == "text":
            pieces.append(draw(st.sampled_from(["text ", "<|item_1|>", "\\", "{# note #}"])))
        elif shape == "print" or (shape == "for" and not lists):
            pieces.append(f"{{{{ {draw(expressions(values))} }}}}")
        elif shape == "if":
            then, other = draw(templates(values, lists)), draw(templates(values, lists))
            pieces.append(f"{{% if {draw(expressions(values))} %}}{then}{{% else %}}{other}{{% endif %}}")
        else:
            over = draw(st.sampled_from(lists))
            name, inside = "past" if over == "history" else "tag", ("past.list",) if over == "history" else ()
            body = draw(templates(_INSIDE[over], inside))
            test = f" if {draw(expressions(_INSIDE[over][:1]))}" if draw(st.booleans()) else ""
            pieces.append(f"{{% for {name} in {over}{test} %}}{body}{{% endfor %}}")
    return "".join(pieces)


def data(history: int, entries: int, letters: int) -> dict[str, Any]:
    """Rows of a question, of ``history`` items, with lists of ``entries`` entries and texts of ``letters`` letters."""

    def row(index: int) -> dict[str, Any]:
        text = "A b" * letters
        columns = {"title": text, "list": [text] * entries, "year": 1999, "answer": "a", "index": "i", "length": "l"}
        return {**columns, "identifier": ItemRef(index), "format": "f", "items": "it"}

    past = [row(index) for index in range(history)]
    return {"item": row(0), "history": past, "user": {"age": 3, "title": None}, "context": {"hour": 4}}


def cost(prompt: Prompt, **variables: Any) -> tuple[int, int]:
    """Calls, of whatever Python or C, that rendering the block ``user`` takes, and characters it prints."""
    steps = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal steps
        steps += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        segments = prompt.render("user", **variables)
    finally:
        sys.setprofile(before)
    return steps, sum(len(segment.text) for segment in segments)


PASSES = [
    "{% for past in history %}{% for tag in past.list if tag %}{{ loop.index }}{{ tag | upper | title }}, {% endfor %}"
    "{{ past.title | truncate(30) }}{% endfor %}",
    "{% for tag in item.list %}{{ tag if not loop.last else loop.length }}{% else %}{{ history | length }}{% endfor %}",
    "{{ item.list | join('; ') | lower | trim | default(item.title) }}{{ 'A' in item.title }}{{ 'a' in item.list }}",
    "{{ user.age | default(context.hour) }}{% for past in history %}{{ past.list | join(', ') }}{% endfor %}",
]


def check_linear(text: str) -> None:
    """A template is refused on its line, or renders to segments alone at a cost that is linear in its data."""
    prompt, refused = None, ""
    try:
        prompt = Prompt.parse(question("\n" + text + "{{ item.title }}", "{{ event.rating }}"), "test")
    except PromptError as error:
        refused = str(error)
    if prompt is None:
        # A block within is ended by what ends the one around it, which then is the one without an end.
        assert refused.startswith(("test:2:", "test:1:1: `block user` is never closed"))
        return
    for larger in ("history", "entries", "letters"):
        sizes = {"history": 3, "entries": 3, "letters": 3}
        try:
            costs = [cost(prompt, **data(**{**sizes, larger: size})) for size in (8, 16, 32)]
        except PromptError as error:
            refused = str(error)
        if refused:
            assert "in block `user`" in refused  # A list that is printed, a text that is no number, ...
            return
        for small, middle, large in zip(*costs, strict=True):
            # What is linear grows by twice as much when twice as much is added, and what is square by four times.
            assert large - middle <= 2.5 * max(middle - small, 0) + 40
    segments = prompt.render("user", **data(2, 2, 2))
    assert all(type(segment) is Segment for segment in segments)
    assert {segment.kind for segment in segments} <= {"template", "data", "identifier"}


@settings(max_examples=30)
@given(templates())
def test_what_a_grammar_makes_is_refused_or_linear(text: str) -> None:
    check_linear(text)


@pytest.mark.slow
@settings(max_examples=1000)
@given(templates())
def test_more_of_what_a_grammar_makes_is_refused_or_linear(text: str) -> None:
    check_linear(text)


@pytest.mark.parametrize("text", PASSES)
def test_what_should_pass_does_and_is_linear(text: str) -> None:
    check_linear(text)
    assert Prompt.parse(question(text + "{{ item.title }}", "{{ event.rating }}"), "test").subject == "event"


def test_the_measure_of_cost_sees_what_is_square() -> None:
    rows = data(1, 1, 1)

    class Square(Prompt):
        def render(self, block: str, **variables: Any) -> list[Segment]:
            return [Segment("data", "x") for _ in variables["history"] for _ in variables["history"]]

    prompt = Prompt.parse(question("{{ item.title }}"), "test")
    square = Square(**{name: getattr(prompt, name) for name in Prompt.__dataclass_fields__})
    small, middle, large = (cost(square, **{**rows, "history": [1] * size})[1] for size in (8, 16, 32))
    assert large - middle > 2.5 * (middle - small) + 40


@pytest.mark.parametrize(
    ("before", "unit", "after"),
    [
        ("{{ ", "not ", "item.title }}"),
        ("{{ ", "item.a or ", "item.title }}"),
        ("{{ item.title", " | upper", " }}"),
        ("{{ item.title", " | default(item.a", ""),
        ("", "{% if item.a %}", ""),
        ("", "{% for a in item.a %}", ""),
        ("", "{{", ""),
        ("", "{#", ""),
        ("{{ ", "(", ""),
        ("{{ ", "[", ""),
        ("{{ item", ".a", " }}"),
        ("{{ ", "1 if item.a else ", "2 }}"),
        ("{{ 1", "_1", " }}"),
        ("{{ 0x", "f", " }}"),
        ("{{ 1e", "9", " }}"),
        ("", "{% raw %}", ""),
        ("", "{%-", ""),
        ("", "{% endblock %}{% block user %}", ""),
    ],
)
def test_what_is_long_or_deep_is_refused_and_breaks_nothing(before: str, unit: str, after: str) -> None:
    text = before + unit * (20_000 // len(unit)) + after
    with pytest.raises(PromptError, match=r"^test:\d+:\d+: "):
        Prompt.parse(question(text + "{{ item.title }}"), "test")


# ---- The contract ---------------------------------------------------------------------------------------------------

CONTRACT = contract(sequence())


@pytest.mark.parametrize(
    "source",
    [
        "{# Why it is so. #}\n\n" + sequence(),
        sequence(user=" \n Next:{# two dots #}\n"),
        sequence(user="{#- trimmed -#}Next:"),
        sequence(user="Ne{# within #}xt:"),
        "{%- block user -%}\n Next: {%- endblock user -%}\n{% block item -%} {{item.identifier}} {%- endblock %}",
        "{% block item %}{{ item . identifier }}{% endblock %}{% block user %}Next:{% endblock %}",
        sequence(user="{% raw %}Next:{% endraw %}"),
    ],
)
def test_sources_of_one_contract(source: str) -> None:
    assert contract(source) == CONTRACT
    prompt, other = Prompt.parse(sequence(), "one"), Prompt.parse(source, "other")
    assert prompt.contract == other.contract == CONTRACT
    assert prompt.hash != other.hash
    for block in ("user", "item"):
        assert prompt.render(block, item={"identifier": ItemRef(3)}) == other.render(
            block, item={"identifier": ItemRef(3)}
        )


@pytest.mark.parametrize(
    "source",
    [
        sequence(user="Next"),
        sequence(user="Ne xt:"),
        sequence(user="Next:{{ user.age }}"),
        sequence(user="{% if user.age %}Next:{% endif %}"),
        sequence(user="{{ 'Next:' }}"),
        sequence("{{ item.identifier }} "),
        sequence("{{ item.identifier }}{{ item.title }}"),
        "{% block system %}Next:{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}",
        sequence() + "{% block system %}{% endblock %}",
    ],
)
def test_sources_of_another_contract(source: str) -> None:
    assert Prompt.parse(source, "test").contract != CONTRACT


def test_constants_keep_their_kind_and_spaces_in_text_count() -> None:
    made = [
        question(user + "{{ item.title }}")
        for user in ("{{ 1 }}", "{{ '1' }}", "{{ 1.0 }}", "{{ true }}", "{{ 'true' }}", "a b", "a  b", "{{ ' 1' }}")
    ]
    assert len({contract(source) for source in made}) == len(made)
    assert contract(question("{{ 'x' }}{{ item.title }}")) == contract(question('{{ "x" }}{{ item.title }}'))


_PIECES = [
    "{# note #}",
    " ",
    "\n",
    "Seen",
    "{{ item.title }}",
    "{% if item.year %}",
    "x",
    "{% endif %}",
    "{#- n -#}",
    ".",
]


@settings(max_examples=30)
@given(st.lists(st.sampled_from(_PIECES), max_size=8), st.lists(st.sampled_from(_PIECES), max_size=8))
def test_one_contract_renders_alike(one: list[str], other: list[str]) -> None:
    prompts = []
    for pieces in (one, other, [piece for piece in one if "#" not in piece or "-" in piece]):
        try:
            prompts.append(Prompt.parse(question("".join(pieces) + "{{ item.title }}"), "test"))
        except PromptError:  # `if` and `endif` that do not match.
            assume(False)
    first, second, bare = prompts
    assert first.contract == bare.contract
    for year in (0, 1):
        row = {"title": "T", "year": year}
        rendered = [prompt.render("user", item=row) for prompt in prompts]
        assert rendered[0] == rendered[2]
        assert first.contract != second.contract or rendered[0] == rendered[1]


# ---- Lint -----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "item": ["item_id", "title", "answer", "list"],
    "user": ["user_id", "age"],
    "event": ["timestamp", "query", "rating"],
}


@pytest.mark.parametrize(
    ("source", "place", "message", "fix"),
    [
        (sequence("{{ item.identifier }}{{ user.age }}"), (2, 41), "the block `item` cannot read `user`",
         "It tells its own item alone: read `user` in the block `user`."),
        (sequence("{{ item.identifier }}{{ context.hour }}"), (2, 41), "the block `item` cannot read `context`",
         "read `context` in the block `user`."),
        (sequence("{{ item.identifier }}{{ history | length }}"), (2, 41), "cannot read `history`",
         "The history follows the head by itself"),
        (sequence(user="{{ history | length }}"), (1, 20), "cannot read `history`",
         "The history follows the head by itself"),
        (sequence(user="{{ item.title }}"), (1, 20), "cannot read `item`", "Read it in the block `item`."),
        (sequence(user="{{ event.rating }}"), (1, 20), "cannot read `event`", "A question alone reads it"),
        ("{% block system %}{{ history | length }}{% endblock %}" + question("{{ item.title }}"), (1, 22),
         "the block `system` cannot read `history`", "Read it in the block `user`."),
        (question("{{ item.title }}", "{{ user.age }}"), (2, 25), "cannot read `user`", "Read it in the block `user`."),
        (sequence(user=""), (1, 4), "an empty block `user`", "Write into it, or remove it."),
        (sequence() + "\n{% block system %} {# x #}\n {% endblock %}", (3, 4), "an empty block `system`", "remove it"),
        (sequence(user="Ne\u202ext:"), (1, 19), "the character U+202E, which nobody sees", "Remove it."),
        (question("{{ history | length }}"), (1, 20), "a history of which no item is told", "{% for past in history"),
        (question("{{ context.rating }}{{ item.title }}"), (1, 28), "`context.rating` comes of the choice",
         "as in `context.hour`."),
        (sequence(user="{{ context.event }}"), (1, 28), "`context.event` comes of the choice", "as in `context.hour`."),
        (question("{{ context.item_id }}{{ item.title }}"), (1, 20), "`context.item_id` is the item to be told",
         "Remove it."),
        (question("{{ context.query }}{{ item.title }}", "{{ event.query }}"), (1, 28),
         "the answer leaks: `context.query`", "Read it in one of the two."),
        (question("{{ item.answer }}"), (1, 25), "the answer leaks: `item.answer`", "Read it in one of the two."),
        (question("{{ context.qery }}{{ item.title }}"), (1, 28), "no column `qery`", "Did you mean 'query'?"),
        (question("{% for tag in item.list %}x{% endfor %}"), (1, 24), "the loop variable `tag` is not used", "drop"),
    ],
)  # fmt: skip
def test_what_looks_wrong_and_what_to_write_instead(
    source: str, place: tuple[int, int], message: str, fix: str
) -> None:
    found = Inspection(source)
    problems: list[Problem] = [*found.all_problems(COLUMNS), *found.remarks]
    problem = next(problem for problem in problems if message in problem.message)
    assert (problem.line, problem.column) == place
    assert fix in problem.fix


def test_one_mistake_is_told_once_and_without_a_fix_that_misleads() -> None:
    def told(source: str) -> list[tuple[str, str]]:
        return [(problem.message, problem.fix) for problem in Inspection(source).all_problems(COLUMNS)]

    keep = "A column of the log is kept by `genrec data import ... --context page`."
    ((message, fix),) = told(sequence(user="{{ context.page }}"))
    assert (message, fix) == ("the table of `context` has no column `page`.", f"Known: hour, query, weekday. {keep}")
    for column in ("rating", "event", "weight"):
        user = f"{{{{ context.{column} }}}}{{{{ item.title }}}}"
        assert len(told(question(user, f"{{{{ event.{column} }}}}"))) == 1 + (column not in COLUMNS["event"])
    (itme,) = told(sequence().replace("block item", "block itme"))
    assert itme == ("unknown block `itme`.", "Did you mean 'item'?")
    second = "{% block itme %}{{ item.title }}{% endblock %}"
    (itme,) = told(sequence(user="x") + second)
    assert itme == ("unknown block `itme`.", "Known: system.")
    (outside,) = told("a {# x #} b {{ item.title }} c{% if item.title %}d{% endif %}\n" + sequence())
    assert outside[0] == "something outside of the blocks."


def test_what_is_right_is_not_complained_of() -> None:
    source = sequence(user="{{ context.hour }}{{ context.weekday }}{{ context.query }} x\u200cy 👩\u200d👧")
    found = Inspection(source)
    assert found.all_problems(COLUMNS) == found.remarks == []
    assert "hour" in {
        problem.message.split("`")[3] for problem in Inspection(source).all_problems({"event": ["query"]})
    }


def table(*columns: str) -> dict[str, list[str]]:
    return {"item": [*columns], "user": [], "event": []}


@pytest.mark.parametrize(
    "user",
    [
        "{{ item.x | default('') | upper }}",
        "{{ item.x | default(item.y) | default('') }}",
        "{{ (item.x if item.title else item.y) | default('') }}",
        "{% if item.x is defined %}{{ item.x | upper }}{% endif %}",
        "{% if item.x is not none and item['x'] == 'a' %}{{ item['x'] }}{% endif %}",
        "{% for past in history %}{% if past.x is not none %}{{ past.x }}{% endif %}{% endfor %}",
        "{{ item.x if item.x is defined else 'none' }}",
    ],
)
def test_what_is_read_where_it_is_there_may_be_missing(user: str) -> None:
    source = question(user + "{{ item.title }}", "{{ event.rating }}")
    assert Inspection(source).all_problems({**table("title"), "event": ["rating"]}) == []
    row = {"title": "T", "identifier": ItemRef(0)}
    assert Prompt.parse(source, "test").render("user", item=row, history=[row])[-1].text.endswith("T")


@pytest.mark.parametrize(
    "user",
    [
        "{{ item.x | upper | default('') }}",
        "{{ ('a' if item.x else 'b') | default('') }}",
        "{{ (item.x | upper) is defined }}",
        "{{ item.title | default('') | default(item.x) }}",
        "{% if item.x is none %}{{ item.x }}{% endif %}",
        "{% if item.x is defined or item.title %}{{ item.x }}{% endif %}",
        "{% if item.x is defined %}{% else %}{{ item.x }}{% endif %}",
    ],
)
def test_what_is_computed_of_a_missing_column_is_told(user: str) -> None:
    source = question(user + "{{ item.title }}", "{{ event.rating }}")
    (problem,) = Inspection(source).all_problems({**table("title"), "event": ["rating"]})
    assert "no column `x`" in problem.message


@pytest.mark.parametrize(
    ("user", "column"),
    [("{% set a = 1 %}", 20), ("a {{ -1 }}", 22), ("{{ 1 + -item.year }}", 20), ("{{ item.title.format(1) }}", 20)],
)
def test_what_is_refused_is_quoted_from_its_beginning(user: str, column: int) -> None:
    (problem,) = Inspection(question(user + "{{ item.title }}")).problems
    assert (problem.line, problem.column) == (1, column)
    quoted = "set" if "set" in user else user.strip("a {%}")
    assert f"`{quoted}` is not allowed" in problem.message
