from __future__ import annotations

import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec import readers
from genrec.batch import sources
from genrec.batch.users import Users
from genrec.errors import ConfigError, DataError
from genrec.tables import FAULT, VALUE

USERS = pl.DataFrame(
    {
        "user_id": ["ann", "bob", "cleo", "007", "dora"],
        "history": [["i1", "i2"], [], ["i5"], None, ["i9", "i8", "i7"]],
        "allowed": [None, ["i1"], [], None, ["i2", "nix"]],
        "where": [None, "price > 1", None, "in_stock", None],
        "age": [31, 45, None, 18, 7],
        "share": [0.5, 1.25, None, 3.0, -1.5],
        "member": [True, None, False, True, False],
        "code": ["01", "2", None, "03", "x"],
        "note": ["a,b", 'say "x"', None, "two\nlines", "né"],
    },
    schema_overrides={"history": pl.List(pl.String), "allowed": pl.List(pl.String)},
)


def as_csv(frame: pl.DataFrame) -> str:
    lists = [
        pl.Series(name, [None if one is None else json.dumps(one) for one in frame[name].to_list()], dtype=pl.String)
        for name in ("history", "allowed", "blocked")
        if name in frame.columns
    ]
    return frame.with_columns(lists).write_csv()


def as_jsonl(frame: pl.DataFrame) -> str:
    return "".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in frame.to_dicts())


def parquet(folder: Path, **options: Any) -> Path:
    USERS.write_parquet(folder / "users.parquet", **options)
    return folder / "users.parquet"


def text(name: str, content: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        data = content.encode()
        (folder / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
        return folder / name

    return write


EVERY_SOURCE = {
    "parquet": parquet,
    "parquet in row groups": lambda folder: parquet(folder, row_group_size=2),
    "csv": text("users.csv", as_csv(USERS)),
    "csv.gz": text("users.csv.gz", as_csv(USERS)),
    "jsonl": text("users.jsonl", as_jsonl(USERS)),
    "jsonl.gz": text("users.ndjson.gz", as_jsonl(USERS)),
    "pandas": lambda _: USERS.to_pandas(),
    "arrow": lambda _: USERS.to_arrow(),
    "lazy": lambda _: USERS.lazy(),
    "categorical": lambda _: USERS.with_columns(pl.col("user_id", "where", "note").cast(pl.Categorical)),
}


# Every source


@pytest.mark.parametrize("source", EVERY_SOURCE.values(), ids=EVERY_SOURCE)
def test_every_source_holds_the_same_rows(source: Callable[[Path], Any], tmp_path: Path) -> None:
    found, expected = Users.open(source(tmp_path)), Users.open(USERS)
    assert sorted(found.columns) == sorted(expected.columns)
    told = ["age", "share", "code", "note"]
    assert found.read(0, 99).select(told).equals(USERS.select(told))
    if source is not EVERY_SOURCE["pandas"]:  # Which has objects where truth values have gaps.
        assert found.survey().digest == expected.survey().digest


def test_tabs_separate_a_tsv(tmp_path: Path) -> None:
    (tmp_path / "users.tsv").write_text('user_id\thistory\tage\nann\t"[""i1"", ""i2""]"\t31\n')
    frame = Users.open(tmp_path / "users.tsv").read(0, 9).drop(FAULT, VALUE)
    assert frame.to_dicts() == [{"user_id": "ann", "history": '["i1", "i2"]', "age": 31}]


@pytest.mark.parametrize("name", ["parquet", "parquet in row groups", "csv", "csv.gz", "jsonl", "lazy"])
@given(spans=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 4)), min_size=1, max_size=6))
@settings(max_examples=25)
def test_rows_may_be_taken_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, name: str, spans: list[tuple[int, int]]
) -> None:
    users = Users.open(EVERY_SOURCE[name](tmp_path_factory.mktemp("users")))
    for start, size in spans:
        piece = users.read(start, start + size)
        assert piece["user_id"].to_list() == USERS["user_id"][start : start + size].to_list()
        assert piece["age"].to_list() == USERS["age"][start : start + size].to_list()


