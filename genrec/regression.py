"""The rows of new identifier tokens: predicted from text, by a ridge regression from the texts of the tokens that were
trained to their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from genrec import adapter as adapters
from genrec import features
from genrec.identifiers import Identifiers

_RIDGES = tuple(10.0**power for power in range(-3, 4))  # Of the regression, times the mean variance of a dimension.
_FOLDS = 5
_LEAST = 5  # Tokens whose rows are predicted to find the scale, at least; 4 times as many must be trained.


@dataclass(frozen=True, eq=False)
class RowMap:
    """What makes an embedding row of a text vector: ``level + (text - middle) @ slope``.

    Attributes:
        middle: float64 [d].
        level: float64 [width], the mean row, which a text without any known word gets.
        slope: float64 [d, width]; zero where texts tell nothing of rows.
        told: ``ridge``; ``explained``, the share of the variance of held-out rows that the map explains (0: no more
            than the mean row); and ``fitted_on``, the number of tokens.
    """

    middle: NDArray[np.float64]
    level: NDArray[np.float64]
    slope: NDArray[np.float64]
    told: dict[str, float]

    @classmethod
    def fit(cls, texts: NDArray[Any], rows: NDArray[Any], weights: NDArray[Any], seed: int = 0) -> RowMap:
        """Ridge regression; its strength is the one with the least squared error on held-out tokens, in folds.

        Args:
            texts: float [n, d], n at least 1.
            rows: float [n, width].
            weights: float [n], above 0: how much a token counts.
            seed: Of the folds.
        """
        x, y, w = (np.asarray(values, dtype=np.float64) for values in (texts, rows, weights))
        fold = np.random.default_rng([seed, 5]).permutation(len(x)) % _FOLDS
        errors, variance = np.zeros(len(_RIDGES)), 0.0
        for held in range(_FOLDS if len(x) >= 2 * _FOLDS else 0):
            out = fold == held
            middle, level, slopes = _ridges(x[~out], y[~out], w[~out])
            variance += float(w[out] @ ((y[out] - level) ** 2).sum(axis=1))
            for place, slope in enumerate(slopes):
                errors[place] += float(w[out] @ ((y[out] - level - (x[out] - middle) @ slope) ** 2).sum(axis=1))
        best = int(errors.argmin())
        explained = max(1 - float(errors[best]) / variance, 0.0) if variance else 0.0
        middle, level, slopes = _ridges(x, y, w)
        slope = slopes[best] if explained > 0 else np.zeros_like(slopes[best])
        return cls(middle, level, slope, {"ridge": _RIDGES[best], "explained": explained, "fitted_on": len(x)})

    def rows(self, texts: NDArray[Any], scale: float = 1.0) -> NDArray[np.float32]:
        """float32 [m, width]: the rows of texts float [m, d], ``scale`` times as far from the mean row."""
        known = np.abs(texts).sum(axis=1) > 0
        return (self.level + scale * known[:, None] * ((texts - self.middle) @ self.slope)).astype(np.float32)


def _ridges(
    x: NDArray[np.float64], y: NDArray[np.float64], w: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[NDArray[np.float64]]]:
    """Weighted means of x and y, and the slope of every strength."""
    share = w / w.sum()
    middle, level = share @ x, share @ y
    left = (x - middle) * share[:, None]
    values, vectors = np.linalg.eigh(left.T @ (x - middle))
    right = vectors.T @ (left.T @ (y - level))
    scale = max(float(values.mean()), 1e-12)
    return middle, level, [vectors @ (right / (np.maximum(values, 0) + ridge * scale)[:, None]) for ridge in _RIDGES]


@dataclass(frozen=True, eq=False)
class TrainedTokens:
    """The identifier tokens of an adapter, in the order of their vocabulary.

    Attributes:
        vocabulary: Their names.
        rows: As ``adapter.rows`` gives them: ``input`` and, where the head is not tied, ``output``.
        texts: float32 [tokens, d], their text vectors, zero where nothing is known.
        events: int64 [tokens], how many training events each was trained by.
    """

    vocabulary: Sequence[str]
    rows: Mapping[str, torch.Tensor]
    texts: NDArray[np.float32]
    events: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        identifiers: Identifiers,
        rows: Mapping[str, torch.Tensor],
        texts: NDArray[np.float32],
        train: Sequence[np.ndarray],
    ) -> TrainedTokens:
        """Those of ``identifiers``, with text vectors float32 [items, d] and the training histories."""
        counts = features.counts(train, len(identifiers.item_ids))
        place = {token: number for number, token in enumerate(identifiers.vocabulary)}
        events = np.zeros(len(place), dtype=np.int64)
        for tokens, count in zip(identifiers.tokens, counts.tolist(), strict=True):
            for token in set(tokens) & place.keys():
                events[place[token]] += count
        return cls(identifiers.vocabulary, rows, identifiers.token_vectors(texts), events)

    @property
    def told(self) -> NDArray[np.int64]:
        """Numbers of the tokens that a map of texts to rows is fitted on: trained, and with a text."""
        return np.flatnonzero((self.events > 0) & (np.abs(self.texts).sum(axis=1) > 0))

    @property
    def enough(self) -> bool:
        """Whether ``matched_scale`` has tokens to find a scale with."""
        return len(self.told) >= 4 * _LEAST

    def maps(self, tokens: NDArray[np.int64], seed: int) -> dict[str, RowMap]:
        """Maps fitted on some of the tokens, each as often as it was trained; without any, the mean of all rows."""
        texts, weights = self.texts[tokens], self.events[tokens]
        if not len(tokens):
            tokens, texts, weights = np.arange(len(self.texts)), self.texts, np.ones(len(self.texts), dtype=np.int64)
        return {
            key: RowMap.fit(texts, values.float().numpy()[tokens], weights, seed) for key, values in self.rows.items()
        }


def matched_scale(
    known: TrainedTokens,
    model: PreTrainedModel,
    ids: torch.Tensor,
    lists: Callable[[], NDArray[np.int32]],
    count: int,
    seed: int,
) -> dict[str, float]:
    """How far from the mean row predicted rows must lie for new items to be shown as often as old ones are.

    A regression shrinks, so that its rows lose against trained ones. Some old items get predicted rows in the place of
    their own, and the scale is the one with which they fill as many places of lists as they do with those.

    Args:
        known: Tokens of atomic identifiers, so that a token's number is its item's; ``enough`` of them.
        model: Theirs; its rows are the old ones again afterwards.
        ids: int64 [tokens], their token ids.
        lists: Gives the model's lists of some validation cases, int32 [cases, k].
        count: Items that are new.
        seed: Of drawing the items.

    Returns:
        ``scale``, and the shares of places: ``shown`` of items with predicted rows, ``shown_trained`` of the same ones.
    """
    told = known.told
    rng = np.random.default_rng([seed, 7])
    held = np.sort(rng.choice(told, min(max(count, _LEAST), len(told) // 4), replace=False))
    maps = known.maps(np.setdiff1d(told, held), seed)
    chosen = ids[torch.from_numpy(held)]

    def shown() -> float:
        return float(np.isin(lists(), held).mean())

    natural, low, high, found = shown(), 0.5, 8.0, 0.0
    for _ in range(6):
        scale = (low * high) ** 0.5
        rows = {key: torch.from_numpy(map_.rows(known.texts[held], scale)) for key, map_ in maps.items()}
        adapters.set_rows(model, chosen, rows)
        found = shown()
        low, high = (scale, high) if found < natural else (low, scale)
    adapters.set_rows(model, chosen, {key: values[held] for key, values in known.rows.items()})
    return {"scale": scale, "shown": found, "shown_trained": natural}


def extended_rows(
    known: TrainedTokens, identifiers: Identifiers, texts: NDArray[np.float32], scale: float, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The rows of all identifier tokens: those that are known, and those of new tokens predicted from text.

    Args:
        known: The tokens of an adapter.
        identifiers: Its identifiers, extended.
        texts: float32 [items, d], text vectors of the items of ``identifiers``; zero where there is no text.
        scale: See ``RowMap.rows``.
        seed: Of the folds.

    Returns:
        ``input`` and, where the head is not tied, ``output``: float [vocabulary, width]; and what to tell of it.
    """
    place = {token: number for number, token in enumerate(known.vocabulary)}
    new = [number for number, token in enumerate(identifiers.vocabulary) if token not in place]
    stay = [number for number, token in enumerate(identifiers.vocabulary) if token in place]
    order = [place[identifiers.vocabulary[number]] for number in stay]
    wanted = identifiers.token_vectors(texts)[new]
    maps = known.maps(known.told, seed) if new else {}
    result = {}
    for key, values in known.rows.items():
        rows = torch.empty((len(identifiers.vocabulary), values.shape[1]), dtype=values.dtype)
        rows[stay] = values[order]
        if new:
            rows[new] = torch.from_numpy(maps[key].rows(wanted, scale)).to(values.dtype)
        result[key] = rows
    told = {key: map_.told for key, map_ in maps.items()}
    return result, {"new_tokens": len(new), "without_text": int((np.abs(wanted).sum(axis=1) == 0).sum()), **told}
