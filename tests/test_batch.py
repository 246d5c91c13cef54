from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import genrec
from genrec import progress
from genrec.batch import Summary, estimate, job_of, load, output, report, run, run_batch
from genrec.config import Thresholds, VllmOptions
from genrec.errors import ConfigError, DataError, GateError, StorageError
from genrec.prompts import Prompt
from genrec.recommender import Recommender

HISTORY = {"history": pl.List(pl.String)}
USERS = pl.DataFrame(
    {
        "user_id": ["ann", "bob", "cleo", "007"],
        "history": [["i1", "i2"], [], ["i5"], ["i9", "i8", "i7"]],
        "age": [31, 45, None, 18],
    },
    schema_overrides=HISTORY,
)


@pytest.fixture(scope="module")
def rec(workspace: Path) -> Recommender:
    return Recommender.load(workspace / "adapters" / "lora")


@pytest.fixture(scope="module")
def dummy(workspace: Path) -> Recommender:
    return Recommender.load(workspace / "adapters" / "lora", engine="dummy")


@pytest.fixture(scope="module")
def aged(workspace: Path) -> Recommender:
    """A dummy engine behind an adapter whose head tells the user's age."""
    text = "{% block user %}Age {{ user.age }}{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}"
    rec = Recommender.load(workspace / "adapters" / "pretrained", engine="dummy")
    return rec.with_prompt(Prompt.parse(text, "next_item"), untrained=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock's, by its name relative to the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".parquet")}


def lists(folder: Path) -> dict[str, list[tuple[int, str, str, float]]]:
    """user_id -> (rank, item_id, title, score) in the order of the files."""
    found: dict[str, list[tuple[int, str, str, float]]] = {}
    for path in sorted(folder.glob("*.parquet")):
        for user, *row, source in pl.read_parquet(path).iter_rows():
            assert source == "model"
            found.setdefault(user, []).append(tuple(row))
    return found


def bad_rows(folder: Path) -> list[tuple[int, str, str]]:
    """(row, column, reason) of all bad rows."""
    paths = sorted((folder / "errors").glob("*.parquet"))
    return [row for path in paths for row in pl.read_parquet(path, columns=["row", "column", "reason"]).iter_rows()]


def items(history: list[str] | None = None, **columns: Any) -> pl.DataFrame:
    """A frame of one user."""
    return pl.DataFrame({"user_id": ["ann"], "history": [history or []], **columns}, schema_overrides=HISTORY)


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
    assert done == Summary(
        str(tmp_path), users=40, rows=200, shards=3, shards_reused=0, users_with_fewer=0, digest=output.digest(tmp_path)
    )
    assert output.verify(tmp_path).digest == done.digest


def test_shards_have_the_size_asked_for(dummy: Recommender, workspace: Path, tmp_path: Path) -> None:
    run_batch(dummy, workspace / "data" / "tiny", tmp_path, k=2, shard_size=16)
    parts = ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    expected = [*parts, *(f"_index/{part}" for part in parts), "_SUCCESS", "job.json", "manifest.jsonl"]
    assert sorted(contents(tmp_path)) == sorted(expected)
    found = [pl.read_parquet(tmp_path / part) for part in parts]
    assert [shard["user_id"].n_unique() for shard in found] == [16, 16, 8]
    schema = {
        "user_id": pl.String, "rank": pl.Int32, "item_id": pl.String, "title": pl.String, "score": pl.Float32,
        "source": pl.String,
    }  # fmt: skip
    assert all(shard.schema == schema for shard in found)
    index = pl.concat(pl.read_parquet(tmp_path / "_index" / part) for part in parts)
    assert index["row"].to_list() == list(range(40))
    assert index["items"].to_list() == [2] * 40
    job = json.loads((tmp_path / "job.json").read_text())
    assert (job["adapter"], job["rows"], job["k"], job["shard_size"]) == ("lora", 40, 2, 16)
    told = pl.read_parquet_metadata(tmp_path / parts[1])
    for name in ("adapter_hash", "identifiers_hash", "prompt_hash", "catalogue_hash"):
        assert told[name] == job[name]


def test_titles_can_be_left_out(dummy: Recommender, tmp_path: Path) -> None:
    run_batch(dummy, USERS, tmp_path, k=2, titles=False)
    assert pl.read_parquet(tmp_path / "*.parquet").columns == ["user_id", "rank", "item_id", "score", "source"]


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
        assert (done.users, done.rows, done.shards, done.shards_reused) == (3, 8, 2, reused)
        assert done.users_with_fewer == 2
    assert {user: len(rows) for user, rows in lists(tmp_path).items()} == {"b": 3, "c": 5}
    index = pl.read_parquet(tmp_path / "_index" / "*.parquet")
    assert index["reason"].to_list() == [
        "no item is allowed: the restrictions leave nothing of the catalogue",
        "the restrictions leave only 3 items",
        None,
    ]


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
    assert shards(tmp_path / "other") == shards(tmp_path / "polars")


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
    before, digest = shards(tmp_path), output.digest(tmp_path)
    (tmp_path / "part-00001.parquet").unlink()
    with pytest.raises(StorageError, match=r"part-00001\.parquet is missing, though the output was finished"):
        run_batch(rec, workspace / "data" / "tiny", tmp_path, k=5, shard_size=16)
    (tmp_path / "_SUCCESS").unlink()
    assert run_batch(rec, workspace / "data" / "tiny", tmp_path, k=5, shard_size=16).shards_reused == 2
    assert (shards(tmp_path), output.verify(tmp_path).digest) == (before, digest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 6}, "k was 5, now 6"),
        ({"candidates": 9}, "candidates was 5, now 9"),
        ({"shard_size": 2}, "shard_size was 4096, now 2"),
        ({"num_beams": 9}, "num_beams was 50, now 9"),
        ({"exclude_seen": False}, "exclude_seen was True, now False"),
        ({"where": "brand = 'studio 1'"}, r"where was None, now \"brand = 'studio 1'\""),
        ({"titles": False}, "titles was True, now False"),
        ({"max_events": 7}, "max_events was 100000, now 7"),
        ({"steps": [{"step": "min_score", "score": -9.0}]}, r"steps was \[\], now \[\{'step': 'min_score'"),
        ({"users": USERS.head(3)}, "input was .* rows was 4, now 3"),
        ({"users": USERS.reverse()}, "input was"),
        ({"users": USERS.with_columns(user_id=pl.Series(["a", "b", "c", "d"]))}, "input was"),
        ({"users": USERS.with_columns(age=pl.col("age") + 1)}, "input was"),
    ],
)
def test_folder_of_another_job_is_refused(
    aged: Recommender, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run_batch(aged, USERS, tmp_path, k=5)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"holds another job: .*{message}.* Name another --out"):
        run_batch(**{"adapter": aged, "users": USERS, "out": tmp_path, "k": 5, **change})
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [{"max_bad_share": 1.0}, {"thresholds": Thresholds(max_churn=0.5)}, {"device": "meta"}, {"price_per_hour": 3.0}],
    ids=str,
)
def test_what_decides_no_list_makes_no_other_job(dummy: Recommender, tmp_path: Path, change: dict[str, Any]) -> None:
    run_batch(dummy, USERS, tmp_path, k=5)
    assert run_batch(dummy, USERS, tmp_path, k=5, **change).shards_reused == 1


