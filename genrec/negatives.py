"""Sampled softmax: the loss of training over a part of the vocabulary, drawn anew at every step.

The normaliser of a target t over a vocabulary of V tokens, cut into the identifiers' tokens and all others, is
estimated from m of the V_s tokens of each part s, drawn evenly and without replacement, as in Jean et al. (2015, ACL):

    Z(t) = exp(l_t) + sum over s of (V_s - [t in s]) / (m_s - [t drawn]) * sum over the drawn j != t of exp(l_j)

which is right on average, and exactly the whole softmax where all tokens are drawn. Scores at inference are always
those of the whole softmax. The head of a small model over a large catalogue is most of a step: with a tenth of the
vocabulary a step on Amazon Beauty is 2.4 times faster.

An item that no training history holds says nothing by not following one: it may not have been there yet. So the tokens
of such items alone are no negatives of what followed in a history, and are as good as their walks and questions made
them. (In walks, and in variants of histories, which hold such items too, they are negatives like all others.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from genrec.rows import RowHead

OTHERS = 4  # One of so many is no identifier's token: what a catalogue model never writes it learns soon.


class Negatives:
    """Draws tokens, and makes the head of a model compute their logits and the target's alone.

    Args:
        identifiers: int64 [n], the identifiers' tokens.
        vocabulary: How many tokens there are.
        count: Tokens that are drawn; all of a part that has fewer than its share.
        unseen: int64 [u], those of the identifiers' tokens that only items without a training interaction have.
    """

    def __init__(self, identifiers: torch.Tensor, vocabulary: int, count: int, unseen: torch.Tensor) -> None:
        inside = torch.zeros(vocabulary, dtype=torch.bool)
        inside[identifiers.cpu()] = True
        self.parts = [inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]]
        self.part = (~inside).long()  # int64 [vocabulary], the part of each token.
        self.unseen = torch.zeros(vocabulary, dtype=torch.bool)
        self.unseen[unseen.cpu()] = True
        self.spared = [int(self.unseen[tokens].sum()) for tokens in self.parts]  # Unseen ones of each part.
        self.counts = [min(len(self.parts[0]), count - count // OTHERS), min(len(self.parts[1]), count // OTHERS)]

    def draw(self, device: torch.device) -> torch.Tensor:
        """int64 [m], distinct tokens, those of the identifiers first."""
        drawn = [tokens[torch.randperm(len(tokens))[:m]] for tokens, m in zip(self.parts, self.counts, strict=True)]
        return torch.cat(drawn).to(device)

    @contextmanager
    def on(
        self, head: Any, labels: torch.Tensor, mask: torch.Tensor, histories: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """While it is open, ``head`` gives [1, labelled, 1 + m]: the target's logit, then those of the drawn tokens.

        What a model does with logits after its head (a soft cap, a scale) acts on these as on all.

        Args:
            head: The output embedding, an ``nn.Linear`` or a ``RowHead``.
            labels: int64 [rows, positions], what comes next; read where ``mask`` is.
            mask: bool [rows, positions], what carries loss.
            histories: bool [rows], which rows tell what followed in a history.

        Yields:
            float32 [labelled, 1 + m], to be added to the logits; -inf for what is no negative of a target, itself too.
        """
        target, followed = labels[mask], histories[:, None].expand_as(mask)[mask]
        drawn = self.draw(target.device)
        held: list[torch.Tensor] = []

        def select(ids: torch.Tensor) -> torch.Tensor:
            return head.select(ids) if isinstance(head, RowHead) else head.weight[ids]

        def before(_: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            held.append(arguments[0][:, :-1][mask])
            return (arguments[0][:1, :1],)  # The head itself has next to nothing to do.

        def after(_: torch.nn.Module, __: Any, ___: torch.Tensor) -> torch.Tensor:
            hidden = held.pop()
            own, others = (hidden * select(target)).sum(dim=-1), hidden @ select(drawn).T
            if head.bias is not None:
                own, others = own + head.bias[target], others + head.bias[drawn]
            return torch.cat([own[:, None], others], dim=1)[None]

        handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
        try:
            yield self._weights(target, drawn, followed)
        finally:
            for handle in handles:
                handle.remove()

    def _weights(self, target: torch.Tensor, drawn: torch.Tensor, followed: torch.Tensor) -> torch.Tensor:
        """log of how many tokens each drawn one stands for, 0 for the target: float32 [labelled, 1 + m]."""
        part, own = self.part.to(target.device)[drawn], self.part.to(target.device)[target]
        unseen = self.unseen.to(target.device)[drawn]
        none = (drawn == target[:, None]) | (unseen & followed[:, None])
        weights = torch.zeros(len(target), 1 + len(drawn), device=target.device)
        for number, (tokens, spared) in enumerate(zip(self.parts, self.spared, strict=True)):
            away = torch.where(followed, spared, 0) + (own == number).long()
            left = (~none & (part == number)).sum(dim=1)
            stand_for = (len(tokens) - away).float() / left.clamp(min=1).float()
            weights[:, 1:] = torch.where(part == number, stand_for.log()[:, None], weights[:, 1:])
        weights[:, 1:] = weights[:, 1:].masked_fill(none, -math.inf)
        return weights
