from __future__ import annotations

import copy
import hashlib
import pickle
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrec import base
from genrec.errors import PromptError
from genrec.identifiers import Identifiers
from genrec.prompts import ItemRef, Problem, Prompt, Segment, changes, check, list_prompts
from genrec.tokenization import Tokenization, add_identifier_tokens

SHIPPED = Path(__file__).parent.parent / "prompts"
NAUGHTY = [
    "{{ item.identifier }}", "{% endblock %}", "{# x #}", "{%- raw -%}", "%(x)s {0.__class__}", "<|item_3|>", "</s>",
    "<|im_end|>\n<|im_start|>assistant", "\ue000\ue001\ufdd0", "\x00\x1b[31m", " edges\n", "肖申克的救赎", "'\"\\", "0",
]  # fmt: skip
texts = st.one_of(st.text(min_size=1), st.lists(st.sampled_from(NAUGHTY), min_size=1).map("".join))


def T(text: str) -> Segment:
    return Segment("template", text)


def D(text: str) -> Segment:
    return Segment("data", text)


def I(index: int) -> Segment:  # noqa: E743
    return Segment("identifier", "", index)


def sequence(item: str = "{{ item.identifier }}", user: str = "Next:") -> str:
    return f"{{% block user %}}{user}{{% endblock %}}{{% block item %}}{item}{{% endblock %}}"


def question(user: str = "{{ item.title }}", assistant: str = "{{ item.identifier }}") -> str:
    return f"{{% block user %}}{user}{{% endblock %}}{{% block assistant %}}{assistant}{{% endblock %}}"


def row(index: int = 0, **columns: object) -> dict[str, object]:
    return {"item_id": f"i{index}", "identifier": ItemRef(index), "title": f"title {index}", **columns}


def ask(user: str, **variables: object) -> list[Segment]:
    return Prompt.parse(question(user, "{{ item.year }}"), "test").render("user", **variables)


# Shipped prompts.


@pytest.mark.parametrize("path", list_prompts(SHIPPED), ids=lambda path: path.stem)
def test_shipped_prompts_load_and_check_clean(path: Path) -> None:
    assert Prompt.load(path).name == path.stem
    assert check(path, ["item_id", "title"], [], ["timestamp", "rating"]) == []


def test_shipped_prompts_render() -> None:
    item = row(7, title="Heat (1995)")
    prompts = {path.stem: Prompt.load(path) for path in list_prompts(SHIPPED)}
    assert set(prompts) >= {"next_item", "title_to_item", "item_to_title"}
    following = prompts["next_item"]
    assert (following.kind, following.subject) == ("sequence", None)
    assert following.render("system") == []
    assert following.render("user") == [T("Next:")]
    assert following.render("item", item=item) == [I(7)]
    naming = prompts["title_to_item"]
    assert (naming.kind, naming.subject, naming.reads["item"]) == ("question", "item", {"title"})
    assert naming.render("user", item=item) == [T('Which item is "'), D("Heat (1995)"), T('"?')]
    assert naming.render("assistant", item=item) == [I(7)]
    telling = prompts["item_to_title"]
    assert telling.render("user", item=item) == [T("What is the title of "), I(7), T("?")]
    assert telling.render("assistant", item=item) == [D("Heat (1995)")]
    going = prompts["titles_to_item"]
    assert (going.subject, going.reads["history"]) == ("history", {"title"})
    assert going.render("user", history=[item, row(8, title="Up")]) == [
        D("Heat (1995)"),
        T("; "),
        D("Up"),
        T("; next:"),
    ]
    assert going.render("assistant", item=item) == [I(7)]
    click, rating = prompts["click"], prompts["rating"]
    for prompt in (click, rating):
        assert (prompt.subject, prompt.reads["event"], prompt.reads["item"]) == ("event", {"rating"}, set())
    assert click.render("user", history=[row(3), row(4)], item=item) == [I(3), I(4), T(" Like "), I(7), T("?")]
    given = [1.0, 3.5, 4.0, 5.0]
    assert [click.render("assistant", event={"rating": value}) for value in given] == [
        [T("no")], [T("no")], [T("yes")], [T("yes")],
    ]  # fmt: skip
    assert [rating.render("assistant", event={"rating": value}) for value in given] == [
        [D("1")], [D("3.5")], [D("4")], [D("5")],
    ]  # fmt: skip


