from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import genrec
from genrec import files
from genrec.batch import Summary, read_users, run_batch
from genrec.errors import ConfigError, DataError, StorageError, UnknownIdError
from genrec.prompts import Prompt
from genrec.recommender import Recommender

USERS = pl.DataFrame(
    {
        "user_id": ["ann", "bob", "cleo", "007"],
        "history": [["i1", "i2"], [], ["i5"], ["i9", "i8", "i7"]],
        "age": [31, 45, None, 18],
    },
    schema_overrides={"history": pl.List(pl.String)},
)


@pytest.fixture(scope="module")
def rec(workspace: Path) -> Recommender:
    return Recommender.load(workspace / "adapters" / "lora")


@pytest.fixture(scope="module")
def dummy(workspace: Path) -> Recommender:
    return Recommender.load(workspace / "adapters" / "lora", engine="dummy")


@pytest.fixture(scope="module")
def aged(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    """A dummy engine behind an adapter whose head tells the user's age."""
    folder = tmp_path_factory.mktemp("aged") / "workspace"
    shutil.copytree(workspace, folder)
    folder = folder / "adapters" / "pretrained"
    prompt = folder / "prompts" / "next_item.jinja"
    prompt.write_text(
        "{% block user %}Age {{ user.age }}{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}"
    )
    manifest = json.loads((folder / "genrec.json").read_text())
    manifest["files"]["prompts/next_item.jinja"] = files.file_hash(prompt)
    (folder / "genrec.json").write_text(json.dumps(manifest))
    return Recommender.load(folder, engine="dummy")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def lists(folder: Path) -> dict[str, list[tuple[int, str, str, float]]]:
    """user_id -> (rank, item_id, title, score) in the order of the files."""
    found: dict[str, list[tuple[int, str, str, float]]] = {}
    for path in sorted(folder.glob("*.parquet")):
        for user, *row in pl.read_parquet(path).iter_rows():
            found.setdefault(user, []).append(tuple(row))
    return found


# What comes out


def test_lists_are_those_of_recommend(rec: Recommender, workspace: Path, tmp_path: Path) -> None:
    done = run_batch(workspace / "adapters" / "lora", workspace / "data" / "tiny", tmp_path, k=5, shard_size=16)
    data = genrec.Dataset.load(workspace / "data" / "tiny")
    histories = [[data.item_ids[item] for item in history] for history in data.histories]
    expected = rec.recommend(histories, k=5)
    found = lists(tmp_path)
    assert list(found) == data.user_ids
    for rows, items in zip(found.values(), expected, strict=True):
        assert [row[:3] for row in rows] == [(item.rank, item.item_id, item.title) for item in items]
        np.testing.assert_allclose([row[3] for row in rows], [item.score for item in items], atol=1e-5)
    assert done == Summary(str(tmp_path), users=40, rows=200, shards=3, shards_reused=0, users_with_fewer=0)


def test_shards_have_the_size_asked_for(dummy: Recommender, workspace: Path, tmp_path: Path) -> None:
    run_batch(dummy, workspace / "data" / "tiny", tmp_path, k=2, shard_size=16)
    assert sorted(contents(tmp_path)) == ["job.json", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    shards = [pl.read_parquet(path) for path in sorted(tmp_path.glob("*.parquet"))]
    assert [shard["user_id"].n_unique() for shard in shards] == [16, 16, 8]
    schema = {"user_id": pl.String, "rank": pl.Int32, "item_id": pl.String, "title": pl.String, "score": pl.Float32}
    assert all(shard.schema == schema for shard in shards)
    job = json.loads((tmp_path / "job.json").read_text())
    assert (job["adapter"], job["users"], job["k"], job["shard_size"]) == ("lora", 40, 2, 16)


def test_lists_do_not_depend_on_the_shards(rec: Recommender, workspace: Path, tmp_path: Path) -> None:
    for size in (7, 4096):
        run_batch(rec, workspace / "data" / "tiny", tmp_path / str(size), k=3, shard_size=size)
    small, whole = lists(tmp_path / "7"), lists(tmp_path / "4096")
    assert [row[:3] for rows in small.values() for row in rows] == [row[:3] for rows in whole.values() for row in rows]


def test_empty_history_is_answered(rec: Recommender, tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"user_id": ["new", "gone"], "history": [[], None]}, schema_overrides={"history": pl.List(pl.String)}
    )
    run_batch(rec, frame, tmp_path, k=4)
    head = [(item.rank, item.item_id) for item in rec.recommend([[]], k=4)[0]]
    assert {user: [row[:2] for row in rows] for user, rows in lists(tmp_path).items()} == {"new": head, "gone": head}


def test_users_with_fewer_items_are_counted(dummy: Recommender, tmp_path: Path) -> None:
    everything = dummy.item_ids
    frame = pl.DataFrame({"user_id": ["a", "b", "c"], "history": [everything, everything[3:], everything[:2]]})
    for reused in (0, 2):
        done = run_batch(dummy, frame, tmp_path, k=5, shard_size=2)
        assert done == Summary(str(tmp_path), users=3, rows=8, shards=2, shards_reused=reused, users_with_fewer=2)
    assert {user: len(rows) for user, rows in lists(tmp_path).items()} == {"b": 3, "c": 5}


def test_columns_that_the_head_reads_reach_it(aged: Recommender, tmp_path: Path) -> None:
    run_batch(aged, USERS, tmp_path, k=5)
    histories = USERS["history"].to_list()
    expected = aged.recommend(histories, k=5, users=[{"age": age} for age in USERS["age"]])
    assert [row[1] for rows in lists(tmp_path).values() for row in rows] == [
        i.item_id for items in expected for i in items
    ]
    assert expected != aged.recommend(histories, k=5)


def test_data_set_folder_brings_the_columns_of_its_users(aged: Recommender, workspace: Path, tmp_path: Path) -> None:
    run_batch(aged, workspace / "data" / "tiny", tmp_path, k=3)
    for user in ("u0", "u39"):
        history, row = aged.user_history(user, workspace / "data" / "tiny")
        assert row is not None
        expected = aged.recommend([history], k=3, users=[row])[0]
        assert [found[1] for found in lists(tmp_path)[user]] == [item.item_id for item in expected]


# Where users come from


def csv(path: Path) -> Path:
    texts = [json.dumps(history) for history in USERS["history"].to_list()]
    USERS.with_columns(history=pl.Series(texts)).write_csv(path / "users.csv")
    return path / "users.csv"


def parquet(path: Path) -> Path:
    USERS.write_parquet(path / "users.parquet")
    return path / "users.parquet"


def jsonl(path: Path) -> Path:
    (path / "users.jsonl").write_text("".join(json.dumps(row) + "\n" for row in USERS.to_dicts()))
    return path / "users.jsonl"


@pytest.mark.parametrize(
    "source",
    [csv, parquet, jsonl, lambda _: USERS.to_pandas(), lambda _: USERS.to_arrow(), lambda _: USERS.lazy()],
    ids=["csv", "parquet", "jsonl", "pandas", "arrow", "lazy"],
)
def test_every_source_gives_the_same_job(aged: Recommender, source: Callable[[Path], Any], tmp_path: Path) -> None:
    run_batch(aged, USERS, tmp_path / "polars", k=5)
    run_batch(aged, source(tmp_path), tmp_path / "other", k=5)
    assert contents(tmp_path / "other") == contents(tmp_path / "polars")


def test_ids_that_are_numbers_become_text() -> None:
    frame = read_users(pl.DataFrame({"user_id": [7], "history": [[1, 2]]}))
    assert frame.to_dicts() == [{"user_id": "7", "history": ["1", "2"]}]


# Started again


def test_second_run_makes_nothing_again(
    dummy: Recommender, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_batch(dummy, workspace / "data" / "tiny", tmp_path, k=5, shard_size=16)
    before = contents(tmp_path), [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    monkeypatch.setattr(Recommender, "search", lambda *_, **__: pytest.fail("a shard was made again"))
    again = run_batch(dummy, workspace / "data" / "tiny", tmp_path, k=5, shard_size=16)
    assert before == (contents(tmp_path), [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())])
    assert (first.shards_reused, again.shards_reused) == (0, 3)
    assert (first.rows, first.users_with_fewer) == (again.rows, again.users_with_fewer)


def test_missing_shard_is_made_again_equal(rec: Recommender, workspace: Path, tmp_path: Path) -> None:
    run_batch(rec, workspace / "data" / "tiny", tmp_path, k=5, shard_size=16)
    before = contents(tmp_path)
    (tmp_path / "part-00001.parquet").unlink()
    assert run_batch(rec, workspace / "data" / "tiny", tmp_path, k=5, shard_size=16).shards_reused == 2
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 6}, "k was 5, now 6"),
        ({"shard_size": 2}, "shard_size was 4096, now 2"),
        ({"num_beams": 9}, "num_beams was None, now 9"),
        ({"users": USERS.head(3)}, "users was 4, now 3"),
        ({"users": USERS.reverse()}, "users_hash was"),
        ({"users": USERS.with_columns(user_id=pl.Series(["a", "b", "c", "d"]))}, "users_hash was"),
        ({"users": USERS.with_columns(age=pl.col("age") + 1)}, "users_hash was"),  # The head reads it.
    ],
)
def test_folder_of_another_job_is_refused(
    aged: Recommender, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run_batch(aged, USERS, tmp_path, k=5)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"holds another job: {message}.* Name another --out, or remove the folder"):
        run_batch(aged, **{"users": USERS, "out": tmp_path, "k": 5, **change})
    assert contents(tmp_path) == before


