from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genrec import loading
from genrec.adapter import Adapter
from genrec.engines.local import LocalEngine
from genrec.errors import ConfigError
from genrec.memory import Memory, size
from genrec.recommender import Recommender


@pytest.fixture(scope="module")
def rec(workspace: Path) -> Recommender:
    return Recommender.load(workspace / "adapters" / "lora")


def test_dtype_is_a_name_or_a_dtype_or_that_of_the_weights(workspace: Path) -> None:
    path = workspace / "adapters" / "lora"
    wanted: tuple[Any, ...] = ("auto", torch.float32, "bfloat16", torch.bfloat16)
    found = [Recommender.load(path, dtype=dtype, device=torch.device("cpu")).engine for dtype in wanted]
    assert all(isinstance(engine, LocalEngine) for engine in found)
    assert [str(engine.model.dtype) for engine in found] == ["torch.float32"] * 2 + ["torch.bfloat16"] * 2  # type: ignore[attr-defined]


def test_memory_is_told_before_it_is_taken(
    workspace: Path, rec: Recommender, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = workspace / "adapters" / "lora"
    told, half = Recommender.memory(path), Recommender.memory(path, dtype="bfloat16")
    model = rec.engine.model  # type: ignore[attr-defined]
    assert told.weights == 2 * half.weights == sum(value.nbytes for value in model.parameters())
    assert told.trie == sum(one.nbytes for one in (rec.trie.token, rec.trie.first_child, rec.trie.lo, rec.trie.items))
    assert str(told).startswith("0.1 MiB of memory: weights 0.1 MiB (float32), trie 0.0 MiB")
    capsys.readouterr()
    Recommender.load(path)
    assert capsys.readouterr().err == f"{path}: {told}\n"
    monkeypatch.setattr(loading, "memory_at_hand", lambda device: 1000)
    monkeypatch.setattr(Adapter, "model", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(ConfigError, match=r"lora takes 0\.1 MiB of memory: .*, and 0\.0 MiB are available\. Free some"):
        Recommender.load(path)


def test_memory_of_a_whole_model_is_that_of_its_weights(workspace: Path) -> None:
    found = Recommender.load(workspace / "adapters" / "pretrained")
    held = sum(value.nbytes for value in found.engine.model.parameters())  # type: ignore[attr-defined]
    assert Recommender.memory(workspace / "adapters" / "pretrained").weights == held


def test_sizes_in_words() -> None:
    assert [size(count) for count in (0, 2**19, 2**30 - 2**20, 5 * 2**29)] == [
        "0.0 MiB", "0.5 MiB", "1,023.0 MiB", "2.5 GiB",
    ]  # fmt: skip
    told = Memory(weights=2**30, trie=2**20, tables=2**21, dtype="float16")
    assert told.total == 2**30 + 3 * 2**20
    assert str(told) == "1.0 GiB of memory: weights 1.0 GiB (float16), trie 1.0 MiB, tables 2.0 MiB"