# Segments.


@given(texts, texts)
def test_data_comes_back_as_one_segment_unchanged(title: str, other: str) -> None:
    prompt = Prompt.parse(sequence("{{ item.identifier }} ({{ item.title }})\n"), "test")
    assert prompt.render("item", item=row(3, title=title)) == [I(3), T(" ("), D(title), T(")\n")]
    history = [{"title": title}, {"title": other}]
    segments = ask("Seen: {% for past in history %}<{{ past.title }}>{% endfor %}", history=history)
    assert segments == [T("Seen: <"), D(title), T("><"), D(other), T(">")]
    assert ask(" {{ item.title }} ", item=row(title=title)) == [D(title)]


def test_identifiers_never_merge_and_other_neighbours_do() -> None:
    history = [row(4), row(4), row(9)]
    assert ask("{% for past in history %}{{ past.identifier }}{% endfor %}", history=history) == [I(4), I(4), I(9)]
    assert ask("{{ item.title }}{{ item.year }}", item=row(year=1999)) == [D("title 01999")]
    assert ask('a{% if item.title %}b{% endif %}{{ "c" }}', item=row()) == [T("ab"), D("c")]
    assert ask("a{{ item.brand }}b", item=row(brand="")) == [T("ab")]


def test_edges_are_stripped_but_not_in_the_item() -> None:
    source = "{% block user %}\n  Hello \n\n you\n{% endblock %}{% block item %}{{ item.identifier }} \n{% endblock %}"
    prompt = Prompt.parse(source, "test")
    assert prompt.render("user") == [T("Hello \n\n you")]
    assert prompt.render("item", item=row(1)) == [I(1), T(" \n")]
    assert ask(" \n{% if item.title %}\n {{ item.title }}\n{% endif %}\n", item=row(title=" t ")) == [D(" t ")]
    assert Prompt.parse(sequence(user=" \n "), "test").render("user") == []


def test_constants_are_not_folded_into_template_text() -> None:
    assert ask('x{{ "<|s|>" }}{{ item.year }}{{ "a" | upper }}', item=row(year=3)) == [T("x"), D("<|s|>3A")]
    assert ask('{{ "a" if item.year else "b" }}', item=row(year=0)) == [D("b")]
    assert ask("{% raw %}{{ x }}{% endraw %}{{ item.year }}", item=row(year=1)) == [T("{{ x }}"), D("1")]


@pytest.mark.parametrize(
    ("expression", "printed"),
    [
        ("item.none", ""),
        ("item.none | lower", ""),
        ("item.none | join(', ')", ""),
        ("item.none | length", "0"),
        ("item.none or 'no brand'", "no brand"),
        ("item.none | default('no brand')", "no brand"),
        ("item.absent | default(item.title)", "heat Wave"),
        ("'yes' if item.absent is defined else 'no'", "no"),
        ("'yes' if item.none is none and item.title is not none", "yes"),
        ("'yes' if item.year < 1990", ""),
        ("item.list | join(' / ') | upper", "A / B / C"),
        ("item.list | first", "a"),
        ("item.list | last", "c"),
        ("item.list | length", "3"),
        ("item.title | title", "Heat Wave"),
        ("item.title | truncate(7)", "heat..."),
        ("item.long | truncate(9)", "xxxxxx..."),
        ("item.title | upper | trim", "HEAT WAVE"),
        ("item.price | round(1)", "9.5"),
        ("item.price | int", "9"),
        ("item['odd name']", "odd"),
        ("item.items", "a column"),
        ("'a' in item.list", "True"),
        ("item.price", "9.49"),
    ],
)
def test_expressions(expression: str, printed: str) -> None:
    item = row(none=None, title="heat Wave", year=1995, list=["a", "b", "c"], long="x" * 20, price=9.49)
    item |= {"odd name": "odd", "items": "a column"}
    text = "".join(segment.text for segment in ask(f"{{{{ {expression} }}}}{{{{ item.none }}}}", item=item))
    assert text == printed


