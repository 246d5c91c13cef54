"""The cases that decide which weights are kept. How training uses them is in test_training.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from genrec import Recommender, metrics
from genrec.config import load_recipe
from genrec.dataset import Dataset
from genrec.prompts import Prompt
from genrec.validation import ValidationSet


def drawn(workspace: Path, *, users: int, exclude_seen: bool) -> tuple[ValidationSet, Recommender, Dataset]:
    recipe = load_recipe(workspace / "adapters" / "lora.toml", [f"validation.users={users}"])
    data, loaded = Dataset.load(workspace / "data" / "tiny"), Recommender.load(workspace / "adapters" / "lora")
    split = data.split(recipe.split, ties=recipe.ties, seed=recipe.split_seed)
    found = ValidationSet.draw(
        recipe, split, loaded.tokenization, loaded.adapter.prompt, data.user_rows, exclude_seen=exclude_seen
    )
    return found, loaded, data


def test_the_figures_are_those_of_a_full_ranking_by_score(workspace: Path) -> None:
    """The oracle scores every item after each user's history without the last two, and sorts."""
    validation, loaded, data = drawn(workspace, users=0, exclude_seen=True)
    ranks = []
    for history, user in zip(data.histories, data.user_rows or [], strict=True):
        seen, target = history[:-2], int(history[-2])
        scores = loaded.score([data.item_ids[item] for item in seen], data.item_ids, user=user)
        scores[np.unique(seen)] = -np.inf
        place = int((scores > scores[target]).sum()) + 1
        ranks.append(0 if np.isinf(scores[target]) else place)
    expected = {name: float(metrics.METRICS[name](ranks, 10).mean()) for name in ("ndcg", "recall")}
    found = validation.evaluate(loaded.engine)
    assert set(found) == {"ndcg@10", "recall@10"}
    np.testing.assert_allclose([found["ndcg@10"], found["recall@10"]], list(expected.values()), atol=1e-12)
    assert 0 < found["ndcg@10"] < found["recall@10"] < 1


def test_what_was_seen_may_come_back_where_the_data_say_so(workspace: Path) -> None:
    validation, loaded, _ = drawn(workspace, users=0, exclude_seen=False)
    assert validation.blocked is None
    without, _, _ = drawn(workspace, users=0, exclude_seen=True)
    assert without.blocked is not None
    assert validation.evaluate(loaded.engine) != without.evaluate(loaded.engine)


def test_the_same_cases_every_time(workspace: Path) -> None:
    (one, _, _), (two, _, data) = (drawn(workspace, users=7, exclude_seen=True) for _ in range(2))
    assert len(one.prompts) == len(one.targets) == 7 < len(data.user_ids)
    for mine, other in zip(one.prompts, two.prompts, strict=True):
        np.testing.assert_array_equal(mine, other)
    np.testing.assert_array_equal(one.targets, two.targets)


def test_cases_are_asked_with_their_context(workspace: Path) -> None:
    head = "{% block user %}{{ context.weekday }} {{ context.hour }}{% endblock %}"
    text = head + "{% block item %}{{ item.identifier }}{% endblock %}"
    prompt = Prompt.parse(text, "told")
    loaded = Recommender.load(workspace / "adapters" / "lora", engine="dummy").with_prompt(prompt, untrained=True)
    recipe = load_recipe(workspace / "adapters" / "lora.toml", ["validation.users=9"])
    data = Dataset.load(workspace / "data" / "tiny")
    log = data.interactions.with_columns(timestamp=pl.int_range(pl.len()) * 5000)
    data = Dataset.from_frames(log.drop("order"), data.items, data.users)
    split = data.split()
    found = ValidationSet.draw(recipe, split, loaded.tokenization, prompt, data.user_rows, exclude_seen=True)
    cases = split.valid.draw(9, [recipe.seed, 3])
    days = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"]
    for case, ids in zip(cases, found.prompts, strict=True):
        history = split.valid.histories[case]
        user = data.user_ids[split.valid.users[case]]
        second = log.filter(pl.col("user_id") == user)["timestamp"][len(history)]
        context = {"weekday": days[second // 86_400 % 7], "hour": second // 3600 % 24}
        np.testing.assert_array_equal(ids, loaded.tokenization.sequence(prompt, history, None, context))
