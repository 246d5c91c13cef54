from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from conftest import Done, Run, rows

import genrec

LOG = """customer,sku,when,kind
c1,a,2026-03-01,view
c1,b,2026-03-02,purchase
c2,a,2026-03-01,purchase
c2,b,2026-03-02,return
c2,c,2026-03-03,purchase
"""
CATALOGUE = "sku,name,brand\na,Tea 茶,Leaf\nb,Pot,\nc,Cup,Clay\nd,Tray,Clay\n"
MAPPED = ("--column", "user_id=customer", "--column", "item_id=sku", "--column", "timestamp=when", "--column",
          "event=kind", "--item-column", "item_id=sku", "--item-column", "title=name")  # fmt: skip


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("log.csv").write_text(LOG)
    Path("items.csv").write_text(CATALOGUE)
    return tmp_path


def test_data_import_with_mappings_and_events(run: Run, shop: Path) -> None:
    events = ("--event", "purchase", "--event", "view=0.5")
    done = run("data", "import", "log.csv", "items.csv", "--out", "data/shop", *MAPPED, *events, "--json")
    assert (done.code, done.err) == (0, "")
    assert (done.json["users"], done.json["items"], done.json["interactions"]) == (2, 4, 4)
    data = genrec.Dataset.load("data/shop")
    assert data.manifest["name"] == "shop"
    assert data.manifest["positives"]["events"] == {"purchase": 1.0, "view": 0.5}
    assert data.interactions.select("user_id", "item_id", "weight").rows() == [
        ("c1", "a", 0.5), ("c1", "b", 1.0), ("c2", "a", 1.0), ("c2", "c", 1.0)
    ]  # fmt: skip
    assert data.items["title"].to_list() == ["Tea 茶", "Pot", "Cup", "Tray"]
    assert run("data", "inspect", "data/shop", "--json").json == done.json


def test_events_without_weights_are_what_python_makes_of_them(run: Run, shop: Path) -> None:
    Path("log.csv").write_text(LOG + "c9\n")
    options = (*MAPPED, "--event", "purchase", "--on-bad-row", "skip")
    done = run("data", "import", "log.csv", "items.csv", "--out", "data/shop", *options, "--json")
    assert done.err == "bad rows: data/shop/bad_rows.csv\n"
    data = genrec.Dataset.load("data/shop")
    assert "weight" not in data.interactions.columns
    assert set(data.interactions["event"]) == {"purchase"}
    assert (data.interactions.height, done.json["dropped"]) == (3, {"events": 2})


def test_data_import_of_files_with_other_names(run: Run, shop: Path) -> None:
    Path("log.csv").rename("clicks.csv")
    Path("items.csv").rename("catalogue.csv")
    done = run(
        "data", "import", "--interactions", "clicks.csv", "--items", "catalogue.csv", "--out", "data/shop", *MAPPED
    )
    assert (done.code, done.err) == (0, "")
    assert genrec.Dataset.load("data/shop").items.height == 4


def test_data_import_keeps_the_columns_that_prompts_read_of_a_choice(run: Run, shop: Path) -> None:
    lines = LOG.splitlines()
    Path("log.csv").write_text("\n".join([f"{lines[0]},query,page", *(f"{line},find tea,2" for line in lines[1:])]))
    command = ("data", "import", "log.csv", "items.csv", "--out", "data/shop", *MAPPED)
    assert run(*command, "--context", "query").code == 0
    data = genrec.Dataset.load("data/shop")
    assert data.context_columns == ["query"]
    assert data.interactions["query"].to_list() == ["find tea"] * 5
    done = run(*command, "--context", "querry", "--overwrite")
    assert done.code == 4
    assert "log.csv has no column 'querry' for context. Did you mean 'query'?" in done.err