def test_loops() -> None:
    source = (
        "{% for c in item.list if c != 'b' %}{{ loop.index }}{{ c }}{% if not loop.last %}, {% endif %}{% endfor %}"
    )
    assert ask(source, item=row(list=["a", "b", "c"])) == [D("1a"), T(", "), D("2c")]
    nested = "{% for p in history %}{% for c in p.list %}{{ c }}{% endfor %};{% else %}nothing{% endfor %}"
    assert ask(nested, history=[row(list=["a", "b"]), row(list=None)]) == [D("ab"), T(";;")]
    assert ask(nested, history=[]) == [T("nothing")]
    assert ask("{% if history %}{{ history | length }}{% endif %}", history=[row(), row()]) == [D("2")]


def test_user_rows() -> None:
    prompt = Prompt.parse(sequence(user="{% if user is defined %}{{ user.age }} {% endif %}Next:"), "test")
    assert prompt.render("user") == [T("Next:")]
    assert prompt.render("user", user={"age": 30}) == [D("30"), T(" Next:")]


@pytest.mark.parametrize(
    ("user", "item", "place", "message"),
    [
        ("{{ item.titel }}", row(), "1:20", "Did you mean 'title'?"),
        ("\n{{ item.title }}{{ item.list }}", row(5, list=["a"]), "2:20", "(item_id 'i5'): a list cannot be printed"),
        ("{{ item.when }}", row(when=b"x"), "1:20", "type bytes"),
        ("{% for c in item.title %}{{ c }}{% endfor %}", row(), "1:", "a list is needed"),
        ("{{ item.title | round }}", row(), "1:20", "could not convert"),
        ("{% if item.title < 3 %}{% endif %}", row(), "1:", "not supported"),
        ("{{ item.title | default(item.x) }}{{ item.x }}", row(), "1:54", "no column `x`"),
        ("{{ user.age }}{{ item.title }}", row(), "1:20", "`user` is not given here"),
    ],
)
def test_values_that_cannot_be_rendered(user: str, item: dict[str, object], place: str, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        ask(user, item=item)
    assert str(caught.value).startswith(f"test:{place}")
    assert message in str(caught.value)


def test_identifier_refs_inside_lists_are_no_text() -> None:
    with pytest.raises(PromptError, match="type ItemRef"):
        ask("{{ item.list | join }}", item=row(list=[ItemRef(1)]))


def test_blocks_that_are_not_there() -> None:
    prompt = Prompt.parse("{% block item %}{{ item.identifier }}{% endblock %}", "test")
    assert prompt.blocks == ("item",)
    assert prompt.render("system") == prompt.render("user") == []
    with pytest.raises(PromptError, match="no block `assistant`"):
        prompt.render("assistant", item=row())


# Attributes.


def test_a_column_called_identifier_is_one_like_any_other_where_there_is_no_item() -> None:
    text = "{% block user %}{{ user.identifier }} {{ context.identifier }}{% endblock %}"
    prompt = Prompt.parse(text + "{% block item %}{{ item.identifier }}{% endblock %}", "mine")
    assert (prompt.reads["user"], prompt.reads["context"], prompt.reads["item"]) == (
        {"identifier"},
        {"identifier"},
        set(),
    )


def test_reads_and_subject() -> None:
    source = question(
        "{{ user.age }}{% for p in history %}{{ p.title }}{{ p.identifier }}{% for c in p.tags %}{{ c }}{% endfor %}"
        "{% endfor %}",
        "{{ item.identifier }}{{ item.brand }}",
    )
    prompt = Prompt.parse(source, "test")
    assert (prompt.kind, prompt.subject, prompt.blocks) == ("question", "history", ("user", "assistant"))
    read = {"item": {"brand"}, "history": {"title", "tags"}, "user": {"age"}, "context": set(), "event": set()}
    assert prompt.reads == read


def test_event_questions() -> None:
    user = "{{ user.age }}{% for p in history %}{{ p.title }}{% endfor %}{{ item.identifier }}{{ item.title }}"
    prompt = Prompt.parse(question(user, '{{ "yes" if event.event == "click" and event.rating else "no" }}'), "test")
    assert (prompt.kind, prompt.subject, prompt.reads["event"]) == ("question", "event", {"event", "rating"})
    assert prompt.check(["title"], ["age"], ["event", "rating"]) == []
    (problem,) = prompt.check(["title"], ["age"], ["event", "timestamp"])
    assert (problem.line, problem.column) == (1, 195)
    assert problem.message == "the table of `event` has no column `rating`."
    assert problem.fix == "Known: event, timestamp."
    assert prompt.render("assistant", event={"event": "click", "rating": 1.0}) == [D("yes")]
    guarded = Prompt.parse(question(assistant="{% if event.rating is defined %}yes{% endif %}"), "test")
    assert guarded.check(["title"], [], []) == []


def test_a_missing_file_names_the_closest(tmp_path: Path) -> None:
    (tmp_path / "click.jinja").write_text(question())
    with pytest.raises(PromptError, match=r"klick\.jinja: No such file.*Did you mean 'click\.jinja'\? `genrec init`"):
        Prompt.load(tmp_path / "klick.jinja")


@given(st.text(alphabet="abc \n"), st.text(alphabet="abc \n"))
def test_hash_is_of_the_source(one: str, other: str) -> None:
    hashes = [Prompt.parse(sequence(user=text), "test").hash for text in (one, other)]
    assert (hashes[0] == hashes[1]) == (one == other)
    assert hashes[0] == hashlib.sha256(sequence(user=one).encode()).hexdigest()


def test_line_ends_and_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "unix.jinja").write_bytes(b"{# 1 #}\n" + sequence().encode())
    (tmp_path / "windows.jinja").write_bytes(b"\xef\xbb\xbf{# 1 #}\r\n" + sequence().encode())
    assert Prompt.load(tmp_path / "unix.jinja").hash == Prompt.load(tmp_path / "windows.jinja").hash
    assert Prompt.parse("{# 1 #}\r\n" + sequence(), "test").hash == Prompt.load(tmp_path / "unix.jinja").hash