def test_folder_of_another_adapter_or_engine_is_refused(
    dummy: Recommender, rec: Recommender, workspace: Path, tmp_path: Path
) -> None:
    run_batch(dummy, USERS, tmp_path, k=5)
    with pytest.raises(ConfigError, match="adapter was 'lora', now 'pretrained'"):
        run_batch(workspace / "adapters" / "pretrained", USERS, tmp_path, k=5, engine="dummy")
    with pytest.raises(ConfigError, match="engine was 'DummyEngine', now 'LocalEngine'"):
        run_batch(rec, USERS, tmp_path, k=5)


def test_column_that_the_head_does_not_read_makes_no_other_job(dummy: Recommender, tmp_path: Path) -> None:
    run_batch(dummy, USERS, tmp_path, k=5)
    assert (
        run_batch(dummy, USERS.with_columns(age=pl.col("age") + 1, country=pl.lit("DE")), tmp_path, k=5).shards_reused
        == 1
    )


def test_other_titles_make_another_job(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace, tmp_path / "workspace")
    adapter = tmp_path / "workspace" / "adapters" / "lora"
    run_batch(adapter, USERS, tmp_path / "out", k=5, engine="dummy")
    items = pl.read_parquet(adapter / "items.parquet")
    items.with_columns(title=pl.lit("new ") + pl.col("title")).write_parquet(adapter / "items.parquet")
    with pytest.raises(ConfigError, match=r"holds another job: \w*hash was .*, now "):
        run_batch(adapter, USERS, tmp_path / "out", k=5, engine="dummy")


