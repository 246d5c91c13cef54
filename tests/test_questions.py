from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

import genrec
from genrec import training
from genrec.config import Question, Spec
from genrec.engines.dummy import DummyEngine
from genrec.errors import ConfigError, DataError, PromptError
from genrec.evaluation import evaluate
from genrec.prompts import Prompt
from genrec.questions import ask
from genrec.recommender import Recommender
from genrec.report import cell

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


def test_questions_are_asked_with_the_context_of_their_event(rated: Path) -> None:
    text = (
        "{% block user %}At {{ context.timestamp }} {{ item.identifier }}?{% endblock %}"
        "{% block assistant %}{{ event.rating | int }}{% endblock %}"
    )
    prompt, rec = Prompt.parse(text, "rating"), Recommender.load(rated / "adapters" / "asked", engine="dummy")
    rec.adapter = replace(rec.adapter, prompts={**rec.adapter.prompts, "rating": prompt})
    asked: list[list[int]] = []

    class Listening(DummyEngine):
        def score(self, prompts: Any, answers: Any) -> Any:
            asked.extend(np.asarray(one).tolist() for one in prompts)
            return super().score(prompts, answers)

    rec.engine = Listening(len(rec.tokenization.tokenizer))
    data = genrec.Dataset.load(rated / "data" / "rated")
    split = data.split()
    cases = np.arange(len(split.test))[::-3]
    ask(rec, Question("rating", ("1", "2", "3", "4", "5")), data, split, cases)
    logs = {user: log for (user,), log in data.interactions.group_by("user_id")}
    expected = []
    for case in cases.tolist():
        last = logs[data.user_ids[split.test.users[case]]].row(-1, named=True)
        if last["rating"] is not None:
            item, context = int(split.test.targets[case]), {"timestamp": last["timestamp"]}
            expected += [rec.tokenization.question_ids(prompt, item, room=8, context=context).tolist()] * 5
    assert len({tuple(ids) for ids in expected}) > 5
    assert sorted(asked) == sorted(expected)


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