@pytest.mark.parametrize("group", [1, 3, 1000, 5000, 12_000])
def test_a_long_parquet_file_is_read_right(tmp_path: Path, group: int) -> None:
    frame = pl.DataFrame({"user_id": [f"u{n}" for n in range(12_000)], "history": [["i1"]] * 12_000})
    frame = frame.with_columns(number=pl.int_range(12_000)) if group > 3 else frame.head(700)
    frame.write_parquet(tmp_path / "users.parquet", row_group_size=group)
    users = Users.open(tmp_path / "users.parquet")
    assert pl.concat(piece for _, piece in users.pieces(1111)).equals(frame)
    for start, stop in ((5, 6), (300, 700), (4090, 4100), (4999, 5001), (11_999, 12_001), (8191, 12_000), (0, 4097)):
        assert users.read(start, stop).equals(frame[start:stop])


def test_data_set_folder_gives_whole_histories_and_users(workspace: Path) -> None:
    import genrec

    data = genrec.Dataset.load(workspace / "data" / "tiny")
    frame = Users.open(workspace / "data" / "tiny").read(0, 1000)
    assert frame["user_id"].to_list() == data.user_ids
    assert frame["history"].to_list() == [[data.item_ids[item] for item in one] for one in data.histories]
    assert frame["age"].to_list() == [row["age"] for row in data.user_rows or []]


@pytest.mark.parametrize("name", EVERY_SOURCE)
def test_an_open_source_can_be_sent_elsewhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = EVERY_SOURCE[name](Path("."))
    users = Users.open(source)
    first = users.read(0, 2)
    monkeypatch.chdir("/")
    again = pickle.loads(pickle.dumps(users))
    assert again.read(2, 9)["user_id"].to_list() == ["cleo", "007", "dora"]
    assert again.read(0, 2).equals(first)


def test_columns_of_readers_own_are_left_out(tmp_path: Path) -> None:
    frame = USERS.with_columns(pl.lit("no").alias(FAULT), pl.lit(1).alias("__line"))
    frame.write_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(as_jsonl(frame))
    for source in (frame, tmp_path / "a.parquet", tmp_path / "a.jsonl"):
        assert set(Users.open(source).columns) == set(USERS.columns)


# Types of text


def csv_file(folder: Path, content: str | bytes) -> Path:
    data = content if isinstance(content, bytes) else content.encode()
    (folder / "users.csv").write_bytes(data)
    return folder / "users.csv"


def jsonl_file(folder: Path, content: str | bytes) -> Path:
    data = content if isinstance(content, bytes) else content.encode()
    (folder / "users.jsonl").write_bytes(data)
    return folder / "users.jsonl"