def test_changes_are_those_that_the_model_sees() -> None:
    one = Prompt.parse("{# One\nremark. #}\n\n" + sequence(), "one")
    other = Prompt.parse(sequence(user="New:") + "{# Another. #}\n\n", "other")
    told = changes(one, other, "a", "b").splitlines()
    assert told[:2] == ["--- a", "+++ b"]
    assert any(line.startswith("+{% block user %}New:") for line in told)
    assert not [line for line in told if "#" in line or not line[1:].strip()]
    spaced = [Prompt.parse(sequence("{{ item.identifier }}" + space), "x") for space in ("\n", "\n\n")]
    assert "+" in changes(*spaced, "a", "b")  # Blank lines alone: then they are what differs.


def test_copies_and_pickles_render() -> None:
    prompt = Prompt.parse(sequence(), "test")
    for other in (pickle.loads(pickle.dumps(prompt)), copy.deepcopy(prompt)):
        assert other == prompt
        assert other.render("item", item=row(2)) == [I(2)]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "latin.jinja").write_bytes(b"\xff")
    for path, message in ((tmp_path / "none.jinja", "cannot read"), (tmp_path / "latin.jinja", "not UTF-8")):
        with pytest.raises(PromptError, match=message):
            Prompt.load(path)
        with pytest.raises(PromptError, match=message):
            check(path)
    with pytest.raises(PromptError, match="no folder"):
        list_prompts(tmp_path / "none")
    assert list_prompts(tmp_path) == [tmp_path / "latin.jinja"]


# Breaches of the contract.


