from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import genrec
from genrec import adapter as adapters
from genrec import features
from genrec.adapter import Adapter
from genrec.config import Recipe
from genrec.engines.local import LocalEngine
from genrec.identifiers import Identifiers
from genrec.regression import RowMap, TrainedTokens, extended_rows, matched_scale
from genrec.toml import from_table
from genrec.validation import ValidationSet


def test_rows_are_predicted_from_text_and_an_unknown_text_gets_the_mean() -> None:
    rng = np.random.default_rng(0)
    texts, map_ = rng.normal(size=(200, 6)), rng.normal(size=(6, 10))
    rows = texts @ map_ + 3
    wanted = rng.normal(size=(20, 6))
    wanted[-1] = 0
    made = RowMap.fit(texts, rows + 0.01 * rng.normal(size=rows.shape), np.ones(200))
    assert made.told["explained"] > 0.99
    found = made.rows(wanted)
    np.testing.assert_allclose(found[:-1], wanted[:-1] @ map_ + 3, atol=0.1)
    np.testing.assert_allclose(found[-1], rows.mean(axis=0), atol=0.01)
    assert RowMap.fit(texts, rng.normal(size=rows.shape), np.ones(200)).told["explained"] < 0.1
    few = RowMap.fit(texts[:2], rows[:2], np.ones(2)).rows(wanted)  # Too few to hold any out.
    np.testing.assert_allclose(few, np.repeat(rows[:2].mean(axis=0)[None], 20, axis=0), rtol=1e-6)


def test_a_row_map_counts_tokens_by_their_weight_and_scales_away_from_the_mean() -> None:
    texts, rows = np.array([[1.0], [1.0], [0.0]]), np.array([[0.0], [4.0], [1.0]])
    made = RowMap.fit(texts, rows, np.array([1, 3, 4]))
    assert made.level == pytest.approx([2.0])
    steep = RowMap(np.zeros(1), np.array([2.0]), np.array([[5.0]]), {})
    np.testing.assert_allclose(steep.rows(np.array([[1.0], [0.0]]), 2.0), [[12.0], [2.0]])


def test_tokens_count_the_events_of_their_items_and_new_ones_get_rows_by_their_text() -> None:
    made = Identifiers("random", ["a", "b", "c"], [("x", "y"), ("x", "z"), ("w",)])
    texts = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=np.float32)
    rows = {"input": torch.arange(len(made.vocabulary) * 2).reshape(-1, 2).to(torch.bfloat16)}
    known = TrainedTokens.of(made, rows, texts, [np.array([0, 0, 1]), np.array([2])])
    events = dict(zip(known.vocabulary, known.events.tolist(), strict=True))
    wanted = {"x": 3, "y": 2, "z": 1, "w": 1}  # x is a part of a and of b.
    assert events == {token: wanted[token] for token in made.vocabulary}
    assert {known.vocabulary[number] for number in known.told} == set(made.vocabulary) - {"w"}  # c has no text.
    assert not known.enough
    longer = Identifiers("random", ["a", "b", "c", "d"], [*made.tokens, ("v",)])
    found, told = extended_rows(known, longer, np.concatenate([texts, np.zeros((1, 2), np.float32)]), 2.0, 0)
    assert found["input"].dtype == torch.bfloat16
    for number, token in enumerate(longer.vocabulary):
        if token in made.vocabulary:
            assert torch.equal(found["input"][number], rows["input"][list(made.vocabulary).index(token)])
        else:  # Without text: the mean of the others, each as often as it was trained.
            weights = known.events[known.told]
            mean = weights @ rows["input"].float().numpy()[known.told] / weights.sum()
            np.testing.assert_allclose(found["input"][number].float(), mean, rtol=0.01)
    assert (told["new_tokens"], told["without_text"], told["input"]["fitted_on"]) == (1, 1, len(known.told))
    same, told = extended_rows(known, made, texts, 2.0, 0)
    assert torch.equal(same["input"], rows["input"])
    assert told == {"new_tokens": 0, "without_text": 0}


def test_predicted_rows_are_shown_as_often_as_trained_ones_and_the_model_is_left_as_it_was(workspace: Path) -> None:
    old = Adapter.load(workspace / "adapters/lora")
    data = genrec.Dataset.load(workspace / "data/tiny")
    split, tokens = data.split(), old.tokenization()
    model, ids = old.model(tokens), adapters.identifier_ids(tokens)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = features.unit(features.text_vectors(features.text(data.items), 8))
    known = TrainedTokens.of(old.identifiers, adapters.rows(model, ids), texts, split.train)
    assert known.events.sum() == sum(map(len, split.train))
    recipe = from_table(Recipe, old.manifest["recipe"], "x")
    cases = ValidationSet.draw(recipe, split, tokens, old.prompt, data.user_rows, exclude_seen=True)
    engine = LocalEngine(model)

    def lists() -> np.ndarray:
        return engine.beam_search(cases.prompts, cases.trie, 24, blocked=cases.blocked).items[:, :10]

    found = matched_scale(known, model, ids, lists, 5, 0)
    assert abs(found["shown"] - found["shown_trained"]) < 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
