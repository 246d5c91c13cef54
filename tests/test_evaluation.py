from __future__ import annotations

import gzip
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import genrec
from genrec import metrics, significance, training
from genrec.adapter import versions
from genrec.baselines import BASELINES, ItemKNN, Popularity, recommend
from genrec.config import Spec
from genrec.errors import ConfigError, DataError, LeakError
from genrec.evaluation import evaluate
from genrec.prompts import Prompt
from genrec.recommender import Recommender
from genrec.report import Report
from genrec.splits import histories_hash

PLAIN = ("popularity", "item_knn", "transitions_text")


@pytest.fixture(scope="module")
def data(workspace: Path) -> genrec.Dataset:
    return genrec.Dataset.load(workspace / "data" / "tiny")


@pytest.fixture(scope="module")
def report(workspace: Path) -> Report:
    return evaluate(workspace / "eval" / "tiny.toml")


def changed(data: genrec.Dataset, log: pl.DataFrame) -> genrec.Dataset:
    return genrec.Dataset.from_frames(log.drop("order"), data.items, data.users, name="changed")


def slow_means(lists: list[list[str]], targets: list[str], k: int) -> dict[str, float]:
    """The metrics by their definition, case after case."""
    recall = ndcg = mrr = 0.0
    for items, target in zip(lists, targets, strict=True):
        if target in items[:k]:
            rank = items.index(target) + 1
            recall, ndcg, mrr = recall + 1, ndcg + 1 / math.log2(rank + 1), mrr + 1 / rank
    means = {"recall": recall, "ndcg": ndcg, "mrr": mrr, "hit_rate": recall, "precision": recall / k}
    means["f1"] = 2 * recall / (k + 1)
    assert set(means) == set(metrics.METRICS)
    return {f"{name}@{k}": total / len(targets) for name, total in means.items()}


def check_row(row: dict[str, dict[str, float]], lists: list[list[str]], targets: list[str], n_items: int) -> None:
    for k in (5, 10):
        for name, mean in slow_means(lists, targets, k).items():
            assert row[name]["mean"] == pytest.approx(mean, abs=1e-12), name
        shown = {item for items in lists for item in items[:k]}
        assert row[f"coverage@{k}"]["mean"] == pytest.approx(len(shown) / n_items)


# The numbers


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_adapter_row_equals_a_slow_computation(workspace: Path, data: genrec.Dataset, exclude_seen: bool) -> None:
    given = [f"exclude_seen={str(exclude_seen).lower()}", "baselines=[]"]
    report = evaluate(workspace / "eval" / "tiny.toml", assignments=given)
    assert report.protocol["exclude_seen"] is exclude_seen
    for label, folder in (("base", "pretrained"), ("lora", "lora")):
        rec = Recommender.load(workspace / "adapters" / folder)
        lists, targets = [], []
        for (_,), events in data.interactions.group_by("user_id", maintain_order=True):
            *history, target = events["item_id"].to_list()
            scores = rec.score(history, data.item_ids)
            ranked = [data.item_ids[item] for item in np.argsort(-scores, kind="stable")]
            lists.append([item for item in ranked if not (exclude_seen and item in history)])
            targets.append(target)
        check_row(report.rows[label], lists, targets, len(data.items))


def test_popularity_row_equals_a_slow_computation(report: Report, data: genrec.Dataset) -> None:
    users = [events["item_id"].to_list() for _, events in data.interactions.group_by("user_id", maintain_order=True)]
    counts = Counter(item for events in users for item in events[:-2])
    ranked = sorted(data.item_ids, key=lambda item: (-counts[item], data.item_ids.index(item)))
    lists = [[item for item in ranked if item not in events[:-1]] for events in users]
    check_row(report.rows["popularity"], lists, [events[-1] for events in users], len(data.items))