@pytest.mark.parametrize("text", ["", '{"adapter": "lo', "7", "\udcff"])
def test_a_damaged_note_of_the_job_is_refused(dummy: Recommender, tmp_path: Path, text: str) -> None:
    run_batch(dummy, USERS, tmp_path, k=5)
    (tmp_path / "job.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StorageError, match=r"job\.json does not say what the job is .* Name another --out"):
        run_batch(dummy, USERS, tmp_path, k=5)


def test_foreign_folder_is_refused(dummy: Recommender, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"is not empty and holds no batch job\. Name another --out"):
        run_batch(dummy, USERS, tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


# A disk that is full


@pytest.mark.parametrize("step", ["write", "rename"])
def test_full_disk_leaves_whole_shards_and_the_next_run_goes_on(
    dummy: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    run_batch(dummy, USERS, tmp_path / "whole", k=5, shard_size=1)
    owner, name = {"write": (pl.DataFrame, "write_parquet"), "rename": (Path, "replace")}[step]
    real = getattr(owner, name)

    def refuse_third(source: Any, target: Any, *arguments: Any, **options: Any) -> Any:
        if "part-00002" in str(target):
            raise OSError(28, "No space left on device")
        return real(source, target, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse_third)
        with pytest.raises(
            StorageError, match=r"part-00002\.parquet: No space left on device.* the same command again"
        ):
            run_batch(dummy, USERS, tmp_path / "out", k=5, shard_size=1)
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "out") == {
        name: whole[name] for name in ("job.json", "part-00000.parquet", "part-00001.parquet")
    }
    assert run_batch(dummy, USERS, tmp_path / "out", k=5, shard_size=1).shards_reused == 2
    assert contents(tmp_path / "out") == whole


# Bad input


def users_file(folder: Path, text: str) -> Path:
    (folder / "users.csv").write_text(text)
    return folder / "users.csv"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,history\na,[]\n", r"users\.csv: no column 'user_id'; it has user, history\. Rename one"),
        ("user_id,past\na,[]\n", r"no column 'history'; it has user_id, past"),
        ('user_id,history\na,[]\nb,"i1,i2"\n', r"users\.csv: row 2 column history: 'i1,i2' is no JSON list"),
        ("user_id,history\na,7\n", r"column history is Int64; it takes lists of item ids"),
        ("user_id,history\na,[]\n,[]\n", r"row 2 column user_id is empty\. Give every user an id"),
        ("user_id,history\na,[]\nb,[]\na,[]\n", r"user 'a' stands in 2 rows at once\. Keep one"),
        ("user_id,history\n", "there is no user in it"),
    ],
)
def test_wrong_users_are_refused_and_nothing_is_written(
    dummy: Recommender, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run_batch(dummy, users_file(tmp_path, text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_null_in_a_history_is_refused(dummy: Recommender, tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_text('user_id,history\na,[]\nb,"[""i1"", null]"\n')
    (tmp_path / "users.jsonl").write_text(
        '{"user_id": "a", "history": null}\n{"user_id": "b", "history": ["i1", null]}\n'
    )
    frame = pl.DataFrame({"user_id": ["a", "b"], "history": [None, ["i1", None]]})
    for source in (tmp_path / "users.csv", tmp_path / "users.jsonl", frame):
        with pytest.raises(DataError, match="row 2 column history holds a null among the item ids"):
            run_batch(dummy, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_column_that_the_head_reads_must_be_there(aged: Recommender, tmp_path: Path) -> None:
    users = USERS.drop("age").with_columns(Age=pl.lit(3))
    with pytest.raises(DataError, match=r"prompt next_item, 1:\d+: the table of `user` has no column `age`.*'Age'"):
        run_batch(aged, users, tmp_path / "out", k=5)
    assert not (tmp_path / "out").exists()
    source = aged.adapter.prompt.source.replace("user.age", "user.age | default('unknown')")
    prompts = {"next_item": Prompt.parse(source, "next_item")}
    guarded = Recommender(dataclasses.replace(aged.adapter, prompts=prompts), aged.engine, aged.tokenization)
    assert run_batch(guarded, users, tmp_path / "out", k=5).users == 4


def test_unknown_item_names_the_user(dummy: Recommender, tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": ["ann", "bob"], "history": [["i1"], ["i2", "I7"]]})
    with pytest.raises(UnknownIdError, match=r"user 'bob', column history: item 'I7' .* Did you mean 'i7'\?"):
        run_batch(dummy, frame, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k is 0\. It is at least 1"),
        ({"shard_size": 0}, r"shard_size is 0\. It is at least 1"),
        ({"k": 5, "num_beams": 4}, "num_beams is 4, below k, which is 5"),
    ],
)
def test_numbers_out_of_range_are_refused_and_nothing_is_written(
    dummy: Recommender, tmp_path: Path, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_batch(dummy, USERS, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_missing_file_of_users_is_refused(dummy: Recommender, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nix\.parquet does not exist"):
        run_batch(dummy, tmp_path / "nix.parquet", tmp_path / "out")


def test_something_that_is_no_table_is_refused(dummy: Recommender, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"users is a int; it must be a Polars, pandas or Arrow table"):
        run_batch(dummy, 7, tmp_path / "out")
