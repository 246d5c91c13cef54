"""How much memory an adapter takes, told before its weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from genrec import base as bases
from genrec.adapter import Adapter
from genrec.decoding import Trie
from genrec.errors import AdapterError, ConfigError, suggestion
from genrec.tokenization import Tokenization

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Memory:
    """What a loaded adapter holds; working memory comes on top, and is planned by the engine.

    Attributes:
        weights: Bytes of the model's parameters, about; of a base in 4 bits too.
        trie: Bytes of the trie of identifiers.
        tables: Bytes of the items table and of the identifiers' token ids.
        dtype: Of the weights.
    """

    weights: int
    trie: int
    tables: int
    dtype: str

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.weights + self.trie + self.tables

    def __str__(self) -> str:
        return (
            f"{size(self.total)} of memory: weights {size(self.weights)} ({self.dtype}), trie {size(self.trie)}, "
            f"tables {size(self.tables)}"
        )


def size(count: int) -> str:
    """Bytes in words.

    Example:
        >>> size(3 * 2**20), size(5 * 2**30)
        ('3.0 MiB', '5.0 GiB')
    """
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def memory(adapter: Adapter, tokenization: Tokenization, trie: Trie, dtype: torch.dtype) -> Memory:
    """The memory of an adapter whose tables have been read and whose weights have not.

    Raises:
        AdapterError: The configuration of its base cannot be read.
    """
    arrays = (trie.token, trie.first_child, trie.lo, trie.items)
    return Memory(
        weights=_weights(adapter, len(tokenization.tokenizer), dtype),
        trie=sum(array.nbytes for array in arrays),
        tables=int(adapter.items.estimated_size()) + tokenization.tokens.nbytes + tokenization.lengths.nbytes,
        dtype=str(dtype).removeprefix("torch."),
    )


def dtype_of(adapter: Adapter, dtype: str | torch.dtype) -> torch.dtype:
    """A dtype by its name, or itself; ``auto`` is that of the adapter's weights, or of its base's.

    Raises:
        ConfigError: An unknown name.
        AdapterError: As ``memory``.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        found = getattr(_config(adapter), "dtype", None)
        return found if isinstance(found, torch.dtype) else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}. {suggestion(dtype, (*DTYPES, 'auto'))}")
    named: torch.dtype = getattr(torch, dtype)
    return named


@bases.quiet()
def _config(adapter: Adapter) -> Any:
    whole = adapter.tuning == "full"
    folder, gguf = (adapter.path, None) if whole else (adapter.base.folder, adapter.base.gguf)
    options = {"gguf_file": gguf.name} if gguf else {}
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)
    except (OSError, ValueError, ImportError) as error:
        raise AdapterError(f"{folder}: its configuration cannot be read: {error}") from error


@bases.quiet()
def _weights(adapter: Adapter, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes of the parameters, from a model that has shapes and no values."""
    config = _config(adapter)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tables = {id(embedding): embedding, id(head): head}  # One, where the head is tied.
    rows = sum(max(vocabulary - len(table), 0) * table.shape[1] for table in tables.values())
    whole = sum(value.numel() for value in model.parameters()) + rows
    if adapter.tuning != "qlora":
        return int(whole * dtype.itemsize)
    layers = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    packed = sum(layer.weight.numel() for layer in layers if id(layer.weight) not in tables)
    return int((whole - packed) * dtype.itemsize + packed // 2)
