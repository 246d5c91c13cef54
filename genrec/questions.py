"""Questions about the events of test cases: how likely an adapter thinks each answer, beside what really was."""

from __future__ import annotations

from typing import Any

import numpy as np

from genrec import metrics, progress
from genrec.config import Question
from genrec.dataset import Dataset
from genrec.errors import ConfigError, DataError
from genrec.recommender import Recommender
from genrec.significance import interval
from genrec.splits import Split, contexts
from genrec.tokenization import event_answers

_CHUNK = 256  # Cases per call of an engine, so that the progress bar moves.


def ask(recommender: Recommender, question: Question, data: Dataset, split: Split, cases: np.ndarray) -> dict[str, Any]:
    """Ask an adapter about the targets of test cases: how likely it thinks each answer, beside what really was.

    The probability of an answer is its share among ``question.answers``. The history is that of the test case, the item
    its target. A case whose event gives none of the answers is left out.

    Returns:
        ``metrics``: name -> mean and interval; the names that begin with "base rate" are of always answering with the
        share of each answer in training (one more of each counted), and "mean" with the mean of training. ``cases``:
        their number. ``shares``: of each answer among them. ``notes``: what could not be measured, and why.

    Raises:
        ConfigError: The prompt asks about no event.
        DataError: The interactions lack a column that its answer reads.
    """
    result: dict[str, Any] = {"metrics": {}, "cases": 0, "shares": {}, "notes": []}
    prompt = recommender.adapter.prompts.get(question.prompt)
    if prompt is None:
        has = ", ".join(recommender.adapter.prompts)
        result["notes"].append(f"not trained with the prompt {question.prompt!r}; it has {has}")
        return result
    if prompt.subject != "event":
        raise ConfigError(f"spec: questions: the prompt {prompt.name!r} asks about no event: its answer reads none.")
    for problem in prompt.check(None, *data.readable[1:]):  # Of items the adapter's own are read.
        raise DataError(f"{recommender.adapter.path}, prompt {prompt.name}: {problem}")
    answers, tokenization = question.answers, recommender.tokenization
    places = {answer: place for place, answer in enumerate(answers)}
    trained = event_answers(prompt, split.train_events)
    told = event_answers(prompt, split.test_events[cases])
    asked = [(case, places[answer]) for case, answer in zip(cases, told, strict=True) if answer in places]
    if not asked:
        others = ", ".join(sorted(set(told) - {""})[:5]) or "none: a column that it reads is empty"
        result["notes"].append(f"no test case has one of the answers {list(answers)}; found: {others}")
        return result
    truth = np.array([place for _, place in asked])
    completions = [tokenization.answer_ids(prompt, answer) for answer in answers]
    room = tokenization.answer_room(prompt, [*trained, *answers])
    scores = np.empty((len(asked), len(answers)))
    told_of = contexts(split.test_events) if prompt.reads["context"] else None
    with progress.bar(f"asking {prompt.name}", len(asked)) as advance:
        for start in range(0, len(asked), _CHUNK):
            chunk = [case for case, _ in asked[start : start + _CHUNK]]
            prompts = [
                tokenization.question_ids(
                    prompt, int(split.test.targets[case]), history=split.test.histories[case],
                    user=None if data.user_rows is None else data.user_rows[split.test.users[case]],
                    context=None if told_of is None else told_of.row(int(case), named=True), room=room,
                )
                for case in chunk
            ]  # fmt: skip
            found = recommender.engine.score([ids for ids in prompts for _ in completions], completions * len(prompts))
            scores[start : start + len(chunk)] = found.reshape(len(chunk), -1)
            advance(len(chunk))

    counts = np.array([trained.count(answer) for answer in answers]) + 1.0
    result["cases"] = len(truth)
    result["shares"] = {answer: float((truth == place).mean()) for place, answer in enumerate(answers)}
    row = result["metrics"]
    if len(answers) == 2:
        if len(set(truth.tolist())) == 2:
            margin = scores[:, 0] - scores[:, 1]
            low, high = metrics.auc_interval(margin, truth == 0)
            row["auc"] = {"mean": float(metrics.auc(margin, truth == 0)), "low": low, "high": high}
        else:
            least = data.manifest["positives"]["min_rating"]
            why = "" if least is None else f"; the data set keeps ratings of at least {least:g} alone"
            result["notes"].append(f"no AUC: the answer is {answers[truth[0]]!r} in all {len(truth)} cases{why}")
    row["log-loss"] = interval(metrics.log_loss(scores, truth))
    row["base rate log-loss"] = interval(metrics.log_loss(np.log(counts)[None].repeat(len(truth), axis=0), truth))
    if len(answers) > 2:
        row["accuracy"] = interval(scores.argmax(axis=1) == truth)
        row["base rate accuracy"] = interval(counts.argmax() == truth)
        try:
            values = np.array([float(answer) for answer in answers])
        except ValueError:
            return result
        shares = np.exp(scores - np.logaddexp.reduce(scores, axis=1)[:, None])
        row["rmse"] = _root(interval((shares @ values - values[truth]) ** 2))
        row["mean rmse"] = _root(interval((counts @ values / counts.sum() - values[truth]) ** 2))
    return result


def _root(value: dict[str, float]) -> dict[str, float]:
    return {name: float(np.sqrt(number)) for name, number in value.items()}