@given(
    columns=st.lists(
        st.lists(
            st.sampled_from(["", "1", "-2", "3.5", "007", "true", "false", "x", "1e3", "9007199254740993", "12.10"]),
            min_size=7, max_size=7,
        ),
        min_size=1, max_size=4,
    )
)  # fmt: skip
@settings(max_examples=60)
def test_csv_is_typed_as_readers_type_the_whole(
    tmp_path_factory: pytest.TempPathFactory, columns: list[list[str]]
) -> None:
    header = ["user_id", "history", "brand", *(f"c{n}" for n in range(len(columns)))]
    rows = [[f"u{n}", "[]", "7", *(column[n] for column in columns)] for n in range(7)]
    file = csv_file(
        tmp_path_factory.mktemp("csv"),
        "".join(",".join(f'"{v}"' if v else "" for v in r) + "\n" for r in [header, *rows]),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", 2)
        users = Users.open(file)
    whole = readers.read_table(file)
    pieces = [users.read(start, start + 3).drop(FAULT, VALUE) for start in (0, 3, 6)]
    assert [piece.schema for piece in pieces] == [whole.schema] * 3
    assert pl.concat(pieces).equals(whole)


@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["a", "b"]),
            st.one_of(
                st.none(), st.booleans(), st.integers(-3, 3), st.just(2**70), st.just(1.5), st.just("x"),
                st.just(["y", 2]), st.just({"z": 1}),
            ),
        ),
        min_size=1, max_size=6,
    )
)  # fmt: skip
@settings(max_examples=100)
def test_jsonl_is_typed_as_readers_type_the_whole(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    content = "".join(json.dumps({"user_id": "u", "history": None, **row}) + "\n" for row in rows)
    file = jsonl_file(tmp_path_factory.mktemp("jsonl"), content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", 2)
        users = Users.open(file)
    whole = readers.read_table(file)
    pieces = [users.read(n, n + 1).drop(FAULT, VALUE) for n in range(len(rows))]
    assert pl.concat(pieces).equals(whole)


def test_ids_and_lists_of_text_stay_text(tmp_path: Path) -> None:
    frame = Users.open(csv_file(tmp_path, "user_id,history,allowed,where\n7,7,1,true\n")).read(0, 1)
    assert frame.dtypes == [pl.String] * 6
    assert frame.row(0)[:4] == ("7", "7", "1", "true")


# Types as in training

KINDS = {
    "age": pl.Int64(),
    "share": pl.Float64(),
    "member": pl.Boolean(),
    "code": pl.String(),
    "tags": pl.List(pl.String()),
}
TYPED = pl.DataFrame(
    {
        "user_id": ["a", "b", "c"],
        "history": [[], [], []],
        "age": [31, None, -7],
        "share": [2.0, 1.5, None],
        "member": [True, None, False],
        "code": ["01", "x", None],
        "tags": [["y"], [], None],
    },
    schema_overrides={"history": pl.List(pl.String), "tags": pl.List(pl.String)},
)


def lined(folder: Path, *rows: dict[str, Any]) -> Path:
    return jsonl_file(folder, "".join(json.dumps({"history": [], **row}) + "\n" for row in rows))


def comma(folder: Path, *rows: dict[str, Any]) -> Path:
    texts = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items() if v is not None} for row in rows]
    pl.DataFrame([{"history": "[]", **row} for row in texts], infer_schema_length=None).write_csv(folder / "users.csv")
    return folder / "users.csv"


@pytest.mark.parametrize("write", [lined, comma])
def test_every_format_gives_the_types_of_training(tmp_path: Path, write: Callable[..., Path]) -> None:
    users = Users.open(write(tmp_path, *TYPED.drop("history").to_dicts()), types=KINDS)
    assert users.read(0, 9).select(*KINDS).equals(TYPED.select(*KINDS))
    assert users.survey().digest == Users.open(TYPED, types=KINDS).survey().digest
    one = users.read(1, 2)
    assert one.select(*KINDS).schema == pl.Schema(KINDS)


@pytest.mark.parametrize(
    "wide", [{"age": pl.Float32}, {"age": pl.Int8}, {"share": pl.Float32}, {"code": pl.Categorical}]
)
def test_tables_are_cast_to_the_types_of_training(tmp_path: Path, wide: Any) -> None:
    TYPED.cast(wide).write_parquet(tmp_path / "users.parquet")
    for source in (TYPED.cast(wide), tmp_path / "users.parquet"):
        users = Users.open(source, types=KINDS)
        assert users.read(0, 9).select(*KINDS).equals(TYPED.select(*KINDS))
        assert users.read(9, 9).select(*KINDS).schema == pl.Schema(KINDS)
        assert users.survey().digest == Users.open(TYPED, types=KINDS).survey().digest