@pytest.mark.parametrize(
    ("source", "place", "message"),
    [
        ("", "1:1", "neither `item` nor `assistant`"),
        ("{% block user %}x{% endblock %}", "1:1", "neither `item` nor `assistant`"),
        (sequence() + "{% block assistant %}{{ item.title }}{% endblock %}", "1:1", "both `item` and `assistant`"),
        (sequence() + "\n\n  text", "3:3", "outside of the blocks"),
        (sequence() + "\n {{ item.title }}", "2:5", "outside of the blocks"),
        (sequence() + "\n{% if true %}{% endif %}", "2:4", "outside of the blocks"),
        (sequence() + "\n{% block systen %}{% endblock %}", "2:4", "unknown block `systen`. Did you mean 'system'?"),
        (sequence() + "\n{% block item %}{{ item.identifier }}{% endblock %}", "2:4", "a second block `item`"),
        (sequence("\n{{ item.identifier }}"), "1:39", "does not begin with"),
        (sequence("{{ item.title }}{{ item.identifier }}"), "1:39", "does not begin with"),
        (sequence("{% if item.title %}{{ item.identifier }}{% endif %}"), "1:39", "does not begin with"),
        (sequence(""), "1:39", "does not begin with"),
        (sequence("{{ item.identifier }}\n{{ item.identifier }}"), "2:4", "a second identifier"),
        (sequence("{{ item.identifier }}{{ user.age }}"), "1:76", "the block `item` cannot read `user`"),
        (sequence("{{ item.identifier }}{{ history | length }}"), "1:76", "the block `item` cannot read `history`"),
        (sequence(user="{{ history | length }}"), "1:20", "the block `user` cannot read `history`"),
        (sequence(user="{{ item.title }}"), "1:20", "the block `user` cannot read `item`"),
        (question("Which?"), "1:4", "a question about nothing"),
        ("{% block assistant %}{{ item.title }}{% endblock %}", "1:1", "a question about nothing"),
        (question("{{ history | length }}{{ item.title }}"), "1:42", "came next, and this tells it"),
        (question(assistant="yes"), "1:50", "an answer that reads nothing"),
        (question("{{ event.rating }}{{ item.title }}"), "1:20", "the block `user` cannot read `event`"),
        (sequence("{{ item.identifier }}{{ event.rating }}"), "1:76", "the block `item` cannot read `event`"),
        (sequence(user="{{ event.rating }}"), "1:20", "the block `user` cannot read `event`"),
        (question(assistant="{{ event.rating }}{{ item.identifier }}"), "1:89", "reads `item` beside `event`"),
        (question("Which?", "{{ event.rating }}"), "1:4", "a question about nothing"),
        (question(assistant="{{ event }}"), "1:71", "no single value"),
        (question(assistant="{{ event.rating }}{% for a in event %}{% endfor %}"), "1:98", "no single value"),
        (question(assistant="{{ history | length }}"), "1:71", "the block `assistant` cannot read `history`"),
        ("x" * 70_000, "1:1", "at most 65536"),
        (sequence(user="{{ "), "1:21", "unexpected '%'"),
        (sequence(user="\n{{ 'a }}"), "2:4", "unexpected char"),
        (sequence(user="\n{% block %}"), "2:10", "expected token"),
        ("{% block user %}", "1:", "endblock"),
        (sequence(user="a\n\x00"), "2:1", "control character U+0000"),
        (sequence(user="a\x9f"), "1:18", "control character U+009F"),
        (sequence(user="{# \x1b #}"), "1:20", "control character U+001B"),
    ],
)
def test_structure(source: str, place: str, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        Prompt.parse(source, "test")
    assert f"test:{place}" in str(caught.value)
    assert message in str(caught.value)


# Each stands on the fourth line of the file.
REFUSED = [
    # Calls, and with them everything that the advisories on Jinja's sandbox need.
    "{{ item.title.format(item) }}",  # CVE-2016-10745
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{x.__class__}'.format_map(item) }}",  # CVE-2019-10906
    "{{ ('a{x.__class__.__init__}b' | attr('format'))(x=item) }}",  # CVE-2024-56326, CVE-2025-27516
    "{{ item | attr('title') }}",
    "{{ item.title | attr('format') }}",
    "{{ ['format'] | map('attr') | list }}",
    "{{ item.__class__ }}",
    "{{ item['__class__'] }}",
    "{{ item.title.__class__.__mro__ }}",
    "{{ ''.__class__ }}",
    "{{ item.title['upper'] }}",
    "{{ item[item.title] }}",
    "{{ item.title[0] }}",
    "{{ item.title[:3] }}",
    "{{ cycler('a') }}",
    "{{ joiner() }}",
    "{{ namespace() }}",
    "{{ dict(a=1) }}",
    "{{ lipsum(n=100000) }}",
    "{{ lipsum }}",
    "{{ self.user() }}",
    "{{ super() }}",
    "{{ caller }}",
    "{{ varargs }}",
    "{{ loop.index }}",
    "{{ config }}",
    "{{ environment }}",
    "{{ item.items() }}",
    "{{ history.append(1) }}",
    # Memory and time.
    "{% for i in range(9999999) %}x{% endfor %}",
    "{% for i in [1, 2] %}{{ i }}{% endfor %}",
    "{% for i in 'abc' %}{{ i }}{% endfor %}",
    "{% for a in history %}{% for b in history %}{{ b.title }}{% endfor %}{% endfor %}",
    "{% for a in item.list %}{{ item.title }}{{ a }}{% endfor %}",
    "{% for a in item.list %}{% for b in item.list %}{{ b }}{% endfor %}{% endfor %}",
    "{% for a in item.list %}{% for b in a %}{{ b }}{% endfor %}{% endfor %}",
    "{% for a in item.list recursive %}{{ a }}{% endfor %}",
    "{% for a, b in item.list %}{{ a }}{% endfor %}",
    "{% for item in item.list %}{{ item }}{% endfor %}",
    "{% for a in item.list | first %}{{ a }}{% endfor %}",
    "{% for a in item.identifier %}{{ a }}{% endfor %}",
    "{% for a in item %}{{ a }}{% endfor %}",
    "{% for a in history %}{{ loop }}{{ a.title }}{% endfor %}",
    "{% for a in history %}{{ loop.cycle('x') }}{{ a.title }}{% endfor %}",
    "{% for a in history %}{{ a }}{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '%0999999999d' | format(1) }}",
    "{{ 9 ** 9999999 }}",
    "{{ item.year + 1 }}",
    "{{ -item.year }}",
    "{{ item.title ~ item.title }}",
    "{{ item.title | center(99999999) }}",
    "{{ item.title | indent(99999999) }}",
    "{{ item.title | wordwrap(1) }}",
    "{{ item.title | replace('', 'aaaaaaaa') }}",
    "{{ item | tojson }}",
    "{{ item | list }}",
    "{{ item.title | safe }}",
    "{{ item.title | each }}",
    "{{ item.list | join(item.title) }}",
    "{{ item.list | join(', ', 'title') }}",
    "{{ item.list | join(d=', ') }}",
    "{{ item.list | join(*item.list) }}",
    "{{ item.title | truncate(item.year) }}",
    "{{ item.title | truncate('3') }}",
    "{{ item.year | round(true) }}",
    "{{ item.title | lower(1) }}",
    "{% if item.title is mapping %}{% endif %}",
    "{% if item.title is defined(1) %}{% endif %}",
    "{% if item.title is divisibleby(0) %}{% endif %}",
    "{{ item.title == none }}",
    # Statements.
    "{% set x = 1 %}",
    "{% set x %}a{% endset %}",
    "{% macro m() %}{% endmacro %}",
    "{% call item.title() %}{% endcall %}",
    "{% filter upper %}{{ item.title }}{% endfilter %}",
    "{% with x = item.title %}{{ x }}{% endwith %}",
    "{% autoescape true %}{{ item.title }}{% endautoescape %}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% from 'x' import y %}",
    "{% extends 'x' %}",
    "{% do item.title %}",
    "{% block system %}{% endblock %}",
    "{{ [item.title] }}",
    "{{ {'a': item.title} }}",
    "{{ item.title, item.year }}",
    # Identifiers and rows are no text.
    "{{ item }}",
    "{{ history }}",
    "{{ history | join }}",
    "{{ history | first }}",
    "{{ item.identifier | upper }}",
    "{{ item.identifier | default('x') }}",
    "{{ item['identifier'] | upper }}",
    "{{ item.identifier or 'x' }}",
    "{{ item.identifier if item.title else 'x' }}",
    "{{ 'a' ~ item.identifier }}",
    "{{ item.identifier == 3 }}",
    "{{ item.list | default(item.identifier) }}",
    "{% if item.identifier %}{% endif %}",
    "{{ item.identifier.index }}",
    "{{ titel }}",
    "{{ 'x' if item }}",
    "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "{% if true %}" * 300 + "{% endif %}" * 300,
    "{{ 1" + "0" * 5_000 + " }}",
]


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:40])
def test_refused_when_loading_with_its_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "test.jinja"
    path.write_text("{# 1 #}\n{# 2 #}\n" + question("\n" + text, "{{ item.year }}{{ item.brand }}"), encoding="utf-8")
    with pytest.raises(PromptError) as caught:
        Prompt.load(path)
    assert f"{path}:{1 if 'cannot be compiled' in str(caught.value) else 4}:" in str(caught.value)
    assert check(path)


