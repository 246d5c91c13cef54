from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import genrec
from genrec.batch import job_of, load, output, recommend_rows, run_batch
from genrec.batch.shards import Loaded, catalogue_hash, check, make, today
from genrec.errors import ConfigError, DataError
from genrec.prompts import Prompt
from genrec.recommender import Recommender

ITEMS = [f"i{number}" for number in range(24)]
STUDIOS = {item: f"studio {number // 8}" for number, item in enumerate(ITEMS)}


@pytest.fixture(scope="module")
def dummy(workspace: Path) -> Recommender:
    return Recommender.load(workspace / "adapters" / "lora", engine="dummy")


def loaded(recommender: Recommender, **keys: Any) -> Loaded:
    return load(job_of({"adapter": "", "users": "users", "out": "out", **keys}), recommender)


def user(history: list[str], **columns: Any) -> dict[str, Any]:
    return {"user_id": "ann", "history": history, **columns}


def frame(*rows: dict[str, Any]) -> pl.DataFrame:
    lists = dict.fromkeys(("history", "allowed", "blocked"), pl.List(pl.String)) | {"where": pl.String}
    columns = {name: kind for name, kind in lists.items() if any(name in row for row in rows)}
    told = [{"user_id": f"u{number}", **row} for number, row in enumerate(rows)]
    return pl.DataFrame(told, schema={"user_id": pl.String, **columns}, strict=False)


def lists(loaded: Loaded, *rows: dict[str, Any]) -> list[list[str]]:
    """The items of each row, in its order."""
    numbered = [{**row, "user_id": f"u{number}"} for number, row in enumerate(rows)]
    found = recommend_rows(loaded, frame(*numbered))
    return [found.filter(user_id=f"u{number}")["item_id"].to_list() for number in range(len(rows))]


def ranking(recommender: Recommender, history: list[str]) -> list[str]:
    """The whole catalogue as the engine ranks it, without any restriction."""
    found = recommender.search([recommender.indices(history)], 24, exclude_seen=False)
    return [recommender.item_ids[item] for item in found.items[0]]


# Who may be recommended what

some_items = st.lists(st.sampled_from(ITEMS), max_size=24)
studio = st.sampled_from(["studio 0", "studio 1", "studio 2"])


