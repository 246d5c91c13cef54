"""Dropout for any model, in training alone: on embeddings, attention weights, attention and MLP outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from genrec.errors import ConfigError

_ATTENTION, _MLP = ("self_attn", "attn"), ("mlp",)


@contextmanager
def dropout(model: torch.nn.Module, p: float) -> Iterator[None]:
    """Dropout on the embeddings, the attention weights and the output of every attention and MLP block.

    Works on any architecture whose blocks call theirs ``self_attn``/``attn`` and ``mlp``; active in training mode only.
    Attention weights have it where the attention holds its rate as ``attention_dropout``, as Llama's and Qwen's do.

    Raises:
        ConfigError: A layer's attention or MLP goes by another name, so that dropout would act on a part alone.
    """
    if p == 0:
        yield
        return

    def drop(module: torch.nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.nn.functional.dropout(output[0], p, module.training), *output[1:])
        return torch.nn.functional.dropout(output, p, module.training)

    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    blocks = [(name.rsplit(".", 1)[-1], module) for name, module in inner.named_modules()]
    layers = inner.config.get_text_config().num_hidden_layers
    for kind in (_ATTENTION, _MLP):
        found = sum(name in kind for name, _ in blocks)
        if found < layers:
            raise ConfigError(
                f"recipe: dropout is {p}, and it needs a block {' or '.join(kind)} in every layer; "
                f"{type(inner).__name__} has {found} in {layers} layers. Set dropout = 0, or take another "
                "base, such as a Llama or a Qwen."
            )
    handles = [inner.get_input_embeddings().register_forward_hook(drop)]
    before: list[tuple[Any, float]] = []
    for name, module in blocks:
        if name in _ATTENTION + _MLP:
            handles.append(module.register_forward_hook(drop))
            if isinstance(getattr(module, "attention_dropout", None), float):
                before.append((module, module.attention_dropout))
                module.attention_dropout = p
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, value in before:
            module.attention_dropout = value