def test_did_you_mean_and_columns() -> None:
    with pytest.raises(PromptError, match=r"^test:2:4: the block `user` cannot read `itm`. Did you mean 'item'\?"):
        Prompt.parse(question("\n{{ itm.title }}"), "test")
    with pytest.raises(PromptError, match=r"^test:1:33: the filter `uper` is not allowed. Did you mean 'upper'\?"):
        Prompt.parse(question("{{ item.title | uper }}"), "test")


# Problems.


def test_remarks_do_no_harm_and_are_made_of_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "odd.jinja"
    path.write_text(sequence(user="") + "{% block system %}\u200b{% endblock %}", encoding="utf-8")
    assert [problem.message for problem in check(path)] == [
        "an empty block `user`.", "the character U+200B, which nobody sees and the model reads.",
    ]  # fmt: skip
    assert Prompt.load(path).check() == []


def test_columns_are_checked_table_by_table(tmp_path: Path) -> None:
    path = tmp_path / "columns.jinja"
    path.write_text(
        question("{{ item.title }}", "{{ event.rating }}") + "{% block system %}{{ user.age }}{% endblock %}"
    )
    has = {"item_columns": ["title"], "user_columns": ["age"], "event_columns": ["rating"]}
    assert check(path, **has) == Prompt.load(path).check(**has) == []
    for lacking, what in (("item_columns", "title"), ("user_columns", "age"), ("event_columns", "rating")):
        found = check(path, **{**has, lacking: ["other"]})
        assert found == Prompt.load(path).check(**{**has, lacking: ["other"]})
        assert [what in problem.message for problem in found] == [True]


