from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genrec import features, progress
from genrec.errors import ConfigError
from genrec.sasrec import SASRec, SASRecText, pad, pieces

N = 12
ITEMS = pl.DataFrame({"item_id": [f"i{n}" for n in range(N)], "title": [f"word{n % 4} other{n % 3}" for n in range(N)]})
CYCLE = [(np.arange(length) + start) % N for start in range(N) for length in (3, 6, 11)]
SMALL: dict[str, Any] = {"width": 16, "window": 8, "batch": 8, "negatives": 5, "epochs": 3}


def states_of(fitted: SASRec, table: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
    return fitted._states(fitted._weights, fitted._weights["rows"][torch.from_numpy(table)], lengths, 0.0)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    progress.quiet, before = True, progress.quiet
    yield
    progress.quiet = before


@pytest.mark.parametrize(
    "options", [{"loss": "full"}, {"popular": 0.5}, {"blocks": 2, "heads": 2}, {"rows": "features"}]
)
def test_a_planted_cycle_is_learned(options: dict[str, Any]) -> None:
    fitted = SASRec(**{**SMALL, "batch": 36, "epochs": 60, "learning_rate": 0.03, "dropout": 0.1, **options}).fit(
        CYCLE, ITEMS
    )
    asked = [(np.arange(length) + start) % N for start in range(N) for length in (1, 4, 10)]
    assert fitted.scores(asked).argmax(axis=1).tolist() == [(int(h[-1]) + 1) % N for h in asked]


@pytest.mark.parametrize("blocks", [1, 2])
def test_no_state_sees_what_comes_later(blocks: int) -> None:
    fitted = SASRec(**SMALL, blocks=blocks).fit(CYCLE, ITEMS)
    rng = np.random.default_rng(0)
    table = rng.integers(N, size=(5, 7))
    lengths = np.full(5, 7)
    with torch.no_grad():
        before = states_of(fitted, table, lengths)
        table[:, 4] = (table[:, 4] + 1) % N
        after = states_of(fitted, table, lengths)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_padding_changes_no_score() -> None:
    fitted = SASRec(**SMALL, blocks=2).fit(CYCLE, ITEMS)
    asked = [np.array([3]), np.array([1, 5]), np.arange(12)]
    together = fitted.scores(asked)
    for row, one in zip(together, asked, strict=True):
        np.testing.assert_allclose(row, fitted.scores([one])[0], rtol=1e-4, atol=1e-5)
    # The items before the window are not looked at.
    np.testing.assert_allclose(together[2], fitted.scores([np.arange(4, 12)])[0], rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_every_position() -> None:
    """Batched by length and padded, the loss is the mean over all positions of what each piece has by itself."""
    fitted = SASRec(**{**SMALL, "window": 20}, dropout=0.0, loss="full").fit(CYCLE, ITEMS)
    rng = np.random.default_rng(1)
    log = [rng.integers(N, size=size) for size in (2, 3, 5, 6, 12, 21)]
    total, count = 0.0, 0
    for h in log:
        with torch.no_grad():
            states = states_of(fitted, h[None, :-1], np.array([len(h) - 1]))[0]
            chances = torch.log_softmax(states @ fitted._weights["rows"].T, dim=1)
        total -= float(chances[torch.arange(len(h) - 1), torch.from_numpy(h[1:])].sum())
        count += len(h) - 1
    assert fitted._loss(fitted._weights, *pad(log), None).item() == pytest.approx(total / count, rel=1e-5)


def test_all_items_as_negatives_are_the_full_loss() -> None:
    fitted = SASRec(**SMALL, dropout=0.0).fit(CYCLE, ITEMS)
    table, lengths = pad(CYCLE)
    full = fitted._loss(fitted._weights, table[:, :9], np.minimum(lengths, 9), None)
    sampled = fitted._loss(fitted._weights, table[:, :9], np.minimum(lengths, 9), np.arange(N)[::-1].copy())
    assert sampled.item() == pytest.approx(full.item(), rel=1e-5)
    # Fitting with as many negatives as items is fitting with the full loss.
    asked = [np.array([1, 2])]
    options = {**SMALL, "negatives": N}
    full_scores = SASRec(**{**options, "loss": "full"}).fit(CYCLE, ITEMS).scores(asked)
    np.testing.assert_array_equal(SASRec(**options).fit(CYCLE, ITEMS).scores(asked), full_scores)


def test_popular_negatives_are_corrected_by_their_chance() -> None:
    fitted = SASRec(**SMALL, dropout=0.0, popular=1.0).fit(CYCLE, ITEMS)
    chance = np.arange(1, N + 1) / (N * (N + 1) / 2)
    h = np.array([[4, 7]])
    drawn = np.array([2, 7, 9, 2])
    with torch.no_grad():
        state = states_of(fitted, h[:, :1], np.array([1]))[0, 0]
        score = (fitted._weights["rows"] @ state).numpy().astype(np.float64) - np.log(4 * chance)
    expected = math.log(math.exp(score[7]) + 2 * math.exp(score[2]) + math.exp(score[9])) - score[7]
    assert fitted._loss(fitted._weights, h, np.array([2]), drawn, chance).item() == pytest.approx(expected, rel=1e-4)


def test_the_seed_decides() -> None:
    asked = [np.array([1, 2]), np.array([5])]
    before = torch.random.get_rng_state()
    first = SASRec(**SMALL).fit(CYCLE, ITEMS).scores(asked)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(77)
    np.testing.assert_array_equal(first, SASRec(**SMALL).fit(CYCLE, ITEMS).scores(asked))
    assert not np.allclose(first, SASRec(**SMALL, seed=1).fit(CYCLE, ITEMS).scores(asked))


def test_the_best_epoch_is_kept_and_repeated() -> None:
    asked = [np.array([1, 2]), np.array([5])]
    told = iter([0.1, 0.5, 0.4, 0.5, 0.3, 0.9])
    seen = []

    def validate(network: SASRec) -> float:
        seen.append(network.scores(asked))
        return next(told)

    fitted = SASRec(**{**SMALL, "epochs": 50}).fit(CYCLE, ITEMS, validate, every=2, patience=3)
    assert len(seen) == 5
    assert fitted.epochs == fitted.parameters["epochs"] == 4
    np.testing.assert_array_equal(fitted.scores(asked), seen[1])
    np.testing.assert_array_equal(SASRec(**fitted.parameters).fit(CYCLE, ITEMS).scores(asked), seen[1])


def test_rows_start_from_features() -> None:
    """Rows have the inner products of the features, up to scale and the noise of the projection, and the usual size."""
    rows = SASRecText(**{**SMALL, "width": 1024, "epochs": 1, "learning_rate": 1e-9}).fit(CYCLE, ITEMS)._weights["rows"]
    own = rows.detach().numpy() @ rows.detach().numpy().T
    vectors = features.item_vectors(ITEMS, CYCLE).vectors
    given = vectors @ vectors.T
    np.testing.assert_allclose(own / np.trace(own), given / np.trace(given), atol=0.015)
    assert rows.std().item() == pytest.approx(1024**-0.5, rel=0.02)
    assert SASRecText().parameters["rows"] == "features"
    assert SASRec().parameters["rows"] == "random"


def test_nothing_to_train_on_is_no_failure() -> None:
    for build in (SASRec, SASRecText):
        fitted = build(**SMALL).fit([np.array([3]), np.array([], dtype=np.int32)], ITEMS)
        assert fitted.scores([np.array([1]), np.array([], dtype=np.int32)]).shape == (2, N)


@given(st.lists(st.lists(st.integers(0, 9), max_size=15), max_size=5), st.integers(2, 6))
def test_pieces_hold_every_target_once(log: list[list[int]], size: int) -> None:
    table, lengths = pieces([np.array(h, dtype=np.int64) for h in log], size)
    assert len(table) == len(lengths)
    assert all(2 <= length <= size for length in lengths)
    targets = sorted(int(item) for row, length in zip(table, lengths, strict=True) for item in row[1:length])
    assert targets == sorted(item for h in log for item in h[1:])
    steps = sorted(pair for row, length in zip(table, lengths, strict=True) for pair in pairwise(row[:length]))
    assert steps == sorted(pair for h in log for pair in pairwise(h))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "bce"}, "a loss out of sampled, full"),
        ({"rows": "text"}, "rows out of random, features"),
        ({"blocks": 0}, "blocks must be at least 1, found 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"heads": 3}, "width 64 is no multiple of heads 3"),
        ({"dropout": 1.0}, "0 <= dropout < 1"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"popular": -1.0}, "popular >= 0"),
    ],
)
def test_bad_options_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SASRec(**wrong)