@settings(max_examples=60)
@given(st.data())
def test_lists_are_the_best_of_the_legal_items(dummy: Recommender, data: st.DataObject) -> None:
    where = data.draw(st.none() | studio)
    seen = data.draw(st.booleans())
    k = data.draw(st.integers(1, 24))
    ready = loaded(dummy, k=k, exclude_seen=seen, where=where and f"brand <> '{where}'")
    rows = [
        user(
            data.draw(st.lists(st.sampled_from(ITEMS), max_size=5)),
            allowed=data.draw(st.none() | some_items),
            blocked=data.draw(st.none() | some_items),
            where=data.draw(st.none() | studio.map(lambda name: f"brand = '{name}'")),
        )
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    for row, found in zip(rows, lists(ready, *rows), strict=True):
        legal = [
            item
            for item in ranking(dummy, row["history"])
            if (where is None or STUDIOS[item] != where)
            and (row["allowed"] is None or item in row["allowed"])
            and item not in (row["blocked"] or [])
            and (row["where"] is None or STUDIOS[item] in row["where"])
            and not (seen and item in row["history"])
        ]
        assert found == legal[:k]


def test_unknown_items_in_lists_of_a_row_are_no_error(dummy: Recommender) -> None:
    ready = loaded(dummy, k=3)
    assert lists(ready, user([], allowed=["i3", "nix"]), user([], allowed=["nix"]), user([], allowed=[])) == [
        ["i3"],
        [],
        [],
    ]
    assert lists(ready, user([], blocked=["nix"])) == [ranking(dummy, [])[:3]]


def test_predicate_of_a_row_that_is_none_makes_it_bad(dummy: Recommender) -> None:
    rows = frame(
        *(
            {"user_id": f"u{n}", **user([f"i{n}"], where=where)}
            for n, where in enumerate(["true", "brnd = 'x'", None, "1 +"])
        )
    ).with_columns(user_id=pl.Series(["a", "b", "c", "d"]))
    from genrec.batch.users import Users

    source = Users.open(rows)
    survey = source.survey()
    ready = loaded(dummy, k=2)
    made = make(ready, check(ready, source, survey, 0, 4))
    assert made.index["user_id"].to_list() == ["a", "c"]
    assert made.lists["user_id"].to_list() == ["a", "a", "c", "c"]
    assert made.errors.select("row", "user_id", "column", "value").rows() == [
        (1, "b", "where", "brnd = 'x'"),
        (3, "d", "where", "1 +"),
    ]
    assert "Did you mean 'brand'?" in made.errors["reason"][0]
    with pytest.raises(DataError, match=r"Row 1 \(from 0\) column where: .*brnd.* 2 of 4 rows are bad"):
        recommend_rows(ready, rows)
    assert recommend_rows(ready, rows, on_bad_row="skip").equals(made.lists)


def test_job_whose_predicate_holds_for_nothing_is_refused(dummy: Recommender) -> None:
    with pytest.raises(ConfigError, match=r"where: \"brand = 'x'\" holds for none of 24 items\. Every list"):
        loaded(dummy, where="brand = 'x'")
    with pytest.raises(ConfigError, match="Did you mean 'brand'"):
        loaded(dummy, where="brnd = 'x'")


def test_reasons_for_short_lists(dummy: Recommender) -> None:
    from genrec.batch.users import Users

    steps = [{"step": "max_per", "column": "brand", "count": 1}]
    rows = frame(user([]), {"user_id": "bob", **user(["i1"], allowed=["i1", "i2"])}).with_columns(
        user_id=pl.Series(["ann", "bob"])
    )
    source = Users.open(rows)
    ready = loaded(dummy, k=5, steps=steps)
    made = make(ready, check(ready, source, source.survey(), 0, 2))
    assert made.index["items"].to_list() == [3, 1]
    assert made.index["reason"].to_list() == [
        "the steps leave only 3 of 24 candidates",
        "the restrictions leave only 1 items",
    ]


def test_steps_see_more_than_k_candidates_and_fill_up_is_marked(dummy: Recommender, workspace: Path) -> None:
    steps = [
        {"step": "max_per", "column": "brand", "count": 3},
        {"step": "fill_up", "baseline": "popularity"},
    ]
    ready = loaded(dummy, k=8, candidates=8, steps=steps, exclude_seen=True)
    history = ["i1", "i9"]
    found = recommend_rows(ready, frame(user(history)))
    assert found["rank"].to_list() == list(range(1, 9))
    model, filled = found.filter(source="model"), found.filter(source="fill-up")
    best = [item for item in ranking(dummy, history) if item not in history][:8]
    kept: list[str] = []
    for item in best:
        if sum(STUDIOS[other] == STUDIOS[item] for other in kept) < 3:
            kept.append(item)
    assert model["item_id"].to_list() == kept
    assert filled.height == 8 - len(kept) > 0
    assert not set(filled["item_id"]) & set(best)  # What max_per left out stays out, and its limit holds for all.
    assert max(Counter(STUDIOS[item] for item in found["item_id"]).values()) == 3
    assert found["item_id"].n_unique() == 8
    assert not set(found["item_id"]) & set(history)
    data = genrec.Dataset.load(workspace / "data" / "tiny")
    counts = dict(data.interactions["item_id"].value_counts().iter_rows())
    assert filled["score"].to_list() == [counts[item] for item in filled["item_id"]]
    assert ready.identity["data_hash"] == data.sha256
    assert loaded(dummy, k=8, steps=steps[:1]).identity["data_hash"] is None


# Today's items


def test_todays_columns_take_the_place_of_the_adapters(dummy: Recommender, tmp_path: Path) -> None:
    table = pl.DataFrame(
        {
            "item_id": [*ITEMS[4:][::-1], "new"],
            "title": [None if item == "i5" else f"new {item}" for item in ITEMS[4:][::-1]] + ["x"],
            "stock": range(21),
        }
    )
    table.write_csv(tmp_path / "items.csv")
    ready = loaded(dummy, k=24, items=str(tmp_path / "items.csv"), exclude_seen=False)
    assert (ready.retired_items, ready.unknown_items) == (4, 1)
    found = recommend_rows(ready, frame(user(["i0", "i7"])))  # A retired item in a history is no fault.
    assert found["item_id"].to_list() == [item for item in ranking(dummy, ["i0", "i7"]) if item in ITEMS[4:]]
    assert dict(found.select("item_id", "title").iter_rows()) == {
        item: "" if item == "i5" else f"new {item}" for item in ITEMS[4:]
    }
    few = loaded(dummy, k=24, items=str(tmp_path / "items.csv"), where="stock < 3 and brand = 'studio 2'")
    assert lists(few, user([])) == [[item for item in ranking(dummy, []) if item in ("i23", "i22", "i21")]]
    assert few.identity["catalogue_hash"] != loaded(dummy).identity["catalogue_hash"]
    with pytest.raises(ConfigError, match=r"holds for none of 24 items \(4 are retired\)"):
        loaded(dummy, items=str(tmp_path / "items.csv"), where="stock > 100")


def test_prompt_reads_todays_columns(dummy: Recommender, tmp_path: Path) -> None:
    from genrec.prompts import Prompt

    source = "{% block user %}x{% endblock %}{% block item %}{{ item.identifier }} {{ item.title }}{% endblock %}"
    prompts = {"titled": Prompt.parse(source, "titled")}
    titled = Recommender(dataclasses.replace(dummy.adapter, prompts=prompts), dummy.engine, dummy.tokenization)
    pl.DataFrame({"item_id": ITEMS, "title": ["other"] * 24}).write_parquet(tmp_path / "items.parquet")
    ready = loaded(titled, items=str(tmp_path / "items.parquet"))
    assert titled.prompt(["i1"]) != ready.recommender.prompt(["i1"])
    assert "other" in ready.recommender.prompt(["i1"])


def test_retired_items_keep_the_adapters_values() -> None:
    items = pl.DataFrame({"item_id": ["a", "b"], "title": ["A", "B"], "price": [1, 2], "tags": [["x"], ["y"]]})
    table = pl.DataFrame({"item_id": ["c", "b"], "price": [7.5, 2.5], "tags": ["p", "q"], "stock": [None, 3]})
    made, retired, unknown = today(items, table, "items.csv")
    assert made.to_dicts() == [
        {"item_id": "a", "title": "A", "price": 1.0, "tags": None, "stock": None},
        {"item_id": "b", "title": "B", "price": 2.5, "tags": "q", "stock": 3},
    ]
    assert (retired.tolist(), unknown) == ([True, False], 1)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"id": ["a"]}, r"items\.csv: no column 'item_id'; it has id"),
        ({"item_id": ["a", None]}, r"items\.csv: row 2 column item_id: None is empty"),
        ({"item_id": ["b", "a", "c", "a"]}, r"row 2 column item_id: 'a' stands twice"),
    ],
)
def test_bad_table_of_items_is_refused(table: dict[str, Any], message: str) -> None:
    items = pl.DataFrame({"item_id": ["a", "b"], "title": ["A", "B"]})
    with pytest.raises(DataError, match=message):
        today(items, pl.DataFrame(table), "items.csv")