def test_check_lists_all_problems_in_order(tmp_path: Path) -> None:
    path = tmp_path / "many.jinja"
    path.write_text(
        "{% block user %}\n{{ item.titel }} {{ item.title | uper }}\n  {% for tag in item.tags %}x{% endfor %}\n"
        "{{ item.brand }}{{ user.agee }}{{ lipsum() }}{% endblock %}\n"
        "{% block assistant %}{{ item.brand }} {{ item.x | default('') }}{{ 'a' if item.y is defined }}{% endblock %}",
        encoding="utf-8",
    )
    problems = check(path, ["item_id", "title", "tags", "brand"], ["user_id", "age"])
    assert [(problem.line, problem.column) for problem in problems] == [
        (2, 9),
        (2, 34),
        (3, 10),
        (4, 9),
        (4, 25),
        (4, 35),
    ]
    titel, uper, tag, brand, age, lipsum = problems
    assert titel == Problem(2, 9, "the table of `item` has no column `titel`.", "Did you mean 'title'?")
    assert "the filter `uper`" in uper.message
    assert "`tag` is not used" in tag.message
    assert "the answer leaks: `item.brand`" in brand.message
    assert age.fix == "Did you mean 'age'?"
    assert "`lipsum()` is not allowed" in lipsum.message
    assert all(problem.fix and str(problem).startswith(f"{problem.line}:{problem.column}: ") for problem in problems)


def test_prompt_check_is_lint_alone() -> None:
    prompt = Prompt.parse(question("{{ item.identifier }}"), "test")
    (leak,) = prompt.check()
    assert (leak.line, leak.column) == (1, 25)
    assert "leaks" in leak.message
    history = Prompt.parse(question("{% for p in history %}{{ p.titel }}{% endfor %}"), "test")
    assert history.check() == []
    assert [problem.fix for problem in history.check(["title"])] == ["Did you mean 'title'?"]
    assert history.check(["titel"], []) == []


def test_placement_survives_whitespace_control_and_wide_text() -> None:
    source = (
        "{#- 注释 -#}  \n {%- block user -%}\n\n 你好 {{- item.title -}}  \n {{ 'ü\\n' }} {{ nope }}{%- endblock -%}"
    )
    with pytest.raises(PromptError, match=r"^test:5:17: .*`nope`"):
        Prompt.parse(source + "{% block assistant %}{{ item.identifier }}{% endblock %}", "test")