@pytest.mark.parametrize(
    ("column", "value", "formats", "shown"),  # As JSON, CSV or a table.
    [
        ("age", "n/a", "jct", "n/a"),
        ("age", 31.5, "jct", "31.5"),
        ("age", 2**70, "jc", str(2**70)),
        pytest.param("age", 10**400, "jc", str(10**400), id="age-huge"),
        ("age", True, "jc", "true"),
        ("age", [1], "jc", "[1]"),
        ("age", {"a": 1}, "jc", '{"a": 1}'),
        ("age", "31", "j", "31"),
        ("age", "٣", "jc", "٣"),
        ("share", "1,5", "jct", "1,5"),
        ("share", "nan", "jct", "nan"),
        pytest.param("share", 10**400, "jc", str(10**400), id="share-huge"),
        ("member", "yes", "jct", "yes"),
        ("member", 1, "jct", "1"),
        ("code", [1], "j", "[1]"),
        ("tags", "x", "jct", "x"),
        ("tags", [[{"a": 1}], "b"], "j", '[[{"a": 1}], "b"]'),
    ],
)
def test_a_value_that_is_none_of_its_type_makes_its_row_bad(
    tmp_path: Path, column: str, value: Any, formats: str, shown: str
) -> None:
    good = {"user_id": "a", column: TYPED[column].to_list()[0]}
    for name in formats:
        rows = [good, {"user_id": "b", column: value}, {**good, "user_id": "c"}]
        if name == "t":
            frame = pl.DataFrame({"user_id": ["a", "b", "c"], "history": ["[]"] * 3, column: [None, value, None]})
            source: Any = frame
        else:
            source = (lined if name == "j" else comma)(tmp_path, *rows)
        users = Users.open(source, types=KINDS)
        frame = users.read(0, 9)
        assert frame.schema[column] == KINDS[column]
        assert frame[column].is_null().to_list() == [name == "t", True, name == "t"]
        assert frame[FAULT].to_list() == [None, f"is no {KINDS[column]}, as in training", None]
        assert (frame[VALUE][1], frame[sources.COLUMN].to_list()) == (shown, [None, column, None])
        digest = users.survey().digest
        other = Users.open(lined(tmp_path, rows[0], {**rows[1], column: {"b": 2}}, rows[2]), types=KINDS)
        assert other.survey().digest != digest


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("age", 31.0, 31), ("age", -(2**63), -(2**63)), ("share", 3, 3.0), ("code", 7, "7"), ("code", True, "true"),
        ("tags", [["a"], [2, None]], ["a", "2", None]),
    ],
)  # fmt: skip
def test_a_value_that_means_the_same_fits(tmp_path: Path, column: str, value: Any, expected: Any) -> None:
    for write in (lined, comma):
        frame = Users.open(write(tmp_path, {"user_id": "a", column: value}), types=KINDS).read(0, 9)
        assert frame[column].to_list() == [expected]
        assert frame[FAULT].to_list() == [None]


def test_columns_that_no_head_reads_keep_their_way(tmp_path: Path) -> None:
    path = comma(tmp_path, {"user_id": "a", "age": 1, "more": 1.5}, {"user_id": "b", "age": 2, "more": "n/a"})
    frame = Users.open(path, types=KINDS | {"user_id": pl.Int64(), "nix": pl.Int64()}).read(0, 9)
    assert frame["more"].to_list() == ["1.5", "n/a"]
    assert frame["user_id"].to_list() == ["a", "b"]
    assert "nix" not in frame.columns


def test_a_line_that_is_no_row_beside_types(tmp_path: Path) -> None:
    path = jsonl_file(tmp_path, '{"user_id": "a", "history": [], "age": "x"}\n[1]\n{"user_id": "b", "age": 3}\n')
    frame = Users.open(path, types=KINDS).read(0, 9)
    assert frame[FAULT].to_list() == ["is no Int64, as in training", "is no JSON object", None]
    assert frame[sources.COLUMN].to_list() == ["age", None, None]