def test_catalogue_hash_is_of_content() -> None:
    items = pl.DataFrame({"item_id": ["a", "b"], "title": ["A", "B"]})
    none = np.zeros(2, dtype=bool)
    known = catalogue_hash(items, none)
    assert catalogue_hash(items.select("title", "item_id"), none) == known
    for other, retired in (
        (items, ~none),
        (items.with_columns(title=pl.Series(["A", "C"])), none),
        (items.with_columns(stock=pl.Series([1, 2])), none),
        (items.rename({"title": "name"}), none),
    ):
        assert catalogue_hash(other, retired) != known


# Data frames from elsewhere


def test_recommend_rows_gives_what_a_job_writes(dummy: Recommender, tmp_path: Path) -> None:
    rows = frame(user(["i1"]), user([]), user(["i5", "i6"])).with_columns(user_id=pl.Series(["a", "b", "c"]))
    run_batch(dummy, rows, tmp_path, k=4)
    ready = loaded(dummy, k=4)
    expected = pl.read_parquet(tmp_path / "*.parquet")
    assert recommend_rows(ready, rows).equals(expected)
    assert recommend_rows(ready, rows.to_pandas()).equals(expected)
    pieces = [recommend_rows(ready, rows[start : start + 1].to_arrow()) for start in range(3)]
    assert pl.concat(pieces).equals(expected)
    assert output.verify(tmp_path).users == 3