def test_data_import_stops_at_a_bad_row_or_skips_it(run: Run, shop: Path) -> None:
    Path("log.csv").write_text(LOG + "c3,zzz,2026-03-04,view\n,a,2026-03-04,view\nc3,a,soon,view\n")
    command = ("data", "import", "log.csv", "items.csv", "--out", "data/shop", *MAPPED)
    done = run(*command)
    assert (done.code, done.out) == (4, "")
    assert "log.csv:7 item_id 'zzz' is not in the items" in done.err
    assert "log.csv:9 timestamp 'soon'" in done.err
    assert "--on-bad-row skip" in done.err
    assert not Path("data/shop").exists()
    skipped = run(*command, "--on-bad-row", "skip")
    assert skipped.code == 0
    assert ["bad rows", "3"] in rows(skipped.out)
    saved = pl.read_csv("data/shop/bad_rows.csv")
    assert saved["line"].to_list() == [7, 8, 9]
    assert run("data", "inspect", "data/shop").out == skipped.out


def test_data_import_options(run: Run, shop: Path) -> None:
    Path("log.csv").write_text("user_id,item_id,rating\nu,a,5\nu,b,4\nu,c,1\nv,a,5\nv,b,4\nw,a,5\n")
    command = ("data", "import", "log.csv", "--out", "data/x", "--min-rating", "3", "--keep-seen", "--name", "mine")
    assert run(*command).code == 0
    data = genrec.Dataset.load("data/x")
    assert (data.manifest["name"], data.manifest["exclude_seen"], data.interactions.height) == ("mine", False, 5)
    assert run(*command).code == 9
    assert run(*command, "--overwrite", "--core", "2").code == 0
    assert genrec.Dataset.load("data/x").interactions.height == 4


def test_data_import_of_amazon_reviews_and_export_for_recbole(run: Run, shop: Path) -> None:
    review = '{"user_id": "u", "parent_asin": "P%d", "rating": 5.0, "timestamp": 1588687728%d00}\n'
    Path("Shop.jsonl").write_text("".join(review % (n, n) for n in (1, 2)))
    item = '{"parent_asin": "P%d", "title": "%s"}\n'
    Path("meta_Shop.jsonl").write_text(item % (1, "One") + item % (3, "Three"))
    command = ("data", "import", "Shop.jsonl", "meta_Shop.jsonl", "--out", "data/shop")
    assert run(*command).code == 0
    data = genrec.Dataset.load("data/shop")
    assert data.items.select("item_id", "title").rows() == [("P1", "One"), ("P2", "")]
    done = run("data", "export", "data/shop", "--to", "recbole", "recbole/shop")
    assert (done.code, done.out.split()) == (0, ["recbole/shop/shop.inter", "recbole/shop/shop.item"])
    assert run("data", "import", "recbole/shop", "--out", "data/again").code == 0
    assert genrec.Dataset.load("data/again").hash == data.hash
    assert run("data", "export", "data/shop", "--to", "recbole", "recbole/shop").code == 9
    told = run("data", "export", "data/shop", "--to", "recbole", "recbole/shop", "--overwrite", "--json")
    assert (len(told.json["files"]), told.json["lost"]) == (2, [])
    assert run(*command, "--overwrite", "--all-items").code == 0
    assert genrec.Dataset.load("data/shop").item_ids == ["P1", "P3", "P2"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--column", "user_id"], "--column 'user_id': write ours=theirs, such as user_id=customer"),
        (["--item-column", "=x"], "--item-column '=x': write ours=theirs"),
        (["--event", "view=much"], "--event 'view=much': the weight after = is no number"),
    ],
)
def test_data_import_with_a_malformed_option(run: Run, shop: Path, given: list[str], message: str) -> None:
    done = run("data", "import", "log.csv", "--out", "data/x", *given)
    assert (done.code, done.out) == (3, "")
    assert message in done.err


def test_data_inspect_as_a_table(run: Run, workspace: Path) -> None:
    done = run("data", "inspect", workspace / "data" / "tiny")
    found = dict(rows(done.out))
    assert found["interactions"] == "289"
    assert found["history length"].startswith("min: 4, p25: 6, median: 7")
    assert found["positives"] == "min_rating: none, events: none"
    assert found["item columns"] == "item_id, title, brand"


def test_data_fetch_prints_the_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from genrec import readers

    monkeypatch.setattr(readers, "fetch", lambda name, cache: cache / name)
    done = run("data", "fetch", "movielens-100k", "--cache", tmp_path)
    assert done == Done(0, f"{tmp_path / 'movielens-100k'}\n", "")