def test_a_list_as_deep_as_json_goes_is_read(tmp_path: Path) -> None:
    deep = "[" * 600 + '"x"' + "]" * 600
    path = jsonl_file(tmp_path, f'{{"user_id": "a", "history": [], "tags": {deep}, "more": {deep}}}\n')
    frame = Users.open(path, types=KINDS).read(0, 9)
    assert frame.select("tags", "more").row(0) == (["x"], ["x"])


# Rows that are none


def test_a_line_that_is_no_object_is_a_row_with_a_reason(tmp_path: Path) -> None:
    half = '{"user_id": "c", "history": [], "note": "\\ud83d"}'
    lines = [
        '{"user_id": "a", "history": []}',
        "[1]",
        "",
        "{broken",
        half,
        '{"user_id": "d", "history": ["\\ud83d\\ude00"]}',
    ]
    frame = Users.open(jsonl_file(tmp_path, "\n".join(lines) + "\n")).read(0, 9)
    assert frame["user_id"].to_list() == ["a", None, None, None, "d"]
    faults = frame[FAULT].to_list()
    assert faults[0] is faults[4] is None
    assert faults[1] == "is no JSON object"
    assert faults[2].startswith("is not JSON (")
    assert faults[3] == "holds half of a surrogate pair"
    assert frame[VALUE].to_list() == [None, "[1]", "{broken", half, None]
    assert frame["history"][4] == '["😀"]'


def test_a_row_of_csv_with_too_few_fields_is_a_row_with_a_reason(tmp_path: Path) -> None:
    frame = Users.open(csv_file(tmp_path, 'user_id,history\na,[]\nb\n\nc,"[""i1""]",1\nd,"[\n]"\n')).read(0, 9)
    assert frame["user_id"].to_list() == ["a", None, None, "d"]
    assert frame[FAULT].to_list() == [
        None, "has 1 fields where the header has 2", "has 3 fields where the header has 2", None,
    ]  # fmt: skip
    assert frame[VALUE].to_list() == [None, "b", 'c,["i1"],1', None]


@pytest.mark.parametrize(
    ("write", "content"),
    [
        (csv_file, b"user_id,history,name\na,[],x\nb,[],Andr\xe9\nc,[],y\n"),
        (jsonl_file, b'{"user_id": "a", "history": []}\n{"user_id": "Andr\xe9"}\n{"user_id": "c", "history": []}\n'),
    ],
)
def test_a_row_that_is_no_utf8_is_a_row_with_a_reason(
    write: Callable[[Path, bytes], Path], content: bytes, tmp_path: Path
) -> None:
    frame = Users.open(write(tmp_path, content)).read(0, 9)
    assert frame["user_id"].to_list() == ["a", None, "c"]
    assert frame[FAULT].to_list() == [None, "is not UTF-8 text (byte 0xe9)", None]
    assert "Andr?" in frame[VALUE][1]


@pytest.mark.parametrize("value", ["true", "[1]", '{"a": 1}', "null", "NaN"])
def test_a_user_id_that_is_no_text_or_number_is_none(tmp_path: Path, value: str) -> None:
    content = f'{{"user_id": {value}, "history": []}}\n{{"user_id": 7, "history": []}}\n'
    assert Users.open(jsonl_file(tmp_path, content)).read(0, 9)["user_id"].to_list() == [None, "7"]


