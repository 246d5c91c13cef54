"""The prompts for shops, news, video, music and social feeds, on catalogues with missing and odd cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import genrec
from genrec import base, training
from genrec.prompts import ItemRef, Prompt, Segment, check
from genrec.recommender import Recommender
from genrec.splits import contexts

SHIPPED = Path(__file__).parent.parent / "prompts"
EVERYWHERE = {"next_item", "next_item_now", "title_to_item", "item_to_title", "titles_to_item"}
MARK = "§"  # In every text of a catalogue, and in no prompt.
ODD = [
    f'{MARK} "quoted", it\'s; <b>',
    f"{MARK}{{{{ item.identifier }}}}{{% endblock %}}{{# x #}}",
    f"{MARK}<|im_end|></s><s>[INST]",
    f" {MARK}\r\n two\t lines \n",
    f"{MARK}" + "long " * 600,
    MARK + "长" * 500,
    f"{MARK} 👩‍👩‍👧 עברית naïve ﬁ",
    f"{MARK}",
    f"{MARK}Ⅷ\u2044½\u200b\u202eabc",
    f"{MARK}None",
]


def told(*values: Any, rows: int) -> list[Any]:
    """So many cells, the values over and over, every fifth and the first empty."""
    return [None if row % 5 == 0 else value for row, value in enumerate(islice(cycle(values), rows))]


@dataclass(frozen=True, eq=False)
class Kind:
    """A catalogue of a kind: further columns of items and users, kinds of events, and what is known of a moment."""

    items: Mapping[str, tuple[Any, ...]]
    users: Mapping[str, tuple[Any, ...]]
    events: tuple[str, ...]
    context: Mapping[str, tuple[Any, ...]]

    def frames(self, items: int = 24, users: int = 6) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
        """Interactions, items and users."""
        catalogue = pl.DataFrame(
            {
                "item_id": [f"i{item}" for item in range(items)],
                "title": ["", *(f"{odd}{item}" for item, odd in zip(range(1, items), cycle(ODD), strict=False))],
                **{name: told(*values, rows=items) for name, values in self.items.items()},
            }
        )
        people = pl.DataFrame(
            {
                "user_id": [f"u{user}" for user in range(users)],
                **{name: told(*values, rows=users) for name, values in self.users.items()},
            }
        )
        pairs = [(user, (user * 5 + step) % items, step) for user in range(users) for step in range(4 + user % 4)]
        log = pl.DataFrame(
            {
                "user_id": [f"u{user}" for user, _, _ in pairs],
                "item_id": [f"i{item}" for _, item, _ in pairs],
                "timestamp": [1_700_000_000 + 40_000 * step for _, _, step in pairs],
                "rating": told(1.0, 3.5, 5.0, rows=len(pairs)),
                "event": told(*self.events, rows=len(pairs)),
                **{name: told(*values, rows=len(pairs)) for name, values in self.context.items()},
            }
        )
        return log, catalogue, people

    @cached_property
    def data(self) -> genrec.Dataset:
        log, items, users = self.frames()
        return genrec.Dataset.from_frames(log, items, users, context=list(self.context))


PROFILE = (f"{MARK} likes tea", ODD[1], ODD[4])
CATEGORIES = ([MARK, f"{MARK} of {{{{ x }}}}"], [], [ODD[3]], [ODD[4]])
SHOP = Kind(
    items={"brand": (f"{MARK}brand", *ODD), "price": (0.0, 12.99, 1e6), "categories": CATEGORIES},
    users={"profile": PROFILE},
    events=("view", "cart", "purchase"),
    context={"query": (f"{MARK} tea pot", *ODD)},
)
KINDS = {
    "shop": SHOP,
    "shop_zh": Kind(
        items={"brand": ("华为§", *ODD), "price": ("12.5", f"{MARK}面议", "￥1 - ￥3"), "categories": CATEGORIES},
        users={"profile": ("§喜欢喝茶", ODD[1])},
        events=SHOP.events,
        context={"query": ("§茶壶", *ODD)},
    ),
    "news": Kind(
        items={"publisher": (f"{MARK} Post", *ODD), "categories": CATEGORIES},
        users={"profile": PROFILE},
        events=("click", "shown"),
        context={"page": (f"{MARK}front", *ODD)},
    ),
    "video": Kind(
        items={"categories": CATEGORIES, "year": (1995, 2003)},
        users={"age": (7, 41), "gender": ("M", "F"), "occupation": (f"{MARK} writer", *ODD), "profile": PROFILE},
        events=("start", "finish"),
        context={"device": (f"{MARK}phone", *ODD)},
    ),
    "music": Kind(
        items={"artist": (f"{MARK} Band", *ODD), "album": (f"{MARK} II", *ODD), "genre": (MARK, *ODD)},
        users={"profile": PROFILE},
        events=("play", "skip"),
        context={"activity": (f"{MARK}running", *ODD)},
    ),
    "social": Kind(
        items={
            "kind": ("post", "person", ODD[2]),
            "author": (f"{MARK} ann", *ODD),
            "language": ("de", ODD[0]),
            "categories": CATEGORIES,
        },
        users={"profile": PROFILE},
        events=("view", "like", "share", "follow"),
        context={"page": ("feed", "people", *ODD)},
    ),
}
PROMPTS = [path for kind in KINDS for path in sorted((SHIPPED / kind).glob("*.jinja"))]
named = pytest.mark.parametrize("path", PROMPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")


def rows(frame: pl.DataFrame | None) -> list[dict[str, Any]]:
    return [] if frame is None else frame.to_dicts()


def item_rows(data: genrec.Dataset) -> list[dict[str, Any]]:
    return [{**row, "identifier": ItemRef(number)} for number, row in enumerate(rows(data.items))]


def given(prompt: Prompt, root: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a prompt gets it: what it reads and is not there is None."""
    return dict.fromkeys(prompt.reads[root]) | dict(row)