def test_every_row_has_every_metric_and_its_interval(report: Report) -> None:
    assert list(report.rows) == [*PLAIN, "base", "lora"]
    assert report.kinds == {**dict.fromkeys(PLAIN, "baseline"), "base": "adapter", "lora": "adapter"}
    columns = [f"{metric}@{k}" for metric in (*metrics.METRICS, *metrics.LIST_METRICS) for k in (5, 10)]
    for row in report.rows.values():
        assert list(row) == columns
        for name, value in row.items():
            if name.split("@")[0] in metrics.LIST_METRICS:
                assert list(value) == ["mean"]
            else:
                assert 0 <= value["low"] <= value["mean"] <= value["high"] <= 1
        assert row["invalid@10"]["mean"] == row["repeated@10"]["mean"] == 0
    assert any(value["low"] < value["high"] for row in report.rows.values() for value in row.values() if "low" in value)
    assert {label: found.shape for label, found in report.lists.items()} == dict.fromkeys(report.rows, (40, 10))


def test_list_metrics_read_the_training_part(report: Report, data: genrec.Dataset) -> None:
    users = [set(history[:-2].tolist()) for history in data.histories]
    counts = np.array([sum(item in user for user in users) for item in range(len(data.items))])
    found = report.lists["lora"][:, :5]
    bits = [np.mean([-math.log2(max(counts[item], 1) / len(users)) for item in row]) for row in found]
    assert report.rows["lora"]["novelty@5"]["mean"] == pytest.approx(np.mean(bits))
    logs = np.log(1 + counts)
    more = [logs[row].mean() - logs[history[:-1]].mean() for row, history in zip(found, data.histories, strict=True)]
    assert report.rows["lora"]["log_popularity_difference@5"]["mean"] == pytest.approx(np.mean(more))


def test_a_metric_without_a_value_is_left_out(workspace: Path) -> None:
    found = evaluate(workspace / "eval" / "tiny.toml", assignments=["k=[1, 5]", "adapters={}"])
    assert "diversity@1" not in found.rows["popularity"]
    assert "diversity@5" in found.rows["popularity"]


def test_cases_hold_every_rank(report: Report, data: genrec.Dataset) -> None:
    assert report.cases.columns == ["user_id", "target", "recommender", "rank"]
    assert report.cases.height == 40 * len(report.rows)
    split = data.split()
    for label, found in report.lists.items():
        part = report.cases.filter(pl.col("recommender") == label)
        assert part["rank"].to_list() == metrics.ranks(found, split.test.targets).tolist()
        assert part["user_id"].to_list() == [data.user_ids[user] for user in split.test.users]
        assert part["target"].to_list() == [data.item_ids[item] for item in split.test.targets]


def test_every_adapter_is_tested_against_every_other_row(report: Report) -> None:
    pairs = [(a, b) for a in ("base", "lora") for b in PLAIN]
    assert [(test["metric"], test["a"], test["b"]) for test in report.tests] == [
        (metric, *pair) for metric in ("recall@10", "ndcg@10") for pair in pairs
    ]
    rank = {label: part["rank"].to_numpy() for (label,), part in report.cases.group_by("recommender")}
    for name in ("recall", "ndcg"):
        tests = [test for test in report.tests if test["metric"] == f"{name}@10"]
        for test in tests:
            value = metrics.METRICS[name]
            expected = significance.paired(value(rank[test["a"]], 10), value(rank[test["b"]], 10))
            assert expected == {key: test[key] for key in expected}
        assert [test["p_holm"] for test in tests] == significance.holm([test["p"] for test in tests]).tolist()


def test_segments_are_parts_of_the_cases(report: Report) -> None:
    assert list(report.segments) == ["history length", "popularity of the target", "target seen in training"]
    for parts in report.segments.values():
        assert sum(part["cases"] for part in parts.values()) == 40
        assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
        for label, row in report.rows.items():
            for name in ("recall@10", "ndcg@10"):
                whole = sum(part["share"] * part["rows"][label][name]["mean"] for part in parts.values())
                assert whole == pytest.approx(row[name]["mean"])


def test_examples_are_drawn_and_not_picked(report: Report, data: genrec.Dataset, workspace: Path) -> None:
    assert len({example["user_id"] for example in report.examples}) == 10
    titles = data.items["title"].to_list()
    for example in report.examples:
        history = data.histories[data.user_ids.index(example["user_id"])]
        assert example["events"] == len(history) - 1
        assert example["history"] == [titles[item] for item in history[:-1]][-8:]
        assert example["target"] == titles[history[-1]]
        assert list(example["lists"]) == list(report.rows)
        for places in example["lists"].values():
            assert len(places) == 5
            assert [place["hit"] for place in places] == [place["title"] == example["target"] for place in places]
    other = evaluate(workspace / "eval" / "tiny.toml", assignments=["adapters={}", "seed=1"])
    assert [e["user_id"] for e in other.examples] != [e["user_id"] for e in report.examples]


