from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

import genrec
from genrec import evaluation, files, training
from genrec.adapter import versions
from genrec.baselines import BASELINES, ItemKNN, Popularity, recommend
from genrec.config import Question, Spec
from genrec.errors import ConfigError, DataError, LeakError, PromptError, StorageError
from genrec.evaluation import Report, cell, evaluate
from genrec.recommender import Recommender
from genrec.splits import histories_hash


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
    return {f"{name}@{k}": total / len(targets) for name, total in (("recall", recall), ("ndcg", ndcg), ("mrr", mrr))}


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
    assert list(report.rows) == ["popularity", "item_knn", "transitions_text", "base", "lora"]
    columns = [f"{metric}@{k}" for metric in ("recall", "ndcg", "mrr", "coverage") for k in (5, 10)]
    for row in report.rows.values():
        assert list(row) == columns
        for name, value in row.items():
            if name.startswith("coverage"):
                assert list(value) == ["mean"]
            else:
                assert 0 <= value["low"] <= value["mean"] <= value["high"] <= 1
    assert any(value["low"] < value["high"] for row in report.rows.values() for value in row.values() if "low" in value)
    assert {label: found.shape for label, found in report.lists.items()} == dict.fromkeys(report.rows, (40, 10))


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
    flattering = evaluation.measure(leaky, test.targets, (10,), len(data.items))
    assert flattering["ndcg@10"]["mean"] > report.rows["item_knn"]["ndcg@10"]["mean"]


def test_baselines_do_not_change_when_test_items_do(workspace: Path, data: genrec.Dataset, report: Report) -> None:
    last = pl.col("order") == pl.col("order").max().over("user_id")
    other = data.interactions.with_columns(item_id=pl.when(last).then(pl.lit("i0")).otherwise(pl.col("item_id")))
    found = evaluate(workspace / "eval" / "tiny.toml", changed(data, other), assignments=["adapters={}"])
    for name in BASELINES:
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


def test_report_is_saved_as_json_and_markdown(report: Report, tmp_path: Path) -> None:
    written = report.save(tmp_path / "results")
    assert written == tmp_path / "results" / "tiny.md"
    assert sorted(path.name for path in written.parent.iterdir()) == ["tiny.json", "tiny.md"]
    table = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert table["rows"] == report.rows
    assert table["spec"]["adapters"] == {"base": "adapters/pretrained", "lora": "adapters/lora"}
    assert table["protocol"]["data_hash"] == report.protocol["data_hash"]
    text = written.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| lora |")]
    assert line.count("|") == 2 + len(report.rows["lora"])
    assert cell(report.rows["lora"]["ndcg@10"]) in line
    assert f'- data_hash: "{report.protocol["data_hash"]}"' in text