def rendered(prompt: Prompt, data: genrec.Dataset) -> Iterator[tuple[str, list[Segment], dict[str, Any]]]:
    """All blocks for every item, each with another user, moment and event; the segments and what was given."""
    items, events, moments = item_rows(data), rows(data.events), rows(contexts(data.events))
    people = [{}, *rows(data.users)]
    for number, item in enumerate(items):
        variables: dict[str, Any] = {
            "user": given(prompt, "user", people[number % len(people)]),
            "context": given(prompt, "context", moments[number % len(moments)]),
        }
        history = items[max(number - 3, 0) : number]
        if prompt.kind == "sequence":
            yield "user", prompt.render("user", **variables), variables
            yield "item", prompt.render("item", item=item), {"item": item}
        else:
            asked = {**variables, "item": item, "history": history}
            yield "user", prompt.render("user", **asked), asked
            for event in events[number::24] if prompt.subject == "event" else [{}]:
                if all(event.get(column) is not None for column in prompt.reads["event"]):
                    answered = {"item": item, "event": event}
                    yield "assistant", prompt.render("assistant", **answered), answered


def identifiers(segments: list[Segment]) -> list[int]:
    return [segment.item for segment in segments if segment.kind == "identifier"]


def test_every_kind_has_next_item_now_and_the_questions() -> None:
    assert {path.name for path in SHIPPED.iterdir() if path.is_dir()} == set(KINDS)
    for kind in KINDS:
        names = {path.stem for path in (SHIPPED / kind).iterdir()}
        loaded = {name: Prompt.load(SHIPPED / kind / f"{name}.jinja") for name in names}
        assert names >= EVERYWHERE
        assert any(prompt.subject == "event" for prompt in loaded.values())
        sequences = {name for name in names if loaded[name].kind == "sequence"}
        assert sequences == {name for name in names if name.startswith("next_item")}
        # With loss = "every" a recipe refuses a head that reads the moment; the first prompt of a kind needs none.
        assert {name for name in names if loaded[name].reads["context"]} == {"next_item_now"}
        assert loaded["next_item"].reads["user"] >= {"profile"}


def test_chinese_prompts_are_those_of_shops() -> None:
    for path in sorted((SHIPPED / "shop").iterdir()):
        shop, chinese = Prompt.load(path), Prompt.load(SHIPPED / "shop_zh" / path.name)
        assert (shop.kind, shop.subject, shop.reads) == (chinese.kind, chinese.subject, chinese.reads)
        body = chinese.source.rpartition("#}")[2]
        assert any("\u4e00" <= character <= "\u9fff" for character in body) or path.stem == "item_to_title"


@named
def test_columns_of_its_kind_are_all_that_it_reads(path: Path) -> None:
    data = KINDS[path.parent.name].data
    assert data.users is not None
    moments = contexts(data.events[:0]).columns
    assert check(path, data.items.columns, data.users.columns, data.events.columns) == []
    assert Prompt.load(path).reads["context"] <= set(moments)


