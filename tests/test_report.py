from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from genrec import files, metrics, report
from genrec.errors import ConfigError, DataError, StorageError
from genrec.report import Comparison, Report, cell, words
from genrec.report.numbers import difference_cell, joined, metric_name, p_text, short

PLANTED = "<script>alert('x')</script> | $x_1$ & \"more\" [a](b) --> </svg>"
KS = (1, 5, 10, 20)
PER_CASE, OF_LISTS = tuple(metrics.METRICS), tuple(metrics.LIST_METRICS)


def value(mean: float, half: float = 0.004) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def row(recall: float) -> dict[str, dict[str, float]]:
    """A row with this recall@10."""
    out = {}
    for turn, name in enumerate(PER_CASE):
        out |= {f"{name}@{k}": value(recall * (k / 10) ** 0.6 * 0.9**turn) for k in KS}
    for turn, name in enumerate(OF_LISTS[:5]):
        out |= {f"{name}@{k}": {"mean": 0.1 + turn + recall} for k in KS}
    return out | {f"{name}@{k}": {"mean": 0.0} for name in OF_LISTS[5:] for k in KS}


def paired(a: str, b: str, metric: str, difference: float, p: float) -> dict[str, Any]:
    low, high = difference - 0.004, difference + 0.004
    return {
        "metric": metric,
        "a": a,
        "b": b,
        "difference": difference,
        "low": low,
        "high": high,
        "p": p / 2,
        "p_holm": p,
    }


def segment(cases: int, share: float, recalls: dict[str, float]) -> dict[str, Any]:
    rows = {name: {"recall@10": value(mean, 0.01), "ndcg@10": value(mean / 2, 0.01)} for name, mean in recalls.items()}
    return {"cases": cases, "share": share, "rows": rows}


RECALLS = {"popularity": 0.014, "item_knn": 0.088, "shop": 0.116, "today": 0.06}
KINDS = {"popularity": "baseline", "item_knn": "baseline", "shop": "adapter", "today": "against"}


def made(
    recalls: dict[str, float] = RECALLS,
    kinds: dict[str, str] = KINDS,
    *,
    title: str = PLANTED,
    p: float = 1e-5,
    cold_recall: float = 0.02,
    name: str = "beauty",
) -> Report:
    """A report with everything in it; ``p`` is of every test."""
    labels = list(recalls)
    tests = [
        paired(a, b, f"{metric}@10", (recalls[a] - recalls[b]) * scale, p)
        for metric, scale in (("recall", 1.0), ("ndcg", 0.9))
        for a in labels
        for b in labels
        if kinds[a] == "adapter" and kinds[b] != "adapter"
    ]
    lengths = ("1", "2 to 4", "5 to 9", "10 to 19", "20 to 49", "50 or more")
    history = {part: segment(500 * (6 - turn), (6 - turn) / 21, {x: r * (1 - turn / 20) for x, r in recalls.items()})
               for turn, part in enumerate(lengths)}  # fmt: skip
    behind = {x: (r / 2 if kinds[x] == "adapter" else r) for x, r in recalls.items()}
    lists = {x: [{"item_id": f"i{n}", "title": f"{title} {n}", "hit": n == turn} for n in range(5)]
             for turn, x in enumerate(labels)}  # fmt: skip
    examples = [
        {"user_id": f"u{n}<b>", "history": [f"{title} {n}", "A long title " * 12], "events": 2 + n, "target": title,
         "lists": lists}
        for n in range(10)
    ]  # fmt: skip
    cold = {x: {"recall@10": value(cold_recall if kinds[x] == "adapter" else 0.05, 0.01), "ndcg@10": value(0.02),
                "recall@10 among cold": value(0.2), "ndcg@10 among cold": value(0.1)} for x in labels}  # fmt: skip
    asked = {
        "shop": {"metrics": {"auc": value(0.7)}, "cases": 900, "shares": {"yes": 0.8, "no": 0.2}, "notes": ["<i>"]}
    }
    return Report(
        name=name,
        spec={"data": "data/beauty", "seed": 0, "split_seed": 3},
        protocol={
            "data": "data/beauty", "data_hash": "ab" * 32, "positives": {"min_rating": 4.0, "events": None},
            "split": "leave_one_out", "ties": "shuffled", "seed": 3, "order": "timestamp", "cases": 22_363,
            "cases_drawn": "all", "targets_seen_before": 7, "catalogue": 12_101,
            "ranking": "full catalogue, item level",
            "exclude_seen": True,
            "num_beams": 50, "scoring": "sum of log-probabilities", "filled_timestamps": 0,
            "equal_scores": "the item that stands first in the catalogue wins",
            "baselines": {
                "popularity": {"options": {}, "tuned": False, "settings": []},
                "item_knn": {"options": {"recency": 0.8}, "tuned": True, "settings": [{}, {}, {}]},
            },
            "adapters": {"shop": {"folder": "adapters/shop", "hash": "cd" * 32, "seed": 1}},
            "against": {"today": {"file": "today.parquet", "sha256": "ef" * 32, "rows": 223_630,
                                  "users_without_list": 12, "unknown_items": 5}},
            "versions": {"genrec": "0.1", "torch": "2.13"}, "something": {"new": 1},
        },
        kinds=kinds,
        rows={x: row(r) for x, r in recalls.items()},
        segments={
            "history length": history,
            "popularity of the target": {"0": segment(312, 0.014, behind), "1 to 4": segment(9_000, 0.4, recalls)},
            "target seen in training": {"seen": segment(22_051, 0.986, recalls), "cold": segment(312, 0.014, behind)},
            "language": {x: segment(100, 0.1, recalls) for x in ("de", "en", "Brazilian Portuguese", "fr", "日本語")},
        },
        cold={"cases": 312, "items": 801, "rows": cold},
        tests=tests,
        examples=examples,
        questions={"click": asked},
        lists={x: np.zeros((2, 20), dtype=np.int32) for x in labels},
        cases=pl.DataFrame({"user_id": ["u1", "u2"], "target": ["i1", "i2"], "recommender": ["shop", "shop"],
                            "rank": [1, 0]}, schema_overrides={"rank": pl.Int32}),
    )  # fmt: skip