def test_recommend_rows_checks_its_words(dummy: Recommender) -> None:
    with pytest.raises(ConfigError, match="on_bad_row is 'drop'"):
        recommend_rows(loaded(dummy), frame(user([])), on_bad_row="drop")  # type: ignore[arg-type]


def test_shard_of_bad_rows_alone(dummy: Recommender, tmp_path: Path) -> None:
    rows = frame(user(["nix"]), user([], where="1 +"), user([], where="true")).with_columns(
        user_id=pl.Series(["a", "b", "c"])
    )
    for titles in (True, False):
        done = run_batch(dummy, rows, tmp_path / str(titles), k=2, shard_size=2, max_bad_share=1.0, titles=titles)
        assert (done.users, done.rows, done.bad_rows) == (1, 2, 2)
        parts = [pl.read_parquet(path) for path in sorted((tmp_path / str(titles)).glob("*.parquet"))]
        assert [part.height for part in parts] == [0, 2]
        assert parts[0].schema == parts[1].schema
        assert output.verify(tmp_path / str(titles)).bad == 2


# Rows that are bad for their head, and predicates that take much


def told_by(recommender: Recommender, head: str, **manifest: Any) -> Recommender:
    """The same with another head of its prompt."""
    from genrec.prompts import Prompt

    source = f"{{% block user %}}{head}{{% endblock %}}{{% block item %}}{{{{ item.identifier }}}}{{% endblock %}}"
    prompt = Prompt.parse(source, str(recommender.adapter.path / "prompts" / "next_item.jinja"))
    adapter = dataclasses.replace(
        recommender.adapter, prompts={"next_item": prompt}, manifest={**recommender.adapter.manifest, **manifest}
    )
    return Recommender(adapter, recommender.engine, recommender.tokenization)


def test_a_row_without_a_head_is_a_bad_one_and_changes_no_other(dummy: Recommender, tmp_path: Path) -> None:
    about = told_by(dummy, "{{ user.about }}")
    rows = frame(user(["i1"]), user([]), user(["nix"]), user(["i5"]), user(["i3"], where="1 +"), user(["i6"], where=""))
    told = rows.with_columns(
        user_id=pl.Series(list("abcdef")), about=pl.Series(["x", "long " * 200, "x", "", "x", "y"])
    )
    found = run_batch(about, told, tmp_path / "out", k=4, max_bad_share=1.0)
    assert (found.users, found.bad_rows) == (3, 3)
    errors = pl.read_parquet(tmp_path / "out" / "errors" / "*.parquet")
    assert errors.select("row", "user_id", "column").rows() == [(1, "b", "row"), (2, "c", "history"), (4, "e", "where")]
    assert errors["reason"][0].startswith("prompt ")
    assert "max_length is 64" in errors["reason"][0]
    assert errors["value"][0].startswith('{"about": "long long')
    run_batch(about, told[[0, 3, 5]], tmp_path / "clean", k=4)
    part = "part-00000.parquet"
    assert (tmp_path / "out" / part).read_bytes() == (tmp_path / "clean" / part).read_bytes()