def test_evaluation_is_deterministic(report: Report, workspace: Path) -> None:
    again = evaluate(workspace / "eval" / "tiny.toml")
    assert again.rows == report.rows
    assert again.protocol == report.protocol


def test_spec_as_an_object(report: Report, workspace: Path, data: genrec.Dataset) -> None:
    spec = Spec(data="data/tiny", baselines=("popularity",), k=(5, 10))
    found = evaluate(spec, data, name="mine", workspace=workspace)
    assert (found.name, list(found.rows)) == ("mine", ["popularity"])
    assert found.rows["popularity"] == report.rows["popularity"]


def test_lists_are_padded_where_fewer_items_are_allowed(workspace: Path) -> None:
    given = ["k=[5,30]", "num_beams=30", "baselines=['popularity']", "adapters={lora='adapters/lora'}"]
    found = evaluate(workspace / "eval" / "tiny.toml", assignments=given)
    for lists in found.lists.values():
        assert lists.shape == (40, 30)
        assert (lists[:, -7:] == -1).all()  # 24 items, less those seen.
    np.testing.assert_array_equal((found.lists["lora"] >= 0).sum(axis=1), (found.lists["popularity"] >= 0).sum(axis=1))


def test_drawn_users_are_the_same_ones_every_time(report: Report, workspace: Path) -> None:
    given = ["users=10", "adapters={lora='adapters/lora'}"]
    first, again = (evaluate(workspace / "eval" / "tiny.toml", assignments=given) for _ in range(2))
    other = evaluate(workspace / "eval" / "tiny.toml", assignments=[*given, "seed=1"])
    assert first.protocol["cases"] == len(first.lists["lora"]) == 10
    assert first.rows == again.rows
    assert not np.array_equal(first.lists["popularity"], other.lists["popularity"])
    whole = {tuple(row) for row in report.lists["lora"].tolist()}
    assert {tuple(row) for row in first.lists["lora"].tolist()} <= whole


def test_columns_of_users_reach_the_recommender(workspace: Path, data: genrec.Dataset) -> None:
    told: list[Any] = []

    class Listening(Recommender):
        def search(self, histories: Any, k: int, **options: Any) -> Any:
            told.extend(options["users"])
            return super().search(histories, k, **options)

    evaluate(workspace / "eval" / "tiny.toml", assignments=["adapters={lora='adapters/lora'}"], load=Listening.load)
    assert data.users is not None
    assert told == data.users.to_dicts()