# What no row of can be right


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"user": ["a"], "history": [[]]}, r"users: no column 'user_id'; it has user, history\. Rename one of them"),
        ({"user_id": ["a"], "past": [[]]}, r"no column 'history'; it has user_id, past"),
        ({"user_id": ["a"], "history": [7]}, r"column history is Int64; it takes lists of item ids"),
        ({"user_id": ["a"], "history": [[["i1"]]]}, r"column history is List\(List\(String\)\); it takes lists"),
        ({"user_id": ["a"], "history": [[]], "blocked": [1.5]}, r"column blocked is Float64; it takes lists"),
        ({"user_id": ["a"], "history": [[]], "where": [True]}, r"column where is Boolean; it takes texts, such as"),
        ({"user_id": [["a"]], "history": [[]]}, r"column user_id is List\(String\); it takes texts or numbers"),
        ({"user_id": ["a"], "history": [[]], "row": [1]}, r"a column is called 'row', as one of the output is"),
    ],
)
def test_tables_without_a_right_row_are_refused(frame: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        Users.open(pl.DataFrame(frame))
    pl.DataFrame(frame).write_parquet(tmp_path / "users.parquet")
    with pytest.raises(DataError, match=message.replace("users: ", r"users\.parquet: ")):
        Users.open(tmp_path / "users.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"a\.csv is empty: it has no header line"),
        ("a.csv", b"user,history\na,[]\n", r"no column 'user_id'; it has user, history"),
        ("a.csv", b"user_id,history,user_id\na,[],b\n", r"a\.csv:1 has the column 'user_id' twice"),
        ("a.csv", b"user_id,history,na\xefve\na,[],b\n", r"the header is not UTF-8 text \(byte 0xef\)"),
        (
            "a.csv",
            b'user_id,history\na,[]\nb,"[]\nc,[]\n',
            r"a\.csv: row 2 is not CSV \(.*quotation mark that is never",
        ),
        ("a.csv.gz", gzip.compress(b"user_id,history\n" * 99, mtime=0)[:-9], r"a\.csv\.gz cannot be read as csv: "),
        ("a.csv.gz", b"user_id,history\n", r"cannot be read as csv: Not a gzipped file"),
        ("a.jsonl", b"", r"a\.jsonl holds no JSON object\."),
        ("a.jsonl", b"[1]\n{}\n", r"a\.jsonl holds no JSON object: a line is no JSON object"),
        ("a.jsonl", b'{"user": 1}\n', r"no column 'user_id'; it has user"),
        ("a.jsonl.gz", gzip.compress(b'{"user_id": 1}\n' * 99, mtime=0)[:40], r"cannot be read as jsonl: "),
        ("a.parquet", b"PAR1 no", r"a\.parquet cannot be read as parquet: "),
    ],
)
def test_files_that_are_none_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        Users.open(tmp_path / name)


def test_a_damaged_page_of_parquet_is_told_when_it_is_read(tmp_path: Path) -> None:
    ids = [f"user {number * 7919 % 10007}" for number in range(5000)]
    pl.DataFrame({"user_id": ids, "history": [["i1"]] * 5000}).write_parquet(tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:2000] = bytes(1996)
    (tmp_path / "a.parquet").write_bytes(content)
    users = Users.open(tmp_path / "a.parquet")
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet: "):
            users.survey()


def test_missing_files_and_unknown_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "users.parquet").touch()
    (tmp_path / "users.xlsx").touch()
    with pytest.raises(ConfigError, match=r"user\.parquet does not exist\. Did you mean 'users\.parquet'\?"):
        Users.open(tmp_path / "user.parquet")
    with pytest.raises(ConfigError, match=r"users\.xlsx: its name does not tell the format"):
        Users.open(str(tmp_path / "users.xlsx"))
    with pytest.raises(DataError, match=r"users is a int; it must be a Polars, pandas or Arrow table"):
        Users.open(7)


@pytest.mark.parametrize("name", ["parquet", "csv", "jsonl"])
def test_a_file_that_changes_under_the_job_is_refused(name: str, tmp_path: Path) -> None:
    path = EVERY_SOURCE[name](tmp_path)
    users = Users.open(path)
    assert len(users.read(0, 2)) == 2
    os.utime(path, ns=(0, 0))
    with pytest.raises(DataError, match=r"users\.\w+ has changed while it was read\. Run the same command again"):
        users.read(2, 4)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot be read: No such file"):
        users.read(2, 4)