def test_a_list_that_a_head_would_print_makes_a_bad_row_wherever_the_adapter_lies(dummy: Recommender) -> None:
    about = told_by(dummy, "{{ user.about }}")
    rows = frame(user(["i1"])).with_columns(about=pl.Series([["x", "y"]]))
    with pytest.raises(
        DataError, match=r"Row 0 \(from 0\) column row: .*prompts/next_item\.jinja:1:\d+: .*a list cannot be printed"
    ):
        recommend_rows(loaded(about), rows)
    with pytest.raises(DataError) as error:
        recommend_rows(loaded(about), rows)
    assert str(dummy.adapter.path) not in str(error.value)


def test_a_head_that_reads_no_user_is_an_error_of_all(dummy: Recommender) -> None:
    from genrec.errors import PromptError

    with pytest.raises(PromptError, match="max_length is 64"):
        recommend_rows(loaded(told_by(dummy, "long " * 200)), frame(user(["i1"])))


@pytest.mark.parametrize("most", [1, 8, 9, 20])
def test_predicates_are_held_for_some_rows_at_a_time(
    dummy: Recommender, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    rows = [
        user([f"i{number}"], where=where, **({"allowed": ITEMS[::2]} if number % 3 else {}))
        for number, where in enumerate(
            ["brand = 'studio 0'", None, "brand = 'studio 1'", "true", "1 +", "brand = 'studio 0'", "1 +", "1 = 2"] * 2
        )
    ]
    told = frame(*({**row, "user_id": f"u{number}"} for number, row in enumerate(rows)))
    ready = loaded(dummy, k=4)
    expected = recommend_rows(ready, told, on_bad_row="skip")
    held: list[int] = []
    search = Recommender.search

    def watched(self: Recommender, *arguments: Any, only: list[Any], **keys: Any) -> Any:
        alone = {id(one): len(one) for one in only if one is not None}
        held.append(sum(alone.values()))
        return search(self, *arguments, only=only, **keys)

    monkeypatch.setattr(Recommender, "search", watched)
    monkeypatch.setattr("genrec.batch.shards.HELD", most)
    plain = told.drop("allowed")
    assert recommend_rows(ready, told, on_bad_row="skip").equals(expected)
    assert len(held) > 1
    held.clear()
    recommend_rows(ready, plain, on_bad_row="skip")
    assert max(held) <= max(most, 24)  # All items of one predicate, at least.
    assert len(held) > 1


def test_predicate_of_a_row_must_last(dummy: Recommender) -> None:
    with pytest.raises(DataError, match=r"column where: .* is another time tomorrow"):
        recommend_rows(loaded(dummy), frame(user([], where="brand = 'studio 1' or DATE '2020-01-01' > now()")))


@pytest.mark.parametrize("kind", ["polars", "pandas", "typed pandas", "nothing"])
def test_no_rows_are_no_lists(dummy: Recommender, kind: str) -> None:
    import pandas as pd

    rows: Any = {
        "polars": frame(user([])).clear(),
        "pandas": pd.DataFrame({"user_id": [], "history": []}),
        "typed pandas": frame(user([])).clear().to_pandas(),
        "nothing": pd.DataFrame(),
    }[kind]
    for titles in (True, False):
        ready = loaded(dummy, titles=titles)
        found = recommend_rows(ready, rows)
        assert found.is_empty()
        assert found.schema == recommend_rows(ready, frame(user([]))).schema


# Types as in training


DIRTY: dict[str, tuple[list[Any], Any]] = {
    "csv": (["1.50", "2.00", "3", ""], "n/a"),
    "jsonl": ([1.5, 2.0, 3, None], [1]),
    "parquet": (["1.5", "2.0", "3", None], "n/a"),
}


@pytest.mark.parametrize("name", DIRTY)
@pytest.mark.parametrize("kind", ["Float64", "Float32"])
def test_a_bad_row_changes_no_other_list(dummy: Recommender, tmp_path: Path, name: str, kind: str) -> None:
    import json

    spent = told_by(dummy, "Spent {{ user.spend }}", user_columns={"spend": kind})
    values, wrong = DIRTY[name]
    rows = [{"user_id": f"u{n}", "history": [f"i{n}"], "spend": value} for n, value in enumerate([*values, wrong])]
    reference = pl.DataFrame(rows[:4], schema_overrides={"spend": pl.String}).with_columns(
        spend=pl.Series([1.5, 2.0, 3.0, None], dtype=pl.Float64)
    )
    run_batch(spent, reference, tmp_path / "frame", k=5)
    for what, some in (("clean", rows[:4]), ("dirty", rows)):
        path = tmp_path / f"{what}.{name}"
        if name == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in some))
        elif name == "csv":
            lines = [f'{row["user_id"]},"[""{row["history"][0]}""]",{row["spend"]}' for row in some]
            path.write_text("\n".join(["user_id,history,spend", *lines]) + "\n")
        else:
            pl.DataFrame(some).write_parquet(path)
        done = run_batch(spent, path, tmp_path / what, k=5, max_bad_share=0.5)
        assert (done.users, done.bad_rows) == (4, len(some) - 4)
        for part in ("part-00000.parquet", "_index/part-00000.parquet"):
            assert (tmp_path / what / part).read_bytes() == (tmp_path / "frame" / part).read_bytes()
    errors = pl.read_parquet(tmp_path / "dirty" / "errors" / "*.parquet")
    told = json.dumps(wrong) if isinstance(wrong, list) else wrong
    assert errors.rows() == [(4, "u4", "spend", told, f"is no {kind}, as in training")]