def test_report_that_cannot_be_written_leaves_nothing(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_take_name", full)
    with pytest.raises(StorageError, match=r"tiny\.json: No space left on device"):
        report.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cell_shows_the_mean_and_its_interval() -> None:
    assert cell({"mean": 0.1234, "low": 0.11, "high": 0.136}) == ".1234 [.1100, .1360]"
    assert cell({"mean": 1.0}) == "1.0000"


# Questions about events

QUESTIONS = (Question("click", ("yes", "no")), Question("rating", ("1", "2", "3", "4", "5")))


@pytest.fixture(scope="module")
def rated(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace with ratings, of which every tenth is missing, and an adapter that was asked about them."""
    root = tmp_path_factory.mktemp("rated") / "workspace"
    shutil.copytree(workspace, root)
    data = genrec.Dataset.load(root / "data" / "tiny")
    number = pl.col("item_id").str.slice(1).cast(pl.Int32)
    rating = pl.when(pl.int_range(pl.len()) % 10 == 6).then(None).otherwise(1 + (number * 7 + pl.col("order")) % 5)
    log = data.interactions.with_columns(rating=rating).drop("order")
    genrec.Dataset.from_frames(log, data.items, data.users, name="rated").save(root / "data" / "rated")
    recipe = (root / "adapters" / "lora.toml").read_text().replace("data/tiny", "data/rated")
    tasks = "".join(f'[[tasks]]\nprompt = "prompts/{name}.jinja"\n' for name in ("click", "rating", "titles_to_item"))
    (root / "adapters" / "asked.toml").write_text(recipe.replace("[lora]", tasks + "[lora]"))
    training.train(root / "adapters" / "asked.toml")
    return root


def asked_slowly(root: Path, name: str, answers: tuple[str, ...]) -> tuple[np.ndarray, list[int], list[str]]:
    """Log-probabilities of the answers, the true one's place, and the answers in training; by the definitions."""
    rec = Recommender.load(root / "adapters" / "asked")
    prompt, made = rec.adapter.prompts[name], rec.tokenization
    data = genrec.Dataset.load(root / "data" / "rated")
    scores, truth, trained = [], [], []

    def answer(rating: float) -> str:
        return ("yes" if rating >= 4 else "no") if name == "click" else str(int(rating))

    for (_,), events in data.interactions.group_by("user_id", maintain_order=True):
        ratings = events["rating"].to_list()
        trained += [answer(rating) for rating in ratings[:-2] if rating is not None]
        if ratings[-1] is None:
            continue
        *history, target = rec.indices(events["item_id"].to_list())
        asked, row = [], []
        for text in answers:
            rating = {"yes": 5.0, "no": 1.0}.get(text) or float(text)
            # As in training: the very row whose answer would have been this one.
            ids = made.question_row(prompt, target, history=np.array(history), event={"rating": rating}, room=8)
            begin = int(np.argmax(ids.labels != -100))
            asked.append(ids.ids[:begin].tolist())
            row.append(float(rec.engine.score([ids.ids[:begin]], [ids.ids[begin:]])[0]))
        assert all(ids == asked[0] for ids in asked)
        scores.append(row)
        truth.append(answers.index(answer(ratings[-1])))
    return np.array(scores), truth, trained


def test_answers_equal_a_slow_computation(rated: Path) -> None:
    spec = Spec("data/rated", {"asked": "adapters/asked", "lora": "adapters/lora"}, (), questions=QUESTIONS)
    report = evaluate(spec, workspace=rated)
    for question in QUESTIONS:
        scores, truth, trained = asked_slowly(rated, question.prompt, question.answers)
        found = report.questions[question.prompt]["asked"]
        assert found["cases"] == len(truth) < 40
        assert found["notes"] == []
        counts = np.array([trained.count(answer) + 1 for answer in question.answers])
        base = [-math.log(counts[place] / counts.sum()) for place in truth]
        shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        row = {name: value["mean"] for name, value in found["metrics"].items()}
        assert row["log-loss"] == pytest.approx(np.mean([-math.log(shares[i, t]) for i, t in enumerate(truth)]))
        assert row["base rate log-loss"] == pytest.approx(np.mean(base))
        assert found["shares"] == {
            answer: pytest.approx(truth.count(place) / len(truth)) for place, answer in enumerate(question.answers)
        }
        if question.prompt == "click":
            assert set(row) == {"auc", "log-loss", "base rate log-loss"}
            assert row["auc"] == pytest.approx(roc_auc_score([place == 0 for place in truth], shares[:, 0]))
        else:
            actual = np.array([place + 1 for place in truth])
            assert row["rmse"] == pytest.approx(np.sqrt(np.mean((shares @ np.arange(1, 6) - actual) ** 2)))
            mean = (counts @ np.arange(1, 6)) / counts.sum()
            assert row["mean rmse"] == pytest.approx(np.sqrt(np.mean((mean - actual) ** 2)))
            assert row["accuracy"] == pytest.approx(np.mean(shares.argmax(axis=1) + 1 == actual))
            assert row["base rate accuracy"] == pytest.approx(np.mean(counts.argmax() + 1 == actual))
        for value in found["metrics"].values():
            assert value["low"] <= value["mean"] <= value["high"]
        (note,) = report.questions[question.prompt]["lora"]["notes"]
        assert note.startswith(f"not trained with the prompt {question.prompt!r}; it has next_item, ")
    text = report.markdown()
    click = report.questions["click"]["asked"]
    assert f"| asked | {cell(click['metrics']['auc'])} |" in text
    assert "- lora: not trained with the prompt 'click'" in text


def test_an_auc_of_one_class_is_a_reason_and_no_number(rated: Path) -> None:
    data = genrec.Dataset.load(rated / "data" / "rated")
    # The same histories, and only high ratings, as a log that was imported with min_rating has.
    high = data.interactions.with_columns(rating=pl.lit(5.0)).drop("order")
    liked = genrec.Dataset.from_frames(high, data.items, data.users, min_rating=4)
    found = evaluate(
        Spec("d", {"asked": "adapters/asked"}, (), questions=(QUESTIONS[0], Question("rating", ("1", "2")))),
        liked, workspace=rated,
    ).questions  # fmt: skip
    assert "auc" not in found["click"]["asked"]["metrics"]
    assert found["click"]["asked"]["notes"] == [
        "no AUC: the answer is 'yes' in all 40 cases; the data set keeps ratings of at least 4 alone"
    ]
    assert found["rating"]["asked"] == {
        "metrics": {}, "cases": 0, "shares": {},
        "notes": ["no test case has one of the answers ['1', '2']; found: 5"],
    }  # fmt: skip


def test_questions_that_cannot_be_asked(rated: Path) -> None:
    spec = Spec("data/tiny", {"asked": "adapters/asked"}, (), questions=QUESTIONS)
    with pytest.raises(DataError, match=r"prompt click: 13:34: .*`event` has no column `rating`\. Known: timestamp"):
        evaluate(spec, workspace=rated)
    other = Spec("data/rated", {"a": "adapters/asked"}, (), questions=(Question("title_to_item", ("a", "b")),))
    with pytest.raises(ConfigError, match="the prompt 'title_to_item' asks about no event"):
        evaluate(other, workspace=rated)


def test_a_recipe_whose_columns_are_missing_says_where(rated: Path) -> None:
    with pytest.raises(
        PromptError, match=r"click\.jinja:\d+:\d+: the table of `event` has no column `rating`\. Known: t"
    ):
        training.train(rated / "adapters" / "asked.toml", assignments=["data=data/tiny"], overwrite=True)


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


def test_a_column_that_the_users_lack_is_refused(workspace: Path, data: genrec.Dataset, tmp_path: Path) -> None:
    shutil.copytree(workspace, tmp_path / "copy")
    adapter = tmp_path / "copy" / "adapters" / "lora"
    prompt = adapter / "prompts" / "next_item.jinja"
    prompt.write_text(prompt.read_text().replace("Next:", "Age {{ user.age }}, next:"))
    manifest = json.loads((adapter / "genrec.json").read_text())
    manifest["files"]["prompts/next_item.jinja"] = files.file_hash(prompt)
    (adapter / "genrec.json").write_text(json.dumps(manifest))
    without = genrec.Dataset.from_frames(data.interactions, data.items, name="tiny")
    with pytest.raises(DataError, match=r"no column .age"):
        evaluate(tmp_path / "copy" / "eval" / "tiny.toml", without)