@given(
    st.lists(st.sampled_from([*NAUGHTY, "{{", "}}", "{%", "%}", "item", ".title", "history", "|", "for", "in", "if "]))
)
def test_any_source_is_a_prompt_or_a_prompt_error(parts: list[str]) -> None:
    source = question("".join(parts) + "{{ item.title }}")
    try:
        prompt = Prompt.parse(source, "test")
    except PromptError:
        return
    prompt.render("user", item=row(), history=[])


def test_an_answer_reads_no_user() -> None:
    source = "{% block user %}{{ item.title }}?{% endblock %}{% block assistant %}{{ user.age }}{% endblock %}"
    with pytest.raises(PromptError, match="user"):
        Prompt.parse(source, "answer")


# What cannot be rendered or does not fit.


@pytest.fixture(scope="module")
def tokenization() -> Tokenization:
    items = pl.DataFrame({"item_id": [f"i{n}" for n in range(9)], "title": [f"A film about {n}" for n in range(9)]})
    identifiers = Identifiers.build("atomic", items["item_id"].to_list())
    tokenizer = base.train_tokenizer(items["title"].to_list(), 300)
    add_identifier_tokens(tokenizer, identifiers)
    return Tokenization(tokenizer, identifiers, items, max_length=64)


@pytest.mark.parametrize(
    ("source", "place", "message", "fix"),
    [
        (sequence(user="Next " * 200), (1, 4), "prompt test: its head takes", "Shorten the head or raise max_length."),
        (sequence("{{ item.identifier }}" + "{{ item.title }}" * 40), (1, 39), "so that it is never read.", "Shorten"),
        (question("{{ item.title }}" * 80, "{{ item.identifier }}"), (1, 4), "question and answer take", "Raise"),
        (question("{{ item.title }}" * 80, "{{ event.rating }}"), (1, 4), "question and answer take", "Raise"),
        (question("\n{{ item.title | round }}"), (2, 4), "in block `user` (item_id 'i0')", "Print"),
        (sequence("{{ item.identifier }} {{ item.title | int }}"), (1, 77), "in block `item` (item_id 'i0')", "Print"),
        (sequence(user="Now <|item_3|> <s>"), (1, 21), "`<|item_3|>` is read as plain text", "Remove it"),
    ],
)  # fmt: skip
def test_a_prompt_that_cannot_be_read_is_told_with_its_place(
    tokenization: Tokenization, tmp_path: Path, source: str, place: tuple[int, int], message: str, fix: str
) -> None:
    path = tmp_path / "test.jinja"
    path.write_text(source)
    problem = check(path, tokenization=tokenization)[0]
    assert (problem.line, problem.column) == place
    assert message in problem.message
    assert problem.fix.startswith(fix)
    assert check(path) == []


def test_what_fits_is_not_complained_of(tokenization: Tokenization) -> None:
    for path in list_prompts(SHIPPED):
        assert check(path, tokenization=tokenization) == []
    user = "{{ user.age }} {{ context.hour }} {{ context.query }}"
    assert Prompt.parse(sequence(user=user), "test").check(tokenization=tokenization) == []


def test_prompts_read_the_context_of_a_choice() -> None:
    prompt = Prompt.parse(sequence(user="{{ context.query | default('no query') }} {{ context.hour }}"), "test")
    assert prompt.reads["context"] == {"query", "hour"}
    assert prompt.render("user", context={"query": "tea", "hour": 9}) == [D("tea"), T(" "), D("9")]
    assert prompt.render("user", context={"query": None, "hour": None}) == [D("no query")]
    assert prompt.check([], [], ["timestamp", "query"]) == []
    assert [problem.fix for problem in prompt.check([], [], ["query"])] == [
        "Known: query. It follows from timestamps, which the log lacks."
    ]
    with pytest.raises(PromptError, match="`context` is not given here"):
        prompt.render("user")
    with pytest.raises(PromptError, match=r"^test:1:71: the block `assistant` cannot read `context`"):
        Prompt.parse(question(assistant="{{ context.hour }}"), "test")
