"""The cases that decide which weights are kept: asked by training as it runs, and by an export once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genrec import metrics
from genrec.config import Recipe
from genrec.decoding import Trie
from genrec.engines import Engine
from genrec.prompts import Prompt
from genrec.splits import Split, contexts
from genrec.tokenization import Tokenization

BEAMS = 20


@dataclass(frozen=True, eq=False)
class ValidationSet:
    """Validation cases as an engine is asked them.

    Attributes:
        prompts: Token ids of each case's prompt, int arrays.
        targets: int32 [cases], the item that came next.
        blocked: Items that each list leaves out, or None.
        trie: The legal identifiers.
    """

    prompts: list[Any]
    targets: NDArray[np.int32]
    blocked: list[NDArray[Any]] | None
    trie: Trie

    @classmethod
    def draw(
        cls,
        recipe: Recipe,
        split: Split,
        tokenization: Tokenization,
        prompt: Prompt,
        users: Sequence[Mapping[str, Any] | None] | None,
        *,
        exclude_seen: bool,
    ) -> ValidationSet:
        """The cases that a recipe validates on: the same ones whenever recipe and split are the same.

        Args:
            recipe: Its ``validation.users`` says how many, its ``seed`` which.
            split: What the cases are drawn from.
            tokenization, prompt: What makes the prompts.
            users: Per user of the data set the columns that the prompt's head may read, or None.
            exclude_seen: Whether items of the history are left out of every list.
        """
        chosen = split.valid.draw(recipe.validation.users, [recipe.seed, 3])
        histories = [split.valid.histories[case] for case in chosen]
        who = [users[split.valid.users[case]] if users is not None else None for case in chosen]
        told = contexts(split.valid_events[chosen]).to_dicts() if prompt.reads["context"] else None
        return cls(
            tokenization.sequences(prompt, histories, who, told),
            split.valid.targets[chosen],
            histories if exclude_seen else None,
            Trie.build(tokenization.tokens),
        )

    def ranks(self, engine: Engine) -> NDArray[np.int32]:
        """int32 [cases]: the place of each target in its list, from 1; 0 where it is not in it."""
        found = engine.beam_search(self.prompts, self.trie, min(BEAMS, self.trie.n_items), blocked=self.blocked).items
        return metrics.ranks(found, self.targets)

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """``ndcg@10`` and ``recall@10`` of an engine, means over the cases."""
        place = self.ranks(engine)
        return {f"{name}@10": float(metrics.METRICS[name](place, 10).mean()) for name in ("ndcg", "recall")}