def test_contexts_of_the_targets_reach_the_recommender(workspace: Path, data: genrec.Dataset) -> None:
    text = "{% block user %}{{ context.hour }}{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}"
    told: list[Any] = []

    class Listening(Recommender):
        def search(self, histories: Any, k: int, **options: Any) -> Any:
            told.extend(options["contexts"])
            return super().search(histories, k, **options)

    def load(path: Path) -> Recommender:
        return Listening.load(path, engine="dummy").with_prompt(Prompt.parse(text, "told"), untrained=True)

    evaluate(workspace / "eval" / "tiny.toml", assignments=["adapters={lora='adapters/lora'}", "users=11"], load=load)
    split = data.split()
    last = data.interactions.group_by("user_id", maintain_order=True).agg(pl.col("timestamp").last())["timestamp"]
    users = split.test.users[split.test.draw(11, [0, 4])]
    assert [context["timestamp"] for context in told] == [last[int(user)] for user in users]
    assert all(context["hour"] == context["timestamp"] // 3600 % 24 for context in told)


# Leaks


def test_adapter_of_another_split_is_refused(workspace: Path) -> None:
    with pytest.raises(LeakError, match=r"'base' was trained on other interactions .* than the training part") as found:
        evaluate(workspace / "eval" / "tiny.toml", assignments=["split=temporal"])
    assert '"leave_one_out"' in str(found.value)  # The split of its recipe is named.


def test_adapter_of_another_order_of_ties_is_refused(workspace: Path, data: genrec.Dataset) -> None:
    tie = (pl.col("order") == 1) & (pl.col("item_id") != pl.col("item_id").shift())
    tied = changed(data, data.interactions.with_columns(timestamp=pl.col("timestamp") - 60 * tie))
    spec, given = workspace / "eval" / "tiny.toml", ["adapters={lora='adapters/lora'}"]
    assert evaluate(spec, tied, assignments=given).protocol["ties"] == "file"  # The order it was trained on.
    with pytest.raises(LeakError, match="'lora' was trained on other interactions"):
        evaluate(spec, tied, assignments=[*given, "ties=shuffled"])


def test_adapter_of_an_older_log_is_refused(workspace: Path, data: genrec.Dataset) -> None:
    newest = data.interactions.filter(pl.col("user_id") == "u3").tail(1)
    later = changed(data, pl.concat([data.interactions, newest.with_columns(pl.col("timestamp") + 60)]))
    with pytest.raises(LeakError, match="'base' was trained on other interactions"):
        evaluate(workspace / "eval" / "tiny.toml", later)


def test_adapter_that_saw_the_test_items_is_refused(workspace: Path, data: genrec.Dataset, tmp_path: Path) -> None:
    """Two more events for every user put validation and test items of the true log into the training part."""
    root = tmp_path / "workspace"
    shutil.copytree(workspace, root)
    last = data.interactions.group_by("user_id", maintain_order=True).last().select(data.interactions.columns)
    more = [last.with_columns(pl.col("timestamp") + 60 * step) for step in (1, 2)]
    longer = changed(data, pl.concat([data.interactions, *more]))
    assert longer.split().train_hash == histories_hash(data.histories, data.item_ids)
    recipe = root / "adapters" / "cheat.toml"
    shutil.copy(root / "adapters" / "pretrained.toml", recipe)
    training.train(recipe, longer, assignments=["training.num_train_epochs=1"])
    with pytest.raises(LeakError, match="'cheat' was trained on other interactions"):
        evaluate(root / "eval" / "tiny.toml", assignments=["adapters={cheat='adapters/cheat'}"])


def test_baselines_are_fitted_on_the_training_part_alone(
    workspace: Path, data: genrec.Dataset, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[np.ndarray]] = []

    class Listening(Popularity):
        def fit(self, train: Any, items: pl.DataFrame) -> Listening:
            seen.append(list(train))
            return super().fit(train, items)

    monkeypatch.setitem(BASELINES, "popularity", Listening)
    evaluate(workspace / "eval" / "tiny.toml", assignments=["adapters={}"])
    assert [history.tolist() for history in seen[0]] == [history[:-2].tolist() for history in data.histories]
    # Fitted on everything, ItemKNN would have looked better than it is.
    test = data.split().test
    leaky = recommend(ItemKNN().fit(data.histories, data.items), test.histories, 10)
    flattering = metrics.ndcg(metrics.ranks(leaky, test.targets), 10).mean()
    assert flattering > report.rows["item_knn"]["ndcg@10"]["mean"]


def test_baselines_do_not_change_when_test_items_do(workspace: Path, data: genrec.Dataset, report: Report) -> None:
    last = pl.col("order") == pl.col("order").max().over("user_id")
    other = data.interactions.with_columns(item_id=pl.when(last).then(pl.lit("i0")).otherwise(pl.col("item_id")))
    found = evaluate(workspace / "eval" / "tiny.toml", changed(data, other), assignments=["adapters={}"])
    for name in PLAIN:
        np.testing.assert_array_equal(found.lists[name], report.lists[name])
        assert found.rows[name] != report.rows[name]


def test_adapter_of_another_catalogue_is_refused(workspace: Path, data: genrec.Dataset) -> None:
    turned = genrec.Dataset.from_frames(data.interactions.drop("order"), data.items.reverse(), data.users)
    with pytest.raises(DataError, match="'base' knows another catalogue than data/tiny"):
        evaluate(workspace / "eval" / "tiny.toml", turned)


# The temporal split


@pytest.fixture(scope="module")
def temporal(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which users come one after another, and an adapter trained on the temporal split."""
    root = tmp_path_factory.mktemp("temporal") / "workspace"
    shutil.copytree(workspace, root)
    data = genrec.Dataset.load(root / "data" / "tiny")
    number = pl.col("user_id").str.slice(1).cast(pl.Int64)
    spread = changed(data, data.interactions.with_columns(timestamp=pl.col("timestamp") + 20 * number))
    spread.save(root / "data" / "spread")
    recipe = root / "adapters" / "temporal.toml"
    shutil.copy(root / "adapters" / "pretrained.toml", recipe)
    given = ["data=data/spread", "split=temporal", "training.num_train_epochs=1"]
    training.train(recipe, assignments=given)
    (root / "eval" / "temporal.toml").write_text(
        'data = "data/spread"\nsplit = "temporal"\nk = [5, 10]\n[adapters]\nnew = "adapters/temporal"\n'
    )
    return root


def test_temporal_evaluation_equals_a_slow_computation(temporal: Path) -> None:
    report = evaluate(temporal / "eval" / "temporal.toml")
    data = genrec.Dataset.load(temporal / "data" / "spread")
    stamps = np.sort(data.interactions["timestamp"].to_numpy())
    cut = stamps[round(0.9 * len(stamps))]
    assert report.protocol["test_time"] == cut
    rec = Recommender.load(temporal / "adapters" / "temporal")
    lists, targets, lengths = [], [], []
    for (_,), events in data.interactions.group_by("user_id", maintain_order=True):
        later = events.filter(pl.col("timestamp") >= cut)["item_id"].to_list()
        if later:
            history = events.filter(pl.col("timestamp") < cut)["item_id"].to_list()
            ranked = [data.item_ids[item] for item in np.argsort(-rec.score(history, data.item_ids), kind="stable")]
            lists.append([item for item in ranked if item not in history])
            targets.append(later[0])
            lengths.append(len(history))
    assert report.protocol["cases"] == len(targets) > 5
    check_row(report.rows["new"], lists, targets, len(data.items))


def test_adapter_of_leave_one_out_is_refused_on_the_temporal_split(temporal: Path) -> None:
    given = ["adapters={old='adapters/pretrained'}"]
    with pytest.raises(LeakError, match="'old' was trained on other interactions"):
        evaluate(temporal / "eval" / "temporal.toml", assignments=given)


# The report


def test_protocol_states_what_was_measured(report: Report, data: genrec.Dataset, workspace: Path) -> None:
    told = report.protocol
    assert told["data"] == "data/tiny"
    assert told["data_hash"] == data.hash
    assert told["split"] == "leave_one_out"
    assert told["ties"] == "file"
    assert told["test_history_includes_validation"] is True
    assert told["positives"] == {"min_rating": None, "events": None}
    assert told["exclude_seen"] is True
    assert (told["cases"], told["catalogue"], told["num_beams"]) == (40, 24, 24)
    assert "whole vocabulary" in told["scoring"]
    assert told["versions"] == versions()
    assert list(told["adapters"]) == ["base", "lora"]
    lora = Recommender.load(workspace / "adapters" / "lora", engine="dummy").adapter
    assert told["adapters"]["lora"] == {
        "folder": "adapters/lora",
        "hash": lora.hash,
        "tuning": "lora",
        "identifiers": "atomic",
        "prompt": "next_item",
        "max_length": 64,
        "base": "adapters/pretrained",
        "seed": 0,
        "kept": lora.manifest["kept"],
    }
    assert told["adapters"]["base"]["hash"] != lora.hash


def test_protocol_states_the_positives_of_the_data(workspace: Path, data: genrec.Dataset) -> None:
    rated = data.interactions.drop("order").with_columns(rating=pl.lit(5.0))
    some = genrec.Dataset.from_frames(rated, data.items, min_rating=4)
    found = evaluate(workspace / "eval" / "tiny.toml", some, assignments=["adapters={}"])
    assert found.protocol["positives"]["min_rating"] == 4


def test_report_is_saved_and_read_again(report: Report, tmp_path: Path) -> None:
    written = report.save(tmp_path / "results")
    assert written == tmp_path / "results" / "tiny.md"
    table = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert table["rows"] == report.rows
    assert table["spec"]["adapters"] == {"base": "adapters/pretrained", "lora": "adapters/lora"}
    again = Report.load(tmp_path / "results" / "tiny.json")
    assert again.tests == report.tests
    assert again.segments == report.segments
    assert again.cases.equals(report.cases)


# Cold items


@pytest.fixture(scope="module")
def cold(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose items i20 to i23 occur as test items alone, and an adapter that was trained on the rest."""
    root = tmp_path_factory.mktemp("cold") / "workspace"
    shutil.copytree(workspace, root)
    data = genrec.Dataset.load(root / "data" / "tiny")
    number, user = pl.col("item_id").str.slice(1).cast(pl.Int64), pl.col("user_id").str.slice(1).cast(pl.Int64)
    last = (pl.col("order") == pl.col("order").max().over("user_id")) & (user % 2 == 0)
    new = pl.when(last).then(20 + user % 4).otherwise(number % 20)
    log = data.interactions.with_columns(item_id=pl.format("i{}", new))
    changed(data, log).save(root / "data" / "cold")
    shutil.copy(root / "adapters" / "pretrained.toml", root / "adapters" / "cold.toml")
    training.train(root / "adapters" / "cold.toml", assignments=["data=data/cold", "training.num_train_epochs=1"])
    return root


def test_cold_targets_are_ranked_among_all_and_among_cold_items(cold: Path) -> None:
    data = genrec.Dataset.load(cold / "data" / "cold")
    spec = Spec("data/cold", {"new": "adapters/cold"}, PLAIN, k=(1, 2, 10), num_beams=24)
    report = evaluate(spec, workspace=cold)
    assert report.cold is not None
    assert (report.cold["cases"], report.cold["items"]) == (20, 4)
    assert report.segments["target seen in training"]["cold"]["cases"] == 20
    assert report.segments["popularity of the target"]["0"]["cases"] == 20
    for label, row in report.cold["rows"].items():
        assert list(row) == ["recall@10", "ndcg@10", "recall@10 among cold", "ndcg@10 among cold"]
        assert row["recall@10 among cold"]["mean"] == 1, label  # Four items, all within ten.
        assert row["recall@10"] == report.segments["target seen in training"]["cold"]["rows"][label]["recall@10"]
    rec = Recommender.load(cold / "adapters" / "cold")
    gains = []
    some = [f"i{item}" for item in range(20, 24)]
    for index, history in enumerate(data.histories):
        if int(data.user_ids[index][1:]) % 2 == 0:
            scores = rec.score([data.item_ids[item] for item in history[:-1]], some)
            place = [some[item] for item in np.argsort(-scores, kind="stable")].index(data.item_ids[history[-1]])
            gains.append(1 / math.log2(place + 2))
    assert report.cold["rows"]["new"]["ndcg@10 among cold"]["mean"] == pytest.approx(np.mean(gains))


def test_no_cold_target_is_no_part(report: Report) -> None:
    assert report.cold is None


# Lists brought from elsewhere


def test_the_lists_of_a_row_brought_as_a_file_score_the_same(
    report: Report, workspace: Path, data: genrec.Dataset, tmp_path: Path
) -> None:
    users = data.split().test.users
    table = [
        (data.user_ids[user], rank, data.item_ids[item])
        for user, row in zip(users, report.lists["lora"], strict=True) for rank, item in enumerate(row, start=1)
    ]  # fmt: skip
    frame = pl.DataFrame(table, schema=["user_id", "rank", "item_id"], orient="row")
    for file in ("today.csv", "yesterday.parquet"):
        path = tmp_path / file
        frame.write_csv(path) if path.suffix == ".csv" else frame.write_parquet(path)
    root = workspace / "eval" / "tiny.toml"
    given = ["adapters={lora='adapters/lora'}", f"against=['{tmp_path / 'today.csv'}']"]
    found = evaluate(root, assignments=given, against=[tmp_path / "yesterday.parquet"])
    assert list(found.rows) == [*PLAIN, "today", "yesterday", "lora"]
    assert found.kinds["today"] == found.kinds["yesterday"] == "against"
    assert found.rows["today"] == found.rows["yesterday"] == report.rows["lora"] == found.rows["lora"]
    assert [test["p"] for test in found.tests if test["b"] == "today"] == [1, 1]
    assert found.protocol["against"]["today"]["users_without_list"] == 0
    assert found.protocol["against"]["today"]["places_in_history"] == 0


def test_a_zipped_list_with_a_gap(workspace: Path, data: genrec.Dataset, tmp_path: Path) -> None:
    rows = [f"{user},1,i0\n{user},3,nothing" for user in data.user_ids]
    with gzip.open(tmp_path / "to.day.csv.gz", "wt") as file:
        file.write("\n".join(["user_id,rank,item_id", *rows]))
    given = ["adapters={}", "baselines=['popularity']", "k=[5]"]
    found = evaluate(workspace / "eval" / "tiny.toml", assignments=given, against=[tmp_path / "to.day.csv.gz"])
    assert list(found.rows) == ["popularity", "to.day"]
    shown = [place["title"] for place in found.examples[0]["lists"]["to.day"]]
    assert shown == [data.items["title"][0], "(empty)", "(not in the catalogue)"]


def test_two_rows_of_one_name_are_refused(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"both called 'popularity'\. Rename the adapter or the file"):
        evaluate(workspace / "eval" / "tiny.toml", against=[tmp_path / "popularity.csv"])


# Tuning on validation


class Listening(Popularity):
    """Scores the item that it is told to first, and keeps all that it is shown."""

    GRID = ({"first": -1}, {"first": 0}, {"first": 1}, {"first": 23})
    shown: list[Any]

    def __init__(self, *, first: int = -1) -> None:
        self.first = first

    @property
    def parameters(self) -> dict[str, float]:
        return {"first": self.first}

    def fit(self, train: Any, items: pl.DataFrame) -> Listening:
        self.shown.append(list(train))
        return super().fit(train, items)

    def scores(self, histories: Any) -> Any:
        self.shown.append(list(histories))
        scores = super().scores(histories)
        if self.first >= 0:
            scores[:, self.first] = 1e6
        return scores


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> type[Listening]:
    monkeypatch.setattr(Listening, "shown", [], raising=False)
    monkeypatch.setitem(BASELINES, "listening", Listening)
    return Listening


@pytest.fixture
def planted(data: genrec.Dataset) -> genrec.Dataset:
    """Every test target is i23, which occurs nowhere else; i1 is the validation target of all."""
    number = pl.col("item_id").str.slice(1).cast(pl.Int64)
    back = pl.col("order").max().over("user_id") - pl.col("order")
    item = pl.when(back == 0).then(23).when(back == 1).then(1).otherwise(2 + number % 20)
    return changed(data, data.interactions.with_columns(item_id=pl.format("i{}", item)))


def test_tuning_cannot_see_test_targets(listening: type[Listening], planted: genrec.Dataset, tmp_path: Path) -> None:
    planted_item, wanted = planted.item_ids.index("i23"), planted.item_ids.index("i1")
    listening.GRID = ({"first": -1}, {"first": wanted}, {"first": planted_item})
    spec = Spec("d", baselines=("listening",), k=(5, 10))
    found = evaluate(spec, planted, name="plant", workspace=tmp_path, tune_baselines=True)
    told = found.protocol["baselines"]["listening"]
    assert told["options"] == {"first": wanted}  # Perfect on validation; i23 would have been perfect on test.
    assert told["tuned"] is True
    assert [setting["options"]["first"] for setting in told["settings"]] == [-1, wanted, planted_item]
    assert told["tuned_on"] == "NDCG@10 of 40 validation cases"
    assert found.rows["listening"]["recall@10"]["mean"] < 1
    assert all(planted_item not in history for part in listening.shown for history in part)
    perfect = recommend(
        Listening(first=planted_item).fit(planted.split().train, planted.items), planted.split().test.histories, 5
    )
    assert metrics.ranks(perfect, planted.split().test.targets).tolist() == [1] * 40


def test_a_choice_is_kept_and_used_while_its_data_are_the_same(
    listening: type[Listening],
    planted: genrec.Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = planted.item_ids.index("i1")
    listening.GRID = ({"first": -1}, {"first": wanted})
    spec = Spec("d", baselines=("popularity", "listening"), k=(5, 10))
    run: Callable[..., Any] = lambda data, **options: evaluate(  # noqa: E731
        spec, data, name="kept", workspace=tmp_path, **options
    ).protocol["baselines"]
    assert run(planted)["listening"] == {"options": {"first": -1}, "tuned": False, "settings": []}
    tuned = run(planted, tune_baselines=True)
    assert tuned["popularity"]["tuned"] is False  # It has nothing to choose.
    stored = tmp_path / "eval" / "results" / "kept.tuned.json"
    table = json.loads(stored.read_text())
    assert table["tuned_on"]["train_hash"] == planted.split().train_hash
    assert table["baselines"]["listening"]["options"] == {"first": wanted}
    assert run(planted) == tuned
    monkeypatch.setitem(BASELINES, "another", type("Another", (Listening,), {}))
    assert run(planted) == tuned  # One more baseline says nothing of the others,
    listening.GRID = (*listening.GRID, {"first": 0})
    assert run(planted)["listening"]["tuned"] is False  # and one with other settings has to be tuned again.
    listening.GRID = listening.GRID[:-1]
    shorter = changed(planted, planted.interactions.filter(pl.col("user_id") != "u3"))
    assert run(shorter)["listening"]["tuned"] is False
    assert "kept.tuned.json was tuned on other data" in capsys.readouterr().err
    table["baselines"]["listening"]["options"] = {"second": 1}
    stored.write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=r"listening has no such options: \{'second': 1\}"):
        run(planted)
    for text in ("{}", "[]", json.dumps({**table, "baselines": {"listening": {}}})):
        stored.write_text(text)
        with pytest.raises(ConfigError, match=r"no file of tuned baselines .* tune again: --tune-baselines"):
            run(planted)
    assert run(planted, tune_baselines=True) == tuned  # As the message says.


# Bad input


def test_unknown_baseline_is_named_with_the_closest(workspace: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown baseline 'itemknn'. Did you mean 'item_knn'\?"):
        evaluate(workspace / "eval" / "tiny.toml", assignments=["baselines=['itemknn']"])


def test_adapter_and_baseline_of_one_name_are_refused(workspace: Path) -> None:
    with pytest.raises(ConfigError, match=r"both called 'popularity'\. Rename the adapter"):
        evaluate(workspace / "eval" / "tiny.toml", assignments=["adapters={popularity='adapters/lora'}"])


def test_data_without_a_test_case_are_refused(workspace: Path, data: genrec.Dataset) -> None:
    short = changed(data, data.interactions.filter(pl.col("order") < 2))
    with pytest.raises(DataError, match=r"leaves no test case \(users need 3 interactions or more\)"):
        evaluate(workspace / "eval" / "tiny.toml", short)


def test_the_engine_of_the_spec_answers_and_is_closed_before_the_next(
    inside: Path, report: Report, vllm: list[Any]
) -> None:
    given = ["engine=vllm", "vllm.max_num_seqs=4"]
    found = evaluate(inside / "eval" / "tiny.toml", assignments=given, dtype="float32")
    assert found.rows == report.rows
    assert [(engine.options.max_num_seqs, engine.closed) for engine in vllm] == [(4, True), (4, True)]
    assert found.protocol["versions"] == {**versions(), "vllm": "0.32.0"}


def test_an_engine_that_is_not_there_is_told_before_anything_is_fitted(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version() -> str:
        raise ConfigError("vLLM is not installed")

    monkeypatch.setattr("genrec.engines.vllm.version", version)
    monkeypatch.setattr("genrec.evaluation._fitted", lambda *_, **__: pytest.fail("baselines were fitted"))
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        evaluate(workspace / "eval" / "tiny.toml", assignments=["engine=vllm"])
    monkeypatch.undo()
    monkeypatch.setattr("genrec.engines.vllm.version", version)  # Baselines alone need none.
    alone = ["engine=vllm", "adapters={}", 'baselines=["popularity"]']
    assert "vllm" not in evaluate(workspace / "eval" / "tiny.toml", assignments=alone).protocol["versions"]


def test_a_column_that_the_users_lack_is_refused(workspace: Path, data: genrec.Dataset) -> None:
    text = "{% block user %}Age {{ user.age }}{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}"

    def load(path: Path) -> Recommender:
        return Recommender.load(path, engine="dummy").with_prompt(Prompt.parse(text, "aged"), untrained=True)

    without = genrec.Dataset.from_frames(data.interactions, data.items, name="tiny")
    with pytest.raises(DataError, match=r"no column .age"):
        evaluate(workspace / "eval" / "tiny.toml", without, load=load)