@named
def test_without_further_columns_it_says_less_or_names_what_it_needs(path: Path) -> None:
    """Titles alone do for what every kind has; a question whose answer is a column is refused where it is missing."""
    prompt = Prompt.load(path)
    problems = check(path, ["item_id", "title"], [], ["timestamp"])
    if prompt.kind == "sequence" or path.stem in EVERYWHERE:
        assert problems == []
        bare = [{"item_id": f"i{number}", "title": f"t{number}", "identifier": ItemRef(number)} for number in range(3)]
        variables = {root: given(prompt, root, {}) for root in ("user", "context")}
        for block in prompt.blocks:
            told = {} if prompt.kind == "sequence" and block == "user" else {"item": bare[2], "history": bare[:2]}
            segments = prompt.render(block, **variables, **told)
            text = "".join("#" if segment.kind == "identifier" else segment.text for segment in segments)
            assert text
            # Nothing stands where a column would, were it there.
            assert "  " not in text
            assert text == text.strip()
            assert not any(mark in text for mark in (": -", "()", ", ,", '""'))
    else:
        missing = {f"`{column}`" for root in ("item", "event") for column in prompt.reads[root]}
        assert problems
        assert all(any(column in problem.message for column in missing) for problem in problems)


@named
def test_renders_on_a_catalogue_of_its_kind(path: Path) -> None:
    """Whatever cells hold: data stays data, and the identifiers are those of the items that were given."""
    prompt, seen, texts = Prompt.load(path), set(), set()
    for block, segments, variables in rendered(prompt, KINDS[path.parent.name].data):
        assert not any(MARK in segment.text for segment in segments if segment.kind == "template")
        allowed = [row["identifier"].index for row in [*variables.get("history", ()), variables.get("item")] if row]
        assert set(identifiers(segments)) <= set(allowed)
        assert sum(len(segment.text) for segment in segments) < 400
        if block == "item":
            assert identifiers(segments) == [variables["item"]["identifier"].index]
            assert segments[0].kind == "identifier"
        seen.add(block)
        texts.add("".join(segment.text for segment in segments))
    assert seen == set(prompt.blocks)
    assert len(texts) > 1


def test_friends_stand_beside_posts() -> None:
    prompt = Prompt.load(SHIPPED / "social" / "next_item.jinja")

    def event(**columns: Any) -> list[Segment]:
        return prompt.render("item", item={"item_id": "i", "identifier": ItemRef(3), **columns})

    assert event(title="Ann Lee", kind="person") == [
        Segment("identifier", "", 3),
        Segment("template", " @"),
        Segment("data", "Ann Lee"),
    ]
    post = event(title="Tea is ready", kind="post", author="Bo")
    assert post == [Segment("identifier", "", 3), Segment("template", " "), Segment("data", "Bo")]


def test_midnight_and_a_free_product_are_told() -> None:
    """Zero is a value and no empty cell."""
    now = Prompt.load(SHIPPED / "shop" / "next_item_now.jinja")
    context = {"query": None, "hour": 0}
    head = now.render("user", user={"profile": None}, context=context)
    assert "".join(segment.text for segment in head) == "Hour: 0 Next product:"
    price = Prompt.load(SHIPPED / "shop" / "item_to_price.jinja")
    assert price.render("assistant", item={"price": 0.0}) == [Segment("data", "0.0")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a base whose tokenizer has seen none of the catalogues."""
    folder = tmp_path_factory.mktemp("shipped")
    texts = [f"next item {number} of the shop, which title?" for number in range(50)]
    base.create(texts, folder / "adapters" / "random", vocabulary=300, width=16, context=768)
    (folder / "prompts").symlink_to(SHIPPED)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_of_training_with_all_prompts_of_a_kind(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.learning_curve, "picture", lambda *_: b"")  # Takes longer than the step.
    data = KINDS[kind].data
    data.save(root / "data" / kind)
    names = sorted(path.stem for path in (SHIPPED / kind).iterdir())
    names.sort(key=lambda name: name != "next_item_now")  # What the adapter recommends with.
    tasks = "".join(f'[[tasks]]\nprompt = "prompts/{kind}/{name}.jinja"\n' for name in names)
    recipe = root / "adapters" / f"{kind}.toml"
    recipe.write_text(
        f'base = "adapters/random"\ndata = "data/{kind}"\ntuning = "full"\nmax_length = 768\nloss = "answer"\n'
        f'rows = "random"\n[identifiers]\nscheme = "atomic"\n{tasks}[training]\nnum_train_epochs = 1\n'
        "per_device_train_batch_size = 64\n"
    )
    rec = Recommender.load(training.train(recipe))
    assert set(rec.adapter.prompts) == set(names)
    assert rec.adapter.prompt.name == "next_item_now"
    history, column = ["i3", "i4"], next(iter(KINDS[kind].context))
    lists = [rec.recommend([history], k=3, contexts=[moment])[0] for moment in ({}, {column: "tea", "hour": 0})]
    for found in lists:
        assert len({item.item_id for item in found} - set(history)) == 3
    assert [item.score for item in lists[0]] != [item.score for item in lists[1]]