def test_types_of_columns_that_the_head_does_not_read_decide_nothing(dummy: Recommender) -> None:
    spent = told_by(dummy, "Spent {{ user.spend }}", user_columns={"spend": "Int64", "age": "Int64"})
    rows = frame(user(["i1"])).with_columns(spend=3, age=pl.lit("old"))
    assert loaded(spent).user_columns == {"spend": pl.Int64()}
    assert recommend_rows(loaded(spent), rows).height == 20


# Context


def test_contexts_of_rows_reach_the_head_of_the_prompt(dummy: Recommender) -> None:
    text = "{% block user %}{{ context.query }}{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}"
    told = dummy.with_prompt(Prompt.parse(text, "told"), untrained=True)
    contexts = [{"query": "tea"}, {"query": "pot"}, None, {"query": "long words " * 60}]
    rows = pl.DataFrame({"user_id": ["a", "b", "c", "d"], "history": [["i1"]] * 4, "context": contexts})
    job = loaded(told, k=4)
    made = recommend_rows(job, rows.head(3))
    expected = told.recommend([["i1"]] * 3, k=4, contexts=contexts[:3])
    assert made["item_id"].to_list() == [one.item_id for list_ in expected for one in list_]
    assert expected[0] != expected[1]
    with pytest.raises(
        DataError, match=r"Row 3 \(from 0\) column row: '\{\"context\": \{\"query\": \"long words .* head takes"
    ):
        recommend_rows(job, rows)
    assert recommend_rows(job, rows, on_bad_row="skip")["item_id"].to_list() == made["item_id"].to_list()
    with pytest.raises(DataError, match=r"prompt told, 1:28: its head reads context, .* no such column\. Add one"):
        recommend_rows(job, rows.drop("context"))
    # What no prompt reads is no matter.
    assert recommend_rows(loaded(dummy, k=4), rows)["item_id"].n_unique() > 3