def test_folder_of_another_adapter_or_engine_is_refused(
    dummy: Recommender, rec: Recommender, workspace: Path, tmp_path: Path
) -> None:
    run_batch(dummy, USERS, tmp_path, k=5)
    with pytest.raises(ConfigError, match="adapter was 'lora', now 'pretrained'; adapter_hash was"):
        run_batch(workspace / "adapters" / "pretrained", USERS, tmp_path, k=5, engine="dummy")
    with pytest.raises(ConfigError, match="engine was 'dummy', now 'local'; dtype was None, now 'float32'"):
        run_batch(rec, USERS, tmp_path, k=5)
    with pytest.raises(ConfigError, match="engine was 'dummy', now 'local'; dtype was None, now 'float32'"):
        run_batch(workspace / "adapters" / "lora", USERS, tmp_path, k=5)


def test_a_predicate_that_holds_for_others_today_makes_another_job(
    dummy: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = "DATE '2020-01-01' < current_date"
    run_batch(dummy, USERS, tmp_path / "out", k=5, where=where)
    assert run_batch(dummy, USERS, tmp_path / "out", k=5, where=where).shards_reused == 1
    fewer = np.arange(len(dummy.item_ids)) > 3
    monkeypatch.setattr("genrec.restrictions.predicate", lambda *_, **__: fewer)
    with pytest.raises(ConfigError, match=r"holds another job: allowed was '.*', now '"):
        run_batch(dummy, USERS, tmp_path / "out", k=5, where=where)


def test_another_kind_of_device_is_another_job(workspace: Path, rec: Recommender, dummy: Recommender) -> None:
    keys = {"adapter": workspace / "adapters" / "lora", "users": "users", "out": "out"}
    found = [
        load(job_of({**keys, "device": device, "engine": engine}), model=False).identity["device"]
        for device, engine in (("cpu", "local"), ("cuda:1", "local"), ("cuda", "local"), ("cuda", "dummy"))
    ]
    assert found == ["cpu", "cuda", "cuda", None]
    assert [load(job_of(keys), one).identity["device"] for one in (rec, dummy)] == ["cpu", None]


def test_vllm_is_told_by_its_version_and_quantization(inside: Path, vllm: list[Any]) -> None:
    keys = {"adapter": inside / "adapters" / "lora", "users": "users", "out": "out"}
    given: dict[str, Any] = {"quantization": "fp8", "max_num_seqs": 3}
    told = load(job_of({**keys, "engine": "vllm", "dtype": "bfloat16", "vllm": given}), model=False).identity
    wanted = {"version": "0.32.0", "quantization": "fp8"}
    assert (told["engine"], told["dtype"], told["device"], told["vllm"]) == ("vllm", "bfloat16", None, wanted)
    rec = Recommender.load(keys["adapter"], engine="vllm", dtype="bfloat16", vllm=VllmOptions(**given))
    assert load(job_of(keys), rec).identity == told
    assert "vllm" not in load(job_of(keys), model=False).identity


def test_vllm_may_be_given_other_options_when_a_job_goes_on(
    inside: Path, tmp_path: Path, vllm: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"users": USERS, "out": tmp_path / "out", "k": 5, "engine": "vllm"}
    path = inside / "adapters" / "lora"
    run_batch(path, **keys, vllm={"max_num_seqs": 64})
    assert run_batch(path, **keys, vllm={"max_num_seqs": 8, "timeout": 9}).shards_reused == 1
    with pytest.raises(ConfigError, match=r"holds another job: vllm was \{.*None\}, now \{.*'fp8'\}"):
        run_batch(path, **keys, vllm={"quantization": "fp8"})
    monkeypatch.setattr("genrec.engines.vllm.version", lambda: "0.32.1")
    with pytest.raises(ConfigError, match=r"vllm was \{'version': '0\.32\.0'"):
        run_batch(path, **keys)


def test_another_version_is_refused(dummy: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_batch(dummy, USERS, tmp_path, k=5)
    for version, major in (("0.2.0", "0.2"), ("1.1.0", "1")):
        monkeypatch.setattr("genrec.batch.shards.VERSION", version)
        with pytest.raises(ConfigError, match=f"genrec was '0.1', now '{major}'"):
            run_batch(dummy, USERS, tmp_path, k=5)
    monkeypatch.setattr("genrec.batch.shards.VERSION", "0.1.7")
    assert run_batch(dummy, USERS, tmp_path, k=5).shards_reused == 1


def test_other_identifiers_or_another_prompt_are_refused(dummy: Recommender, tmp_path: Path) -> None:
    run_batch(dummy, USERS, tmp_path, k=5)
    manifest = {**dummy.adapter.manifest, "identifiers": {"scheme": "atomic", "hash": "other"}}
    source = dummy.adapter.prompt.source + "{# more #}"
    prompts = {"next_item": Prompt.parse(source, "next_item")}
    for change, message in (
        ({"manifest": manifest}, "identifiers_hash was .*, now 'other'"),
        ({"prompts": prompts}, "prompt_hash was"),
    ):
        other = Recommender(dataclasses.replace(dummy.adapter, **change), dummy.engine, dummy.tokenization)
        with pytest.raises(ConfigError, match=message):
            run_batch(other, USERS, tmp_path, k=5)


def test_other_titles_make_another_job(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace, tmp_path / "workspace")
    adapter = tmp_path / "workspace" / "adapters" / "lora"
    run_batch(adapter, USERS, tmp_path / "out", k=5, engine="dummy")
    items = pl.read_parquet(adapter / "items.parquet")
    items.with_columns(title=pl.lit("new ") + pl.col("title")).write_parquet(adapter / "items.parquet")
    with pytest.raises(ConfigError, match=r"holds another job: catalogue_hash was .*, now "):
        run_batch(adapter, USERS, tmp_path / "out", k=5, engine="dummy")


@pytest.mark.parametrize("text", ["", '{"adapter": "lo', "7", "\udcff"])
def test_a_damaged_note_of_the_job_is_refused(dummy: Recommender, tmp_path: Path, text: str) -> None:
    run_batch(dummy, USERS, tmp_path, k=5)
    (tmp_path / "job.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StorageError, match=r"job\.json does not say what the job is .* Name another --out"):
        run_batch(dummy, USERS, tmp_path, k=5)


def test_foreign_folder_is_refused(dummy: Recommender, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"is not empty \(thesis\.txt\) and holds no batch job\. Name another --out"):
        run_batch(dummy, USERS, tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


# Bad input


def users_file(folder: Path, text: str) -> Path:
    (folder / "users.csv").write_text(text)
    return folder / "users.csv"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,history\na,[]\n", r"users\.csv: no column 'user_id'; it has user, history\. Rename one"),
        ("user_id,past\na,[]\n", r"no column 'history'; it has user_id, past"),
        ("user_id,history\n", "there is no user in it"),
    ],
)
def test_wrong_users_are_refused_and_nothing_is_written(
    dummy: Recommender, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run_batch(dummy, users_file(tmp_path, text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_set_apart_and_change_nothing_for_the_others(dummy: Recommender, tmp_path: Path) -> None:
    clean = USERS.select("user_id", "history")
    run_batch(dummy, clean, tmp_path / "clean", k=5)
    more = pl.DataFrame(
        {
            "user_id": ["ann", None, "dan", "eve", "flo"],
            "history": [["i3"], ["i1"], ["i1", "I7"], ["i1", None], ["i1"] * 6],
        }
    )
    mixed = pl.concat([clean[:2], more[1:4], clean[2:], more[4:], more[:1]])
    done = run_batch(dummy, mixed, tmp_path / "out", k=5, max_bad_share=0.6, max_events=5, shard_size=3)
    assert lists(tmp_path / "out") == lists(tmp_path / "clean")
    assert (done.users, done.bad_rows, done.rows) == (4, 5, 20)
    found = bad_rows(tmp_path / "out")
    assert [row[:2] for row in found] == [
        (2, "user_id"), (3, "history"), (4, "history"), (7, "history"), (8, "user_id"),
    ]  # fmt: skip
    for (_, _, reason), part in zip(
        found, ["is empty", "item 'I7' is not in the catalogue", "null", "6 events", "earlier row"], strict=True
    ):
        assert part in reason
    index = pl.read_parquet(tmp_path / "out" / "_index" / "*.parquet")
    assert index.select("row", "user_id").rows() == [(0, "ann"), (1, "bob"), (5, "cleo"), (6, "007")]


def test_too_many_bad_rows_stop_the_job_and_another_limit_goes_on(dummy: Recommender, tmp_path: Path) -> None:
    good = [["i1"], ["i2"], ["i3"], ["nix"], ["nix"], ["i4"]]
    frame = pl.DataFrame({"user_id": list("abcdef"), "history": good})
    share = r"2 of 6 rows of users are bad, more than max_bad_share allows \(20\.00%\)"
    message = share + r".*errors.*Row 3 \(from 0\) column history"
    for made in (5, 5):
        with pytest.raises(DataError, match=message):
            run_batch(dummy, frame, tmp_path, k=2, shard_size=1, max_bad_share=0.2)
        assert len(list(tmp_path.glob("part-*.parquet"))) == made
    with pytest.raises(StorageError, match="not finished"):
        output.verify(tmp_path)
    done = run_batch(dummy, frame, tmp_path, k=2, shard_size=1, max_bad_share=0.4)
    assert (done.users, done.bad_rows, done.shards_reused) == (4, 2, 5)


def test_column_that_the_head_reads_must_be_there(aged: Recommender, tmp_path: Path) -> None:
    users = USERS.drop("age").with_columns(Age=pl.lit(3))
    with pytest.raises(DataError, match=r"prompt next_item, 1:\d+: the table of `user` has no column `age`.*'Age'"):
        run_batch(aged, users, tmp_path / "out", k=5)
    assert not (tmp_path / "out").exists()
    source = aged.adapter.prompt.source.replace("user.age", "user.age | default('unknown')")
    prompts = {"next_item": Prompt.parse(source, "next_item")}
    guarded = Recommender(dataclasses.replace(aged.adapter, prompts=prompts), aged.engine, aged.tokenization)
    assert run_batch(guarded, users, tmp_path / "out", k=5).users == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k is 0\. It is at least 1"),
        ({"shard_size": 0}, r"shard_size is 0\. It is at least 1"),
        ({"k": 5, "num_beams": 4}, "num_beams is 4, below k, which is 5"),
        ({"k": 5, "candidates": 4}, "candidates is 4, below k, which is 5"),
        ({"candidates": 60, "num_beams": 50}, "num_beams is 50, below candidates, which is 60"),
        ({"max_bad_share": 1.5}, r"max_bad_share is 1\.5"),
        ({"workers": 2}, "workers is 2"),
        ({"thresholds": {"max_churn": 2.0}}, r"max_churn is 2\.0\. It is a share"),
        ({"shardsize": 3}, "unknown key 'shardsize'. Did you mean 'shard_size'"),
        ({"steps": [{"step": "max_par"}]}, "max_par"),
    ],
)
def test_numbers_out_of_range_are_refused_and_nothing_is_written(
    dummy: Recommender, tmp_path: Path, options: dict[str, Any], message: str
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


# From one day to the next


def test_previous_carries_over_who_is_unchanged(dummy: Recommender, tmp_path: Path) -> None:
    names = [f"u{number}" for number in range(30)]
    histories = [[f"i{(number + step) % 24}" for step in range(number % 4)] for number in range(30)]
    yesterday = pl.DataFrame({"user_id": names, "history": histories}, schema_overrides=HISTORY)
    run_batch(dummy, yesterday, tmp_path / "1", k=3, shard_size=7)
    changed = yesterday.with_columns(
        history=pl.when(pl.col("user_id").is_in(["u3", "u20"])).then(pl.lit(["i9"])).otherwise(pl.col("history"))
    )
    today = pl.concat([items(["i2"]), changed.reverse()[:25]])
    done = run_batch(dummy, today, tmp_path / "2", k=3, shard_size=7, previous=tmp_path / "1")
    full = run_batch(dummy, today, tmp_path / "3", k=3, shard_size=7)
    assert (done.carried, done.users, full.carried) == (24, 26, 0)
    assert shards(tmp_path / "2") == shards(tmp_path / "3")
    again = run_batch(dummy, today, tmp_path / "2", k=3, shard_size=7, previous=tmp_path / "1")
    assert (again.shards_reused, again.carried) == (4, 24)
    with pytest.raises(ConfigError, match=r"previous was '.*', now None"):
        run_batch(dummy, today, tmp_path / "2", k=3, shard_size=7)


def test_carried_users_are_not_asked_for(dummy: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_batch(dummy, USERS, tmp_path / "1", k=3)
    asked = []
    search = Recommender.search
    monkeypatch.setattr(
        Recommender, "search", lambda self, cases, *a, **b: asked.extend(cases) or search(self, cases, *a, **b)
    )
    run_batch(
        dummy,
        pl.concat([USERS, items(["i3"], age=[3]).with_columns(user_id=pl.lit("new"))]),
        tmp_path / "2",
        k=3,
        previous=tmp_path / "1",
    )
    assert [case.tolist() for case in asked] == [[3]]


def test_previous_of_another_job_is_refused(dummy: Recommender, tmp_path: Path) -> None:
    run_batch(dummy, USERS, tmp_path / "1", k=3)
    with pytest.raises(ConfigError, match="is the output of another job: k was 3, now 4; candidates was 3, now 4"):
        run_batch(dummy, USERS, tmp_path / "2", k=4, previous=tmp_path / "1")
    assert not (tmp_path / "2").exists()


def test_gate_refuses_what_is_too_far_from_yesterday(dummy: Recommender, tmp_path: Path) -> None:
    run_batch(dummy, USERS, tmp_path / "1", k=3)
    same = run_batch(dummy, USERS, tmp_path / "2", k=3, compare=tmp_path / "1", thresholds={"max_churn": 0.0})
    assert same.churn is not None
    assert (same.churn.churn, same.churn.users_both, same.problems) == (0.0, 4, ())
    other = USERS.with_columns(history=pl.Series([["i9"]] * 4))
    keys = {"k": 3, "compare": tmp_path / "1", "thresholds": Thresholds(max_churn=0.1, min_coverage=500)}
    message = r"2b is whole, and not to be published.*\n- churn is .*above max_churn, .*\n- coverage is .*below"
    for _ in range(2):  # Made, then found complete.
        with pytest.raises(GateError, match=message):
            run_batch(dummy, other, tmp_path / "2b", **keys)
        assert output.verify(tmp_path / "2b").users == 4


def test_cold_items_are_those_without_an_event(dummy: Recommender, tmp_path: Path) -> None:
    log = pl.DataFrame({"user_id": ["a", "b"], "item_id": ["i1", "i2"], "timestamp": [1, 2]})
    genrec.Dataset.from_frames(log).save(tmp_path / "data")
    run_batch(dummy, items(), tmp_path / "1", k=24)
    keys = {"k": 24, "compare": tmp_path / "1", "data": tmp_path / "data"}
    done = run_batch(dummy, items(), tmp_path / "2", **keys)
    assert done.churn is not None
    assert done.churn.cold_today == pytest.approx(22 / 24)
    with pytest.raises(GateError, match="cold"):
        run_batch(dummy, items(), tmp_path / "2", **keys, thresholds={"max_cold": 0.5})


# What it will take


def test_an_output_to_compare_with_is_looked_at_before_the_job(workspace: Path, tmp_path: Path) -> None:
    data = workspace / "data" / "tiny"
    with pytest.raises(StorageError, match=r"yesterday holds no batch job"):
        run_batch(
            workspace / "adapters" / "lora", data, tmp_path / "out", engine="dummy", compare=tmp_path / "yesterday"
        )
    assert not (tmp_path / "out").exists()


def test_thresholds_that_nothing_is_compared_with_are_told(workspace: Path, tmp_path: Path) -> None:
    keys = {"adapter": workspace / "adapters" / "lora", "users": workspace / "data" / "tiny", "out": tmp_path / "out"}
    job = job_of(
        {**keys, "engine": "dummy", "k": 3, "thresholds": Thresholds(max_churn=0.5), "vllm": VllmOptions(timeout=9)}
    )
    assert job.vllm == VllmOptions(timeout=9)
    assert "the thresholds were not checked: there is no --compare" in report(run(job), job)


def test_estimate_times_a_sample_and_writes_nothing(workspace: Path, tmp_path: Path) -> None:
    rows = 1000
    pl.DataFrame(
        {
            "user_id": [str(row) for row in range(rows)],
            "history": [["nix" if row == 999 else "i1"] for row in range(rows)],
        }
    ).write_parquet(tmp_path / "users.parquet")
    keys = {"adapter": workspace / "adapters" / "lora", "users": tmp_path / "users.parquet", "out": tmp_path / "out"}
    found = estimate(job_of({**keys, "engine": "dummy", "price_per_hour": 3.0}))
    assert (found.rows, found.sample, found.bad_rows) == (1000, 512, 1)  # The last row is in it.
    assert found.hours == pytest.approx(rows / found.users_per_second / 3600)
    assert found.hours_per_million == pytest.approx(1000 * found.hours)
    assert found.cost == pytest.approx(3 * found.hours)
    assert found.cost_per_million == pytest.approx(3 * found.hours_per_million)
    assert not (tmp_path / "out").exists()
    USERS.write_parquet(tmp_path / "users.parquet")
    few = estimate(job_of({**keys, "engine": "dummy"}))
    assert (few.rows, few.sample, few.cost, few.cost_per_million) == (4, 4, None, None)


# Loading what is needed, when it is


def test_model_is_loaded_only_where_a_shard_is_missing(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = workspace / "adapters" / "lora"
    done = run_batch(adapter, USERS, tmp_path, k=3)
    monkeypatch.setattr("genrec.recommender.model_engine", lambda *_: pytest.fail("the model was loaded"))
    assert run_batch(adapter, USERS, tmp_path, k=3).digest == done.digest
    with pytest.raises(ConfigError, match="k was 3, now 4"):
        run_batch(adapter, USERS, tmp_path, k=4)


def test_folder_in_use_is_refused_before_anything_is_read(dummy: Recommender, tmp_path: Path) -> None:
    with (
        output.open_output(tmp_path / "out", {}, 1),
        pytest.raises(StorageError, match="is being written by process"),
    ):
        run_batch(dummy, tmp_path / "nix.parquet", tmp_path / "out")


def test_progress_tells_speed_and_bad_rows(dummy: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, str]] = []

    @contextmanager
    def bar(description: str, total: float) -> Iterator[Callable[..., None]]:
        told.append((total, description))
        yield lambda steps=1, note="": told.append((steps, note))

    monkeypatch.setattr(progress, "bar", bar)
    frame = pl.concat([USERS.select("user_id", "history"), items(["nix"]).with_columns(user_id=pl.lit("x"))])
    run_batch(dummy, frame, tmp_path, k=3, shard_size=2, max_bad_share=0.5)
    assert told[0] == (5, "recommending")
    assert [steps for steps, _ in told[1:4]] == [2, 2, 1]
    assert all(re.fullmatch(r"[\d,]+ users/s, 0 bad rows", note) for _, note in told[1:3])
    assert told[3][1].endswith("users/s, 1 bad rows")
    assert told[4:] == [(3, "verifying"), *[(1, "")] * 3]
