"""Identifier rows: the few rows of an embedding, and of a head that is not tied to it, that are trained beside the
frozen rest. The matrices are never copied, and no frozen row gets a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from genrec.errors import ConfigError


def train_rows(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Freeze the embedding and the head of ``model`` and train their rows ``ids`` alone, as float32 parameters.

    The model computes what it did. Call it after LoRA was put on the blocks, so that its search for linear layers
    finds the head where it looks for it. A tied head shares the rows of the embedding.

    Args:
        model: A causal language model; not the ``PeftModel`` around it.
        ids: int64 [new], distinct token ids. A run of consecutive ids makes the fastest head.

    Raises:
        ConfigError: The embedding or the head was replaced, by LoRA for one, or is of an unknown kind.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for layer, kind in ((embedding, nn.Embedding), (head, nn.Linear)):
        if not isinstance(layer, kind):
            raise ConfigError(
                f"recipe: {type(model).__name__} has a {type(layer).__name__} where identifier rows are trained beside "
                f"a frozen {kind.__name__}. Take embedding and head out of lora.target_modules, or set "
                'tuning = "full".'
            )
        layer.requires_grad_(False)
    rows = nn.Parameter(embedding.weight[ids].detach().float())
    tied = head.weight is embedding.weight
    model.set_input_embeddings(RowEmbedding(embedding, ids, rows))
    own = rows if tied else nn.Parameter(head.weight[ids].detach().float())
    model.set_output_embeddings(RowHead(head, ids, own))


def is_rows(name: str) -> bool:
    """Whether a parameter of that name, in a model that ``train_rows`` changed, is of identifier rows."""
    return name.endswith(".rows")


class _Rows(nn.Module):
    """A frozen layer ``base`` and the rows [new, width] that stand in the place of its rows ``ids``."""

    ids: torch.Tensor
    places: torch.Tensor  # int64 [vocabulary]: which of the rows stands there, or -1.

    def __init__(self, base: Any, ids: torch.Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        places = torch.full((base.weight.shape[0],), -1)
        places[ids] = torch.arange(len(ids))
        self.register_buffer("ids", ids.to(base.weight.device), persistent=False)
        self.register_buffer("places", places.to(base.weight.device), persistent=False)

    @property
    def own(self) -> torch.Tensor:
        """The rows in the type of the layer's weight, as a saved model has them."""
        return self.rows.to(self.base.weight.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix with the rows in it, made anew; writing to it changes nothing."""
        return self.base.weight.index_copy(0, self.ids, self.own)


class RowEmbedding(_Rows):
    """An embedding of which some rows are trained."""

    def __init__(self, base: nn.Embedding, ids: torch.Tensor, rows: nn.Parameter) -> None:
        super().__init__(base, ids, rows)
        base.padding_idx = None  # It only keeps a gradient away that is none of the frozen rows', and would be of ours.

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        place = self.places[input_ids]
        # Through the layer's own forward, since Gemma's for one scales what it looks up.
        own = functional_call(self.base, {"weight": self.own}, (place.clamp(min=0),))
        return torch.where((place >= 0)[..., None], own, self.base(input_ids))


class RowHead(_Rows):
    """A head of which some rows are trained."""

    def __init__(self, base: nn.Linear, ids: torch.Tensor, rows: nn.Parameter) -> None:
        super().__init__(base, ids, rows)
        first, new = int(ids[0]), len(ids)
        self.run = slice(first, first + new) if torch.equal(ids.cpu(), torch.arange(first, first + new)) else None

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def select(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``ids`` of the whole matrix, without making it."""
        place = self.places[ids]
        return torch.where((place >= 0)[..., None], self.own[place.clamp(min=0)], self.base.weight[ids])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias, linear = self.base.weight, self.bias, nn.functional.linear
        if self.run is None:
            own = linear(hidden, self.own, None if bias is None else bias[self.ids])
            return linear(hidden, weight, bias).index_copy(-1, self.ids, own)
        before, after = slice(0, self.run.start), slice(self.run.stop, len(weight))
        parts = [(weight[before], before), (self.own, self.run), (weight[after], after)]
        logits = [linear(hidden, part, None if bias is None else bias[place]) for part, place in parts if len(part)]
        return torch.cat(logits, dim=-1)
