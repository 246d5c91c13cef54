"""The Python API: an adapter, an engine, and histories in; items with titles and scores out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from genrec.adapter import Adapter
from genrec.config import suggestion
from genrec.decoding import Beams, Trie
from genrec.engines import Engine
from genrec.errors import ConfigError, UnknownIdError

History = Sequence[str]


@dataclass(frozen=True)
class Recommendation:
    """One item of a list: ``rank`` from 1, and ``score``, the log-probability of the item's identifier."""

    rank: int
    item_id: str
    title: str
    score: float


class Recommender:
    """A loaded adapter that answers.

    Attributes:
        adapter: What was loaded.
        engine: What runs the model.
        tokenization: What makes prompts.
        trie: The legal identifiers.
        exclude_seen: Whether items of a history are left out of its list, unless a call says otherwise; as the
            data set that the adapter was trained on says.
    """

    def __init__(self, adapter: Adapter, engine: Engine) -> None:
        self.adapter = adapter
        self.engine = engine
        self.tokenization = adapter.tokenization()
        self.trie = Trie.build(self.tokenization.tokens)
        self.exclude_seen = bool(adapter.manifest["data"]["manifest"]["exclude_seen"])
        self.item_ids = list(adapter.identifiers.item_ids)
        self._index = {item_id: index for index, item_id in enumerate(self.item_ids)}
        self.titles = adapter.items["title"].to_list()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        engine: Literal["local", "dummy"] = "local",
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> Recommender:
        """Load an adapter folder.

        Args:
            path: The adapter's folder.
            engine: ``local`` runs the model; ``dummy`` runs none and returns pseudo-random items, for trying a job.
            device: Where the model runs, as PyTorch names it.
            dtype: Of the weights.

        Raises:
            AdapterError: The folder is no adapter, was changed since training, or its base is missing.
            ConfigError: An unknown engine or device.
        """
        adapter = Adapter.load(path)
        if engine == "dummy":
            from genrec.engines.dummy import DummyEngine

            return cls(adapter, DummyEngine(len(adapter.tokenization().tokenizer)))
        if engine != "local":
            raise ConfigError(f"engine is {engine!r}. {suggestion(engine, ('local', 'dummy'))}")
        import torch

        from genrec.engines.local import LocalEngine

        try:
            model: Any = adapter.model(adapter.tokenization(), dtype=getattr(torch, dtype)).to(device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device is {device!r}, and PyTorch refused it: {error}") from error
        return cls(adapter, LocalEngine(model))

    def indices(self, items: History) -> np.ndarray:
        """Item ids -> int32 item indices.

        Raises:
            UnknownIdError: An item that the adapter does not know, with the closest one that it does.
        """
        try:
            return np.array([self._index[item] for item in items], dtype=np.int32)
        except KeyError:
            unknown = next(item for item in items if item not in self._index)
            close = suggestion(str(unknown), self.item_ids) if len(self.item_ids) <= 50_000 else ""
            hint = close if close.startswith("Did") else "The adapter knows the items that it was trained with."
            raise UnknownIdError(f"item {unknown!r} is not in the catalogue of {self.adapter.path}. {hint}") from None

    def _prompts(self, histories: Sequence[np.ndarray], users: Sequence[Mapping[str, Any] | None] | None) -> list[Any]:
        told: Sequence[Mapping[str, Any] | None] = users if users is not None else [None] * len(histories)
        if len(told) != len(histories):
            raise ConfigError(f"{len(histories)} histories and {len(told)} users were given; one user per history.")
        prompt = self.adapter.prompt
        return [
            self.tokenization.sequence(prompt, history, user) for history, user in zip(histories, told, strict=True)
        ]

    def search(
        self,
        histories: Sequence[np.ndarray],
        k: int,
        *,
        num_beams: int | None = None,
        exclude_seen: bool | None = None,
        users: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Beams:
        """``recommend`` on item indices and arrays: the best ``k`` of each history. Arguments as there."""
        if k < 1:
            raise ConfigError(f"k is {k}. It is at least 1.")
        beams = max(50, 2 * k) if num_beams is None else num_beams
        if beams < k:
            raise ConfigError(f"num_beams is {beams}, below k, which is {k}. Leave it out, or raise it.")
        seen = self.exclude_seen if exclude_seen is None else exclude_seen
        blocked = [np.unique(history) for history in histories] if seen else None
        found = self.engine.beam_search(self._prompts(histories, users), self.trie, beams, blocked=blocked)
        return Beams(found.items[:, :k], found.scores[:, :k], found.reasons)

    def recommend(
        self,
        histories: Sequence[History],
        k: int = 10,
        *,
        num_beams: int | None = None,
        exclude_seen: bool | None = None,
        users: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> list[list[Recommendation]]:
        """The best ``k`` items for each history, best first; fewer where fewer are allowed.

        Args:
            histories: Item ids, oldest first. An empty history is answered by the prompt's head.
            k: Items per history.
            num_beams: Beams of the search; unset: ``max(50, 2 * k)``. Atomic identifiers are exact with any number.
            exclude_seen: Leave out the items of the history; unset: as the data set says.
            users: Per history the columns of the users table that the prompt's head may read.

        Raises:
            UnknownIdError: An item that the adapter does not know.
            ConfigError: ``k`` or ``num_beams`` out of range.
        """
        if isinstance(histories, str) or any(isinstance(history, str) for history in histories):
            raise ConfigError("recommend takes a list of histories, each a list of item ids: recommend([[id, id]]).")
        found = self.search(
            [self.indices(history) for history in histories],
            k, num_beams=num_beams, exclude_seen=exclude_seen, users=users,
        )  # fmt: skip
        return [
            [
                Recommendation(rank, self.item_ids[item], self.titles[item], float(score))
                for rank, (item, score) in enumerate(zip(items, scores, strict=True), start=1)
                if item >= 0
            ]
            for items, scores in zip(found.items.tolist(), found.scores.tolist(), strict=True)
        ]

    def score(self, history: History, items: History, *, user: Mapping[str, Any] | None = None) -> np.ndarray:
        """float64 [items]: the score that ``recommend`` would give each of ``items`` after ``history``."""
        asked = self._prompts([self.indices(history)], [user])[0]
        answers = [self.tokenization.identifier(int(item)) for item in self.indices(items)]
        return self.engine.score([asked] * len(answers), answers)

    def prompt(self, history: History, *, user: Mapping[str, Any] | None = None) -> str:
        """The prompt of a history as the model reads it: its tokens, spelled."""
        return str(self.tokenization.tokenizer.decode(self._prompts([self.indices(history)], [user])[0]))