class Page(HTMLParser):
    """The tags, addresses, text and nesting of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.said: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.said).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.links += [text or "" for name, text in attrs if name in ("src", "href", "xlink:href")]
        self.ids += [text or "" for name, text in attrs if name == "id"]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


@pytest.fixture(scope="module")
def full() -> Report:
    return made()


@pytest.fixture(scope="module")
def source(full: Report) -> str:
    return full.html()


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


@pytest.fixture(scope="module")
def bare(full: Report) -> Report:
    """Without what need not be there: quickly drawn."""
    rows = {
        label: {metric: found for metric, found in row.items() if metric.startswith(("recall", "ndcg"))}
        for label, row in full.rows.items()
    }
    return Report("bare", {}, {"cases": 2}, full.kinds, rows, cases=full.cases)


def headings(text: str) -> list[str]:
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


# Numbers


def test_cell_shows_the_mean_and_its_interval() -> None:
    assert cell({"mean": 0.1234, "low": 0.11, "high": 0.136}) == ".1234 [.1100, .1360]"
    assert cell({"mean": 1.0}) == "1.0000"
    assert cell({"mean": -0.5}) == "-.5000"
    assert cell({"mean": 10.25}) == "10.2500"
    assert cell({"mean": -0.00001}) == ".0000"
    assert cell({"mean": float("nan")}) == "n/a"


def test_numbers_as_text() -> None:
    assert difference_cell(paired("a", "b", "ndcg@10", 0.01, 0.1)) == "+.0100 [+.0060, +.0140]"
    assert short(-0.02, signed=True) == "-.0200"
    assert [p_text(p) for p in (0.0001, 0.012, 0.41, 1.0, None)] == [
        "p < .001", "p = .012", "p = .410", "p = 1.000", "p not known",
    ]  # fmt: skip
    assert [joined(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert [metric_name(name) for name in ("ndcg@5", "hit_rate@10", "auc")] == ["NDCG@5", "hit rate@10", "auc"]


# Sentences


def test_a_winner_is_said_with_shares_points_and_sureness(full: Report) -> None:
    first, recall, ndcg = words.summary(full.rows, full.kinds, full.tests, 22_363)
    assert first == "shop wins: it is significantly better than each of the 3 others in recall@10 and NDCG@10."
    assert recall == (
        "shop finds the next item among its first ten for 11.6% of 22,363 users, item_knn, the best of the others by "
        "this measure, for 8.8%; the difference of 2.8 points (95% interval +2.4 to +3.2) is significant "
        "(Holm-corrected p < .001)."
    )
    assert ndcg == (
        "By NDCG@10, which counts a hit the more the higher it stands, shop has .1044 and item_knn .0792; the "
        "difference of +.0252 is significant (Holm-corrected p < .001)."
    )
    assert full.markdown().splitlines()[2] == f"**{first}**"


def test_a_loser_is_called_one() -> None:
    found = made({"item_knn": 0.088, "popularity": 0.01, "shop": 0.05}, KINDS)
    first, recall, ndcg = words.summary(found.rows, found.kinds, found.tests, 100)
    assert first == (
        "shop does not win: it is significantly worse than item_knn (in recall@10 and NDCG@10) and is significantly "
        "better than popularity."
    )
    assert recall.endswith(
        "the difference of 3.8 points (95% interval -4.2 to -3.4) is significant (Holm-corrected p < .001): item_knn "
        "is better."
    )
    assert ndcg.endswith(": item_knn is better.")


def test_what_cannot_be_told_is_not_claimed() -> None:
    found = made(p=0.3)
    first, recall, ndcg = words.summary(found.rows, found.kinds, found.tests, 100)
    assert first.startswith("shop is not a sure winner: it cannot be told apart from popularity, item_knn and today")
    assert recall.endswith("cannot be told from chance (Holm-corrected p = .300).")
    assert ndcg.endswith("cannot be told from chance (Holm-corrected p = .300).")
    text = found.markdown()
    assert "wins:" not in text
    assert "significantly" not in text


def test_better_in_one_metric_and_worse_in_the_other_is_no_win() -> None:
    tests = [paired("a", "b", "recall@10", 0.02, 0.01), paired("a", "b", "ndcg@10", -0.02, 0.01)]
    assert words.verdict_sentence(tests, "a", ["recall@10", "ndcg@10"]) == (
        "a does not win: it is significantly worse than b (in NDCG@10)."
    )
    for p in (0.05, None, float("nan")):  # Significant is below .05; what could not be tested is not.
        tests[1]["p_holm"] = p
        assert words.verdict(tests, "a", ["recall@10", "ndcg@10"]) == ([], ["b"], [])


def test_several_adapters_have_a_sentence_each_and_a_warning() -> None:
    found = made({**RECALLS, "small": 0.07}, {**KINDS, "small": "adapter"})
    said = words.summary(found.rows, found.kinds, found.tests, 100)
    assert said[3].startswith("small does not win: it is significantly worse than item_knn (in recall@10 and NDCG@10)")
    assert said[4].startswith("shop is named first because it has the highest NDCG@10 of 2 adapters on the test cases;")


def test_one_recommender_and_baselines_alone() -> None:
    one = Report("one", {}, {"cases": 40}, {"shop": "adapter"}, {"shop": row(0.116)})
    assert words.summary(one.rows, one.kinds, one.tests, 40) == [
        "shop finds the next item among its first ten for 11.6% of 40 users (95% interval 11.2% to 12.0%).",
        "There is nothing to compare it with in this report, so nobody wins.",
    ]
    two = Report("two", {}, {"cases": 40}, KINDS, {"popularity": row(0.01), "item_knn": row(0.08)})
    assert words.summary(two.rows, two.kinds, two.tests, 40)[0].startswith("item_knn has the highest recall@10 of 2")
    adapters = Report("both", {}, {}, {"a": "adapter", "b": "adapter"}, {"a": row(0.01), "b": row(0.08)})
    first, second, _ = words.summary(adapters.rows, adapters.kinds, adapters.tests, 40)
    assert "no baseline is in this report" in first
    assert second.endswith("they differ by 7.0 points, and no paired test was made.")
    for report_ in (one, two, adapters):
        for text in (report_.markdown(), Page(report_.html()).text):
            assert "wins:" not in text


def test_other_cut_offs_take_the_largest() -> None:
    rows = {"shop": {name: found for name, found in row(0.1).items() if name.endswith(("@1", "@5"))}}
    (first, _) = words.summary(rows, KINDS, [], 40)
    assert "among its first five for" in first
    ones = {"shop": {"recall@1": value(0.1), "ndcg@1": value(0.1)}}
    assert "in the first place for 10.0% of 40 users" in words.summary(ones, KINDS, [], 40)[0]
    Page(Report("one", {}, {}, KINDS, ones).html())


def test_segments_in_which_an_adapter_loses() -> None:
    parts = {"few": segment(10, 0.1, {"shop": 0.05, "item_knn": 0.09, "popularity": 0.08}),
             "close": segment(20, 0.2, {"shop": 0.05, "item_knn": 0.06, "popularity": 0.01}),
             "many": segment(70, 0.7, {"shop": 0.10, "item_knn": 0.06, "popularity": 0.01}),
             "none": segment(0, 0.0, {"shop": 0.0, "item_knn": 1.0})}  # fmt: skip
    sure, open_ = words.losses({"length": parts}, KINDS, 10)
    assert sure == [
        "length: few (10 users, 10.0%): shop .0500 [.0400, .0600] is below item_knn .0900 [.0800, .1000] in recall@10 "
        "(and below popularity)."
    ]
    assert open_ == ["length: close (shop below item_knn)"]


def test_what_one_must_know_before_one_compares_is_told() -> None:
    told = {"exclude_seen": True, "adapters": {"new": {"kept": {"step": 0}}, "old": {"kept": {"step": 40}}}}
    lists = {"today": {"rows": 99999, "places": 9430, "places_in_history": 4816},
             "clean": {"rows": 10, "places": 10, "places_in_history": 0}}  # fmt: skip
    one, two = words.cautions({**told, "against": lists}, {})
    assert one.startswith("new kept the weights that its training began with (step 0)")
    assert two.startswith("4,816 of the 9,430 places of today (51.1%) name items that the user had before, ")
    assert len(words.cautions({**told, "exclude_seen": False, "against": lists}, {})) == 1
    assert words.cautions({}, {}) == []
    short = {"today": {"users_without_list": 23, "short_lists": {"users": 7, "k": 10}}}
    segments = {"history length": {"0": {"cases": 76, "share": 0.458}, "1 to 4": {"cases": 90, "share": 0.542}}}
    assert words.cautions({"against": short}, segments) == [
        "76 of the users (45.8%) have no history. What is found for them says nothing of how histories are read: see "
        "By history length for the others.",
        "23 users have no list of today; each counts as missed.",
        "7 lists of today have fewer than 10 places; the rest misses.",
    ]
    report = made()
    report.protocol["adapters"] = told["adapters"]
    assert one in report.markdown()


def test_protocol_is_told_in_words(full: Report) -> None:
    said = words.protocol(full.protocol, full.spec)
    text = "\n".join(said)
    assert f"Data: data/beauty, hash {'ab' * 32}." in said
    assert "What is a positive: ratings of at least 4." in said
    assert "Order within equal timestamps: shuffled with seed 3." in said
    assert "Split: leave one out." in text
    assert (
        "Seen items: items of the history are left out of every list that was made here. 7 targets are items that"
        in text
    )
    assert "Adapters: 50 beams; the score of an item is the sum of log-probabilities." in said
    assert "Baseline popularity: nothing to tune; options: none." in said
    assert (
        "Baseline item_knn: tuned on validation (3 settings tried, all in the JSON file); options: recency 0.8." in said
    )
    assert f"List brought by the user, today: today.parquet (SHA-256 {'ef' * 32}); 223,630 rows; 12 users" in text
    assert 'Something: {"new": 1}.' in said  # What nobody wrote a sentence for is told as it is.
    assert "Versions: genrec 0.1, torch 2.13." in said
    temporal = words.protocol({"split": "temporal", "valid_time": 0, "test_time": 86_400, "exclude_seen": False}, {})
    assert "Training ends at 1970-01-01 00:00 UTC, test begins at 1970-01-02 00:00 UTC" in "\n".join(temporal)
    assert "Seen items: lists may hold items of the history." in temporal


# The documents


def test_everything_has_its_section(full: Report, page: Page) -> None:
    expected = ["Accuracy", "Differences, and how sure they are", "Where it loses", "Beyond accuracy", "Cold items",
                "Answers to click", "Example users", "Every metric", "Protocol"]  # fmt: skip
    assert headings(full.markdown()) == expected
    for heading in expected:
        assert heading in page.text
    assert page.tags.count("svg") == 3
    assert cell(full.rows["shop"]["ndcg@10"]) in page.text
    for name in OF_LISTS:
        assert f"{metric_name(name)}: {metrics.EXPLANATIONS[name]}" in page.text
    assert "10 users drawn by the seed, not picked." in page.text
    assert page.text.count("User u") == 10


def test_what_is_missing_leaves_its_section_out(full: Report, bare: Report) -> None:
    assert headings(bare.markdown()) == ["Accuracy", "Every metric", "Protocol"]
    assert Page(bare.html()).tags.count("svg") == 1
    nobody = replace(full, cold={"cases": 0, "items": 0, "rows": {}})
    assert "Cold items" not in headings(nobody.markdown())
    empty = replace(full, segments={"language": {"de": segment(0, 0.0, {})}})
    assert Page(empty.html()).tags.count("svg") == 2


def test_the_page_needs_no_network_and_no_script_and_titles_are_text(page: Page) -> None:
    assert not {"script", "img", "link", "iframe", "object", "b", "i"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert "<script>alert('x')</script> | $x_1$ &" in page.text


def test_markdown_shows_titles_as_they_are(full: Report) -> None:
    text = full.markdown()
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;script>alert('x')&lt;/script> \\| $x_1$ & \"more\" \\[a](b)" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    for above, below in itertools.pairwise(tables):
        if set(below) == set("|-"):
            assert above.count("|") == below.count("|")
    (line,) = [line for line in tables if line.startswith("| shop | adapter |")]
    assert f"**{cell(full.rows['shop']['ndcg@10'])}**" in line


def test_labels_from_data_stay_text_in_pictures() -> None:
    name = "_</svg><script> $\\frac{1}{2}$ 日本"
    found = made({name: 0.1, "item_knn": 0.08}, {name: "adapter", "item_knn": "baseline"})
    page = Page(found.html())
    assert "script" not in page.tags
    assert page.text.count("</svg><script> $") >= 4  # The summary, the bars, the forest and the tables.


def test_hits_are_marked(source: str) -> None:
    marked = re.findall(r"<td class=marked>✓ &lt;script", source)
    assert len(marked) == len(RECALLS) * 10
    assert "Hits among the places shown: shop 10, item_knn 10, today 10, popularity 10." in source


def test_the_same_report_gives_the_same_bytes(full: Report, source: str) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    assert made().html() == source
    assert full.markdown() == made().markdown()
    assert dict(matplotlib.rcParams) == before


def test_twelve_recommenders() -> None:
    recalls = {f"a rather long name of a recommender {n}": 0.01 * n for n in range(12)}
    kinds = {name: "adapter" if n > 9 else "baseline" for n, name in enumerate(recalls)}
    text = Page(made(recalls, kinds).html()).text
    assert "The picture shows 6 of 12 recommenders; the tables have all." in text


def test_items_that_do_not_exist_are_told(full: Report) -> None:
    rows = {**full.rows, "today": {**full.rows["today"], "invalid@10": {"mean": 0.01}}}
    assert "Beware: lists of today hold items that the catalogue does not have." in replace(full, rows=rows).markdown()
    assert "Beware" not in full.markdown()


def test_cold_items_are_compared_by_intervals() -> None:
    assert "popularity .0500 [.0400, .0600]: clearly less." in made(cold_recall=0.02).markdown()
    assert "popularity .0500 [.0400, .0600]: clearly more." in made(cold_recall=0.08).markdown()
    assert "the intervals overlap, so nothing can be told." in made(cold_recall=0.045).markdown()


# Files


def test_a_report_is_saved_and_read_back(full: Report, source: str, tmp_path: Path) -> None:
    written = full.save(tmp_path / "results")
    assert written == tmp_path / "results" / "beauty.md"
    assert sorted(path.name for path in written.parent.iterdir()) == [
        "beauty.cases.parquet", "beauty.html", "beauty.json", "beauty.md",
    ]  # fmt: skip
    assert written.read_text() == full.markdown()
    assert (written.parent / "beauty.html").read_text() == source
    table = json.loads((written.parent / "beauty.json").read_text())
    assert table["rows"] == full.rows
    assert table["tests"] == full.tests
    again = Report.load(written.parent / "beauty.json")
    assert again == full
    assert again.cases.equals(full.cases)
    assert again.lists == {}
    assert again.markdown() == full.markdown()


def test_numbers_that_json_does_not_have(bare: Report, tmp_path: Path) -> None:
    shop = {**bare.rows["shop"], "diversity@10": {"mean": float("nan")}, "mrr@10": {"mean": np.float64(0.5)}}
    found = replace(bare, rows={**bare.rows, "shop": shop})
    found.save(tmp_path)
    rows = Report.load(tmp_path / "bare.json").rows["shop"]
    assert rows["diversity@10"] == {"mean": None}
    assert rows["mrr@10"] == {"mean": 0.5}
    assert Report.load(tmp_path / "bare.json").markdown() == found.markdown()


def test_report_that_cannot_be_written_leaves_nothing(
    bare: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_take_name", refuse)
    with pytest.raises(StorageError, match=r"bare\.cases\.parquet: No space left on device"):
        bare.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_reports_that_cannot_be_read(bare: Report, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bare\.json: no such report"):
        Report.load(tmp_path / "bare.json")
    bare.save(tmp_path)
    replace(bare, name="other", cases=bare.cases.head(1)).save(tmp_path)
    (tmp_path / "other.cases.parquet").replace(tmp_path / "bare.cases.parquet")
    with pytest.raises(DataError, match=r"is not of the same run as bare\.json"):
        Report.load(tmp_path / "bare.json")
    with pytest.raises(ConfigError, match=r"other\.cases\.parquet: missing"):
        Report.load(tmp_path / "other.json")
    (tmp_path / "old.json").write_text('{"name": "old"}')
    with pytest.raises(DataError, match=r"old\.json is no report of this version of genrec"):
        Report.load(tmp_path / "old.json")


def test_a_report_without_rows_or_kinds_is_refused() -> None:
    with pytest.raises(DataError, match="has no recommender"):
        Report("none", {}, {}, {}, {})
    with pytest.raises(DataError, match="gives 'shop' the kind None"):
        Report("none", {}, {}, {}, {"shop": row(0.1)})


# Two reports


def test_a_comparison_shows_both_and_what_differs(full: Report) -> None:
    other = made({"shop": 0.1, "item_knn": 0.088}, KINDS, name="plain<b>")
    other = replace(other, protocol={**other.protocol, "ties": "file"})
    tests = [paired("shop", "shop", "recall@10", 0.016, 0.01), paired("shop", "shop", "ndcg@10", 0.0144, 0.01),
             paired("item_knn", "item_knn", "ndcg@10", 0.0, 1.0)]  # fmt: skip
    found = Comparison(full, other, tests)
    text = found.markdown()
    assert text.startswith("# beauty against plain&lt;b>\n\n**A: shop is significantly better than B: shop.**\n")
    assert "A: shop finds the next item among its first ten for 11.6% of 22,363 users, B: shop for 10.0%" in text
    assert "| A: shop | adapter |" in text
    assert "| B: shop | adapter |" in text
    assert "| A: shop minus B: shop | NDCG@10 | +.0144 [+.0104, +.0184] | p = .005 | p = .010 |" in text
    only_a, only_b = text.split("Only A:")[1].split("Only B:")
    assert "Order within equal timestamps: shuffled with seed 3." in only_a
    assert "Order within equal timestamps: as in the file." in only_b
    assert "Data: data/beauty" not in only_a + only_b
    page = Page(found.html())
    assert page.tags.count("svg") == 2
    assert page.open == []
    assert "b" not in page.tags
    worse = [{**test, "difference": -0.01} for test in tests]
    assert "**B: shop is significantly better than A: shop.**" in Comparison(full, other, worse).markdown()
    unsure = [{**test, "p_holm": 0.2} for test in tests]
    assert "**A: shop and B: shop cannot be told apart with certainty.**" in Comparison(full, other, unsure).markdown()
    assert "nothing can be told from this page but the means" in Comparison(full, other).markdown()


def test_a_comparison_is_about_the_adapters_at_a_cut_off_of_both() -> None:
    """item_knn is above the adapters, and one report has a row at 5 and 20 alone."""
    first, other = (
        made({"shop": recall, "item_knn": 0.2}, KINDS, name=name) for name, recall in (("a", 0.1), ("b", 0.05))
    )
    rows = {label: {m: v for m, v in row.items() if not m.endswith("@10")} for label, row in first.rows.items()}
    tests = [paired(label, label, f"{name}@20", difference, p) for name in ("recall", "ndcg")
             for label, difference, p in (("shop", 0.05, 0.001), ("item_knn", 0.0, 1.0))]  # fmt: skip
    text = Comparison(replace(first, rows=rows), other, tests).markdown()
    assert "**A: shop is significantly better than B: shop.**" in text
    assert "among its first twenty" in text


def test_public_names() -> None:
    assert set(report.__all__) == {"Comparison", "Report", "cell", "question_table"}
