"""SASRec (Kang and McAuley, 2018, ICDM): a causal transformer over item rows, a baseline without a language model.

Torch is imported when a model is fitted, so that the other baselines do without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genrec import features
from genrec.errors import ConfigError
from genrec.progress import bar

if TYPE_CHECKING:
    import torch

    Weights = dict[str, torch.Tensor]

Histories = Sequence[NDArray[np.integer]]
LOSSES = ("sampled", "full")
ROWS = ("random", "features")


class SASRec:
    """Self-attentive sequential recommendation with cross-entropy at every position and tied item rows.

    The state s_t after the items h_1 ... h_t is the last layer norm's output of ``blocks`` pre-norm blocks of causal
    self-attention over rows and learned positions; the score of item i is ``s_t . row(i)``. Positions count from the
    last item of the window, as left padding does in the original. A history is scored from its last ``window`` items,
    an empty one by popularity. Training histories that are longer are cut into pieces, so that every event but the
    first is a target once an epoch.

    Args:
        width: Of rows and states; a multiple of ``heads``.
        blocks: Of attention and feed-forward layers (inner width ``width``, ReLU), >= 1.
        heads: Of attention.
        dropout: On the sum of rows and positions, attention weights and the output of every layer, from 0 to below 1.
        loss: ``"full"``, cross-entropy over the catalogue, or ``"sampled"``, over the target and ``negatives`` items.
        negatives: Items drawn for each batch and shared by its positions; with as many as the catalogue holds or more,
            sampled equals full. One that is a position's target is no negative there.
        popular: Negatives are drawn in proportion to ``count ** popular`` of their training interactions; 0 is uniform
            and without replacement. Scores of targets and negatives are lowered by the logarithm of their expected
            number of draws (Bengio and Senécal, 2008), which for uniform draws changes nothing.
        window: Items that are looked at, >= 1.
        batch: Histories a step.
        learning_rate: Of Adam, betas .9 and .98, constant.
        epochs: Passes over the training histories; ``tune`` finds it.
        seed: Of initial weights, order, dropout and negatives. With the same number of threads on the same machine the
            same seed gives the same weights.
        rows: What item rows start from: ``"random"``, normal with standard deviation ``DEVIATION``, or ``"features"``,
            a random projection of ``features.item_vectors`` (text and training histories) to rows of length 1 in the
            root mean square, from which to learn is faster than from short ones. They are trained in either case.

    Best NDCG@10 on validation, measured as for ``ItemKNN``, with the default options but for those named:

    ==============  ===========  ===========  =====================
    dropout                 0.2          0.5  0.5, ``loss="full"``
    ==============  ===========  ===========  =====================
    Beauty                .0610        .0626
    Scientific            .0772        .0804                  .0816
    ==============  ===========  ===========  =====================

    MovieLens-100K has .1150 with dropout 0.2 after 32 epochs.
    """

    # Items with few interactions keep much of what they were drawn with, and a larger start drowns what they learn:
    # rows of length 1 (0.125 for 64 wide) have .0742 NDCG@10 on validation of Scientific with dropout .2, 0.02 .0772.
    DEVIATION: ClassVar[float] = 0.02
    GRID: ClassVar[Sequence[dict[str, Any]]] = (
        {"epochs": 100},
        {"epochs": 100, "dropout": 0.2},
        {"epochs": 100, "blocks": 2, "heads": 2},
        {"epochs": 100, "dropout": 0.2, "batch": 32, "window": 100},
    )

    def __init__(
        self,
        *,
        width: int = 64,
        blocks: int = 1,
        heads: int = 1,
        dropout: float = 0.5,
        loss: str = "sampled",
        negatives: int = 512,
        popular: float = 0.0,
        window: int = 50,
        batch: int = 128,
        learning_rate: float = 1e-3,
        epochs: int = 30,
        seed: int = 0,
        rows: str = "random",
    ) -> None:
        if loss not in LOSSES or rows not in ROWS:
            raise ConfigError(
                f"SASRec needs a loss out of {', '.join(LOSSES)} and rows out of {', '.join(ROWS)}, "
                f"found {loss!r} and {rows!r}. The defaults are the first of each."
            )
        counts = {"blocks": blocks, "heads": heads, "negatives": negatives, "window": window, "batch": batch}
        for name, value in {"width": width, **counts, "epochs": epochs}.items():
            if value < 1:
                raise ConfigError(f"SASRec: {name} must be at least 1, found {value}. Leave it out for the default.")
        if width % heads:
            raise ConfigError(f"SASRec: width {width} is no multiple of heads {heads}. The usual ones are 64 and 1.")
        if not 0 <= dropout < 1 or not learning_rate > 0 or not popular >= 0:
            raise ConfigError(
                "SASRec needs 0 <= dropout < 1, learning_rate > 0 and popular >= 0, "
                f"found {dropout}, {learning_rate} and {popular}. The usual values are 0.5, 0.001 and 0."
            )
        self.width, self.blocks, self.heads, self.dropout = width, blocks, heads, dropout
        self.loss, self.negatives, self.popular = loss, negatives, popular
        self.window, self.batch, self.learning_rate, self.epochs = window, batch, learning_rate, epochs
        self.seed, self.rows = seed, rows

    @property
    def parameters(self) -> dict[str, Any]:
        names = ("width", "blocks", "heads", "dropout", "loss", "negatives", "popular", "window", "batch")
        return {name: getattr(self, name) for name in (*names, "learning_rate", "epochs", "seed", "rows")}

    def fit(
        self,
        train: Histories,
        items: pl.DataFrame,
        validate: Callable[[Self], float] | None = None,
        *,
        every: int = 4,
        patience: int = 3,
        title: str = "SASRec",
    ) -> Self:
        """Train for ``epochs``; with ``validate`` until it stops rising.

        Args:
            train: One history per user.
            items: The catalogue.
            validate: How good the scores are, larger is better. Called after every ``every`` epochs; training stops
                when ``patience`` calls have brought nothing better. The weights of the best call stay and ``epochs``
                becomes their epoch, so that a fit with ``parameters`` alone gives the same weights.
            title: Of the progress bar.
        """
        import torch

        n_items = items.height
        counts = features.counts(train, n_items)
        self._popularity = counts.astype(np.float32)
        table, lengths = pieces(train, self.window + 1)
        rng = np.random.default_rng(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            weights = self._weights = self._initial(train, items)
            if not len(table):
                return self
            chance = counts.astype(np.float64) ** self.popular if self.popular else None
            # An item without training interactions is drawn as if it had one: it has to be told from targets too.
            chance = None if chance is None else np.maximum(chance, 1) / np.maximum(chance, 1).sum()
            adam = torch.optim.Adam(weights.values(), lr=self.learning_rate, betas=(0.9, 0.98), fused=True)
            best, best_value, best_epoch = weights, -np.inf, 0
            with bar(title, -(-len(table) // self.batch) * self.epochs) as advance:
                for epoch in range(1, self.epochs + 1):
                    order = rng.permutation(len(table))
                    for start in range(0, len(order), self.batch):
                        rows = order[start : start + self.batch]
                        loss = self._loss(weights, table[rows], lengths[rows], self._draw(rng, n_items, chance), chance)
                        adam.zero_grad()
                        loss.backward()
                        adam.step()
                        note = f"epoch {epoch}, loss {float(loss.detach()):.2f}"
                        advance(note=note if best_epoch == 0 else f"{note}, best {best_value:.4f} at {best_epoch}")
                    if validate is None or (epoch % every and epoch != self.epochs):
                        continue
                    value = validate(self)
                    if value > best_value:
                        best = {name: weight.detach().clone() for name, weight in weights.items()}
                        best_value, best_epoch = value, epoch
                    elif epoch >= best_epoch + every * patience:
                        break
        if validate is not None:
            self._weights, self.epochs = best, best_epoch
        return self

    def scores(self, histories: Histories) -> NDArray[np.float32]:
        import torch

        scores = np.tile(self._popularity, (len(histories), 1))
        some = np.array([len(history) > 0 for history in histories], dtype=bool)
        if some.any():
            table, lengths = pad([history[-self.window :] for history in histories if len(history)])
            with torch.no_grad():
                rows = self._weights["rows"][torch.from_numpy(table)]
                states = self._states(self._weights, rows, lengths, dropout=0.0)
                last = states[torch.arange(len(table)), torch.from_numpy(lengths - 1)]
                scores[some] = (last @ self._weights["rows"].T).numpy()
        return scores

    def _initial(self, train: Histories, items: pl.DataFrame) -> Weights:
        """Rows, positions and the matrices of the blocks. Matrices are drawn as ``torch.nn.Linear`` draws them."""
        import torch

        d = self.width
        rows = torch.randn(items.height, d) * self.DEVIATION
        if self.rows == "features":
            vectors = torch.from_numpy(features.item_vectors(items, train, seed=self.seed).vectors)
            projected = vectors @ torch.randn(vectors.shape[1], d)
            # Items without text and interactions have no vector, and keep the row drawn for them.
            known = projected.abs().sum(dim=1) > 0
            rows[known] = projected[known] * d**-0.5 / projected[known].std() if known.any() else rows[known]
        weights = {"rows": rows, "positions": torch.randn(self.window, d) * self.DEVIATION, "final.norm": _norm(d)}
        for block in range(self.blocks):
            for name, outputs in (("attention", 3 * d), ("mix", d), ("inner", d), ("outer", d)):
                weights[f"{block}.{name}"] = (torch.rand(outputs, d) * 2 - 1) * d**-0.5
                weights[f"{block}.{name}.bias"] = torch.zeros(outputs)
            weights |= {f"{block}.attention.norm": _norm(d), f"{block}.inner.norm": _norm(d)}
        return {name: weight.requires_grad_() for name, weight in weights.items()}

    def _states(self, weights: Weights, rows: torch.Tensor, lengths: NDArray[np.int64], dropout: float) -> torch.Tensor:
        """States after every item: float32 [n, m, width] of the items' rows, of the same shape and padded at the end.

        Those of padding mean nothing, and no real position looks there, so that attention needs the causal mask alone.
        """
        import torch
        from torch.nn import functional as F

        def drop(part: torch.Tensor) -> torch.Tensor:
            return F.dropout(part, dropout) if dropout else part  # No random number is spent on scoring.

        def linear(part: torch.Tensor, name: str) -> torch.Tensor:
            return F.linear(part, weights[name], weights[f"{name}.bias"])

        def normed(part: torch.Tensor, name: str) -> torch.Tensor:
            return F.layer_norm(part, (d,), *weights[f"{name}.norm"])

        n, m, d = rows.shape
        ages = np.maximum(lengths[:, None] - 1 - np.arange(m), 0)
        state = drop(rows * d**0.5 + weights["positions"][torch.from_numpy(ages)])
        for block in range(self.blocks):
            mixed = linear(normed(state, f"{block}.attention"), f"{block}.attention")
            query, key, value = mixed.view(n, m, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
            state = state + drop(linear(seen.transpose(1, 2).reshape(n, m, d), f"{block}.mix"))
            inner = drop(F.relu(linear(normed(state, f"{block}.inner"), f"{block}.inner")))
            state = state + drop(linear(inner, f"{block}.outer"))
        return normed(state, "final")

    def _draw(
        self, rng: np.random.Generator, n_items: int, chance: NDArray[np.float64] | None
    ) -> NDArray[np.int64] | None:
        """The negatives of one batch; None where every item is one."""
        if self.loss == "full" or (self.negatives >= n_items and chance is None):
            return None
        return rng.choice(n_items, size=self.negatives, replace=chance is not None, p=chance)

    def _loss(
        self,
        weights: Weights,
        table: NDArray[np.int64],
        lengths: NDArray[np.int64],
        negatives: NDArray[np.int64] | None,
        chance: NDArray[np.float64] | None = None,
    ) -> torch.Tensor:
        """Mean cross-entropy over the targets of a batch of pieces, each of at least two events."""
        import torch
        from torch.nn import functional as F

        # Pieces of like length go through the blocks together, so that a short one is not padded to the longest. Which
        # ones make a step is left to chance all the same.
        level = np.ceil(np.log2(np.maximum(lengths - 1, 4))).astype(np.int64)
        groups = [np.flatnonzero(level == size) for size in np.unique(level)]
        own = [lengths[group] - 1 for group in groups]
        inputs = [table[group, : count.max()] for group, count in zip(groups, own, strict=True)]
        real = [np.arange(part.shape[1]) < count[:, None] for part, count in zip(inputs, own, strict=True)]
        after = [table[group, 1 : count.max() + 1] for group, count in zip(groups, own, strict=True)]
        targets = np.concatenate([part[mask] for part, mask in zip(after, real, strict=True)])
        # Every row that the step needs is looked up at once: each look-up has a gradient as large as the catalogue.
        drawn = np.empty(0, np.int64) if negatives is None else negatives
        asked = [*(part.ravel() for part in inputs), targets, drawn]
        looked_up = F.embedding(torch.from_numpy(np.concatenate(asked)), weights["rows"])
        *given, right, wrong = looked_up.split([len(part) for part in asked])
        states = torch.cat(
            [
                self._states(weights, rows.view(*part.shape, -1), count, self.dropout)[torch.from_numpy(mask)]
                for rows, part, count, mask in zip(given, inputs, own, real, strict=True)
            ]
        )
        wanted = torch.from_numpy(targets)
        if negatives is None:
            return F.cross_entropy(states @ weights["rows"].T, wanted)
        right, wrong = (states * right).sum(dim=1), states @ wrong.T
        if chance is not None:
            log_chance = torch.from_numpy(np.log(chance * len(negatives)).astype(np.float32))
            right, wrong = right - log_chance[wanted], wrong - log_chance[torch.from_numpy(drawn)]
        wrong = wrong.masked_fill(wanted[:, None] == torch.from_numpy(drawn), -torch.inf)
        return (torch.logsumexp(torch.cat([right[:, None], wrong], dim=1), dim=1) - right).mean()


class SASRecText(SASRec):
    """SASRec whose item rows start from text and collaborative features, which plain SASRec does not see."""

    def __init__(self, *, rows: str = "features", epochs: int = 12, **options: Any) -> None:
        super().__init__(rows=rows, epochs=epochs, **options)


def pad(histories: Histories) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Histories as one table, int64 [n, longest] padded with 0 at the end, and their lengths, int64 [n]."""
    lengths = np.fromiter((len(history) for history in histories), dtype=np.int64, count=len(histories))
    table = np.zeros((len(histories), int(lengths.max(initial=0))), dtype=np.int64)
    table[np.arange(table.shape[1]) < lengths[:, None]] = np.concatenate([np.empty(0, np.int64), *histories])
    return table, lengths


def pieces(histories: Histories, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Histories cut from their end into pieces of at most ``size`` events, where a piece begins with the last event of
    the one before: every event but a history's first is once not the first of its piece. Those of one event are left
    out.

    Returns:
        As ``pad``; every length is from 2 to ``size``, which is >= 2.
    """
    cut = [history[max(0, stop - size) : stop] for history in histories for stop in range(len(history), 1, 1 - size)]
    return pad(cut)


def _norm(width: int) -> torch.Tensor:
    """Gain and bias of a layer norm."""
    import torch

    return torch.stack([torch.ones(width), torch.zeros(width)])
