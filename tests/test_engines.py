from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from genrec.decoding import Trie
from genrec.engines import Engine, batches
from genrec.engines.dummy import DummyEngine
from genrec.engines.local import LocalEngine
from genrec.errors import DecodingError

VOCAB, CONTEXT, WINDOW = 97, 160, 6
# Weights wide enough that attention matters: with the usual 0.02 a wrong mask would hardly move a score.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": CONTEXT, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT: dict[str, Any] = {"vocab_size": VOCAB, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
_SLIDING = ["sliding_attention", "full_attention"]

MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_COMMON)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_COMMON, tie_word_embeddings=True)),
    "llama-eager": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_COMMON, attn_implementation="eager")),
    "qwen3-tied": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_COMMON, tie_word_embeddings=True)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_COMMON)),
    "phi3-window": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_COMMON, sliding_window=WINDOW)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_COMMON, sliding_window=WINDOW, layer_types=_SLIDING, query_pre_attn_scalar=8)
    ),
    "gemma2-soft-caps": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**_COMMON, sliding_window=WINDOW, layer_types=_SLIDING, attn_implementation="eager")
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT, n_embd=16, n_layer=2, n_head=2, n_positions=CONTEXT)),
    "gpt-neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            **_GPT,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=32,
            max_position_embeddings=CONTEXT,
        )
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**_GPT, hidden_size=16, n_layer=2, n_head=2)),
}
# Cannot decode as a tree: positions are built from a 2-D mask; windows are laid by the slots of the cache.
PLAIN = {"bloom", "gpt-neo"}


def make_model(name: str, dtype: torch.dtype = torch.float64) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).eval()


def make_local(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> LocalEngine:
    model = make_model(name, dtype)
    if name in PLAIN:
        with pytest.warns(UserWarning, match="cannot decode beams as a tree"):
            return LocalEngine(model, **options)
    return LocalEngine(model, **options)


@cache
def local_engine(name: str) -> LocalEngine:
    return make_local(name)


# Every engine that the contract is held to: a name and how to get it. vLLM's is held to it in tests/vllm.
ENGINES: dict[str, Callable[[], Engine]] = {
    "dummy": lambda: DummyEngine(VOCAB),
    **{name: (lambda name=name: local_engine(name)) for name in MODELS},  # type: ignore[misc]
}


def random_catalogue(seed: int, n: int, longest: int = 4, lowest: int = 3, codes: int = 5) -> np.ndarray:
    """Prefix-free identifiers of unequal length, in random order, padded with -1. Codes differ by level at first."""
    rng = np.random.default_rng(seed)
    kept: dict[tuple[int, ...], None] = {}
    inner: set[tuple[int, ...]] = set()
    for _ in range(40 * n):
        if len(kept) == n:
            break
        new = tuple(int(t) for t in lowest + rng.integers(0, codes, rng.integers(min(2, longest), longest + 1)))
        beginnings = [new[:depth] for depth in range(1, len(new))]
        if new not in inner and new not in kept and not any(beginning in kept for beginning in beginnings):
            kept[new] = None
            inner.update(beginnings)
    return np.array([[*row, *[-1] * (longest - len(row))] for row in kept])


def random_prompts(seed: int, n: int, common: int = 0, shortest: int = 1, longest: int = 30) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    head = rng.integers(3, VOCAB, common)
    return [np.concatenate([head, rng.integers(3, VOCAB, rng.integers(shortest, longest + 1))]) for _ in range(n)]


def forward_scores(model: hf.PreTrainedModel, prompt: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The oracle: one plain forward per item."""
    scores = []
    for row in table:
        completion = row[row >= 0]
        with torch.no_grad():
            logits = model(torch.tensor(np.concatenate([prompt, completion])[None]), use_cache=False).logits[0]
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        scores.append(logprobs[torch.arange(len(completion)), torch.tensor(completion)].sum().item())
    return np.array(scores)


def padded_scores(model: hf.PreTrainedModel, prompt: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The oracle of many items: one plain causal forward, where what pads an item stands after it and is not seen."""
    rows = np.concatenate([np.broadcast_to(prompt, (len(table), len(prompt))), table.clip(min=0)], axis=1)
    with torch.no_grad():
        logits = model(torch.from_numpy(rows).long(), use_cache=False).logits[:, len(prompt) - 1 : -1]
    picked = logits.log_softmax(-1).gather(2, torch.from_numpy(table.clip(min=0)).long()[:, :, None])[:, :, 0]
    return np.where(table < 0, 0.0, picked.numpy()).sum(axis=1)


def assert_ranking(
    items: np.ndarray, scores: np.ndarray, expected: np.ndarray, open_items: np.ndarray, atol: float = 1e-5
) -> None:
    """``items`` and ``scores`` are all ``open_items``, best first, with ``expected`` scores; the rest is padding."""
    found = items[: len(open_items)]
    assert sorted(found.tolist()) == sorted(open_items.tolist())
    np.testing.assert_allclose(scores[: len(found)], expected[found], atol=atol)
    # The order is compared where neighbours differ by more than rounding.
    assert (np.diff(expected[found]) <= 2 * atol).all()
    assert (items[len(found) :] == -1).all()
    assert np.isneginf(scores[len(found) :]).all()


class EngineContract:
    """What every engine must do. A class of tests of it has a fixture ``engine``; it must know VOCAB tokens."""

    atol = 1e-5  # Of scores of the same item in two calls.

    @pytest.mark.parametrize("seed", range(3))
    def test_all_beams_equal_brute_force(self, engine: Engine, seed: int) -> None:
        table, prompts = random_catalogue(seed, 30), random_prompts(seed, 4)
        trie = Trie.build(table)
        found = engine.beam_search(prompts, trie, len(table))
        assert found.items.dtype == np.int32
        assert found.scores.dtype == np.float32
        assert found.reasons == [None] * len(prompts)
        tails = [row[row >= 0] for row in table]
        for i, prompt in enumerate(prompts):
            expected = engine.score([prompt] * len(tails), tails)
            assert_ranking(found.items[i], found.scores[i], expected, np.arange(len(table)), self.atol)

    @pytest.mark.parametrize("longest", [1, 4])
    def test_restrictions(self, engine: Engine, longest: int) -> None:
        table = random_catalogue(3, 40, longest, codes=40 if longest == 1 else 5)
        prompts, rng = random_prompts(3, 6), np.random.default_rng(3)
        n, trie = len(table), Trie.build(table)
        allowed = rng.random(n) < 0.7
        blocked = [
            rng.integers(0, n, 5),
            None,
            np.array([], dtype=int),
            rng.integers(-1, n, 9),
            np.arange(n),
            np.arange(3),
        ]
        only = [None, rng.integers(0, n, 8), np.arange(n), rng.integers(-1, n, 9), None, np.array([], dtype=int)]
        for use in range(8):
            masks = allowed if use & 1 else None, blocked if use & 2 else None, only if use & 4 else None
            found = engine.beam_search(prompts, trie, n, *masks)
            for i, prompt in enumerate(prompts):
                ok = np.ones(n, dtype=bool) if masks[0] is None else allowed.copy()
                if masks[1] is not None and blocked[i] is not None:
                    ok[blocked[i][blocked[i] >= 0]] = False
                if masks[2] is not None and only[i] is not None:
                    ok &= np.isin(np.arange(n), only[i])
                expected = engine.score([prompt] * n, [row[row >= 0] for row in table])
                assert_ranking(found.items[i], found.scores[i], expected, np.flatnonzero(ok), self.atol)
                assert (found.reasons[i] is None) == bool(ok.all())
                if not ok.any():
                    assert "no item is allowed" in str(found.reasons[i])

    @pytest.mark.parametrize("longest", [1, 3])
    def test_order_and_neighbours_change_nothing(self, engine: Engine, longest: int) -> None:
        table = random_catalogue(4, 60, longest, codes=60 if longest == 1 else 6)
        trie, prompts = Trie.build(table), random_prompts(4, 7, common=50)
        blocked = [np.arange(i) for i in range(7)]
        whole = engine.beam_search(prompts, trie, 5, blocked=blocked)
        back = engine.beam_search(prompts[::-1], trie, 5, blocked=blocked[::-1])
        np.testing.assert_array_equal(whole.items, back.items[::-1])
        np.testing.assert_allclose(whole.scores, back.scores[::-1], atol=1e-4)
        for i in range(7):
            alone = engine.beam_search([prompts[i]], trie, 5, blocked=[blocked[i]])
            np.testing.assert_array_equal(alone.items[0], whole.items[i])
            np.testing.assert_allclose(alone.scores[0], whole.scores[i], atol=1e-4)
        tails = [table[j][table[j] >= 0] for j in whole.items[:, 0]]
        np.testing.assert_allclose(engine.score(prompts, tails), whole.scores[:, 0], atol=1e-4)

    def test_the_first_beams_of_atomic_identifiers_are_exact(self, engine: Engine) -> None:
        tokens = np.random.default_rng(5).permutation(VOCAB)[:50, None]  # tokens with gaps, in any order
        trie, prompts = Trie.build(tokens), random_prompts(5, 3)
        few, all_ = engine.beam_search(prompts, trie, 7), engine.beam_search(prompts, trie, 50)
        np.testing.assert_array_equal(few.items, all_.items[:, :7])

    def test_empty_load_and_few_items(self, engine: Engine) -> None:
        trie = Trie.build(np.array([[3], [4]]))
        none = engine.beam_search([], trie, 5)
        assert none.items.shape == (0, 2)
        assert none.reasons == []
        assert engine.score([], []).shape == (0,)
        found = engine.beam_search([np.array([5])], trie, 5)
        assert found.items.shape == (1, 2)
        assert "the catalogue has only 2 items" in str(found.reasons[0])

    @pytest.mark.parametrize("seed", range(2))
    def test_nothing_illegal_comes_out(self, engine: Engine, seed: int) -> None:
        table, prompts = random_catalogue(seed + 10, 200, 4, codes=8), random_prompts(seed, 5)
        blocked = [np.random.default_rng(i).integers(0, len(table), 20) for i in range(5)]
        found = engine.beam_search(prompts, Trie.build(table), 10, blocked=blocked)
        for items, bad in zip(found.items, blocked, strict=True):
            assert len(set(items.tolist())) == 10
            assert (items >= 0).all()
            assert not set(items.tolist()) & set(bad.tolist())

    @pytest.mark.parametrize("beams", [0, -1, 65_537, 2.5])
    def test_refuses_beams_out_of_range(self, engine: Engine, beams: Any) -> None:
        with pytest.raises(DecodingError, match=r"num_beams must be 1 \.\. 65536"):
            engine.beam_search([np.array([5])], Trie.build(np.array([[3], [4]])), beams)

    def test_refuses_bad_tokens(self, engine: Engine) -> None:
        trie, good = Trie.build(np.array([[3], [4]])), np.array([5])
        with pytest.raises(DecodingError, match="prompt 1 is empty"):
            engine.beam_search([good, np.array([], dtype=int)], trie, 1)
        with pytest.raises(DecodingError, match=f"prompt 0 has tokens {VOCAB} .. {VOCAB}"):
            engine.beam_search([np.array([VOCAB])], trie, 1)
        with pytest.raises(DecodingError, match=f"the trie holds token {VOCAB}.*another tokenizer"):
            engine.beam_search([good], Trie.build(np.array([[3], [VOCAB]])), 1)
        with pytest.raises(DecodingError, match="completion 0 is empty"):
            engine.score([good], [np.array([], dtype=int)])
        with pytest.raises(DecodingError, match="1 prompts and 2 completions"):
            engine.score([good], [good, good])
        with pytest.raises(DecodingError, match="blocked has 2 lists for 1 prompts"):
            engine.beam_search([good], trie, 1, blocked=[good, good])


@pytest.mark.parametrize("name", list(ENGINES))
class TestContract(EngineContract):
    """A new engine is one more entry of ENGINES."""

    @pytest.fixture
    def engine(self, name: str) -> Engine:
        return ENGINES[name]()


@pytest.mark.parametrize("name", list(MODELS))
class TestLocalAgainstTransformers:
    def test_decodes_as_a_tree(self, name: str) -> None:
        assert local_engine(name).tree == (name not in PLAIN)

    @pytest.mark.parametrize("common", [0, 90])
    def test_oracle(self, name: str, common: int) -> None:
        """Beams >= catalogue equal the list of plain forwards, with and without a prefix prefilled for all."""
        engine, table = local_engine(name), random_catalogue(7, 25)
        prompts = random_prompts(7, 5, common)
        found = engine.beam_search(prompts, Trie.build(table), len(table))
        for i, prompt in enumerate(prompts):
            expected = forward_scores(engine.model, prompt, table)
            assert_ranking(found.items[i], found.scores[i], expected, np.arange(len(table)))
            completions = [row[row >= 0] for row in table]
            np.testing.assert_allclose(engine.score([prompt] * len(table), completions), expected, atol=1e-9)

    def test_float32(self, name: str) -> None:
        engine, table = make_local(name, torch.float32), random_catalogue(8, 25)
        prompts = random_prompts(8, 4, 90)
        found = engine.beam_search(prompts, Trie.build(table), len(table))
        for i, prompt in enumerate(prompts):
            expected = forward_scores(engine.model, prompt, table)
            assert_ranking(found.items[i], found.scores[i], expected, np.arange(len(table)), atol=1e-4)

    @pytest.mark.parametrize(("beams", "longest"), [(1, 3), (4, 3), (10, 3), (8, 1)])
    def test_constrained_generate(self, name: str, beams: int, longest: int) -> None:
        """The same list and scores as transformers' beam search with prefix_allowed_tokens_fn."""
        engine, rng = local_engine(name), np.random.default_rng(beams)
        table = np.unique(rng.integers(3, 3 + (60 if longest == 1 else 6), (60, longest)), axis=0)
        for prompt in random_prompts(beams, 2, shortest=WINDOW + 4):
            expected, scores = generated(engine.model, prompt[None], table, beams)
            found = engine.beam_search([prompt], Trie.build(table), beams)
            np.testing.assert_array_equal(found.items, expected)
            if scores is not None:
                np.testing.assert_allclose(found.scores, scores, atol=1e-5)


def generated(model: hf.PreTrainedModel, prompts: np.ndarray, table: np.ndarray, beams: int) -> tuple[Any, Any]:
    """Items and scores [prompts, beams] of transformers' beam search with prefix_allowed_tokens_fn."""
    start, longest = prompts.shape[1], table.shape[1]
    legal: dict[tuple[int, ...], set[int]] = {}
    for row in table.tolist():
        for depth in range(longest):
            legal.setdefault(tuple(row[:depth]), set()).add(row[depth])
    output = model.generate(
        torch.from_numpy(prompts), attention_mask=torch.ones(prompts.shape, dtype=torch.long),
        prefix_allowed_tokens_fn=lambda _, ids: sorted(legal[tuple(ids[start:].tolist())]), num_beams=beams,
        num_return_sequences=beams, max_new_tokens=longest, do_sample=False, length_penalty=0.0, early_stopping=True,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    index = {tuple(row): item for item, row in enumerate(table.tolist())}
    items = np.array([index[tuple(row)] for row in output.sequences[:, start:].tolist()])
    # Greedy search has no scores of sequences.
    scores = None if beams == 1 else output.sequences_scores.numpy().reshape(len(prompts), beams)
    return items.reshape(len(prompts), beams), scores


class TestExactness:
    """The promises at length. The slow ones are the same with more cases."""

    def random_catalogues(self, seeds: range) -> None:
        names = ("llama", "qwen3-tied", "gemma3", "gemma2-soft-caps", "gpt2")
        for seed in seeds:
            rng, engine = np.random.default_rng(seed), local_engine(names[seed % len(names)])
            n = 500 if seed % 10 == 0 else int(rng.integers(1, 501))
            longest = int(rng.integers(1 if n <= 60 else 2, 6))
            table = random_catalogue(seed, n, longest, codes=94 if longest == 1 else 40)
            assert len(table) == n
            (prompt,) = random_prompts(seed, 1)
            found = engine.beam_search([prompt], Trie.build(table), len(table) + int(rng.integers(0, 3)))
            expected = padded_scores(engine.model, prompt, table)
            assert_ranking(found.items[0], found.scores[0], expected, np.arange(len(table)))

    def test_random_catalogues_equal_brute_force(self) -> None:
        self.random_catalogues(range(100))

    @pytest.mark.slow
    def test_1000_random_catalogues_equal_brute_force(self) -> None:
        self.random_catalogues(range(100, 1100))

    def against_generate(self, name: str, lengths: int) -> None:
        engine, rng = make_local(name, torch.float32), np.random.default_rng(lengths)
        for length in rng.integers(1, 40, size=lengths):
            table = np.unique(rng.integers(3, 11, (120, 3)), axis=0)
            prompts = rng.integers(3, VOCAB, (5, length))
            items, scores = generated(engine.model, prompts, table, 8)
            found = engine.beam_search(list(prompts), Trie.build(table), 8)
            np.testing.assert_allclose(found.scores, scores, atol=1e-4)
            # Where neighbours are nearer than that, either order is right.
            close = np.abs(np.diff(scores, axis=1, append=scores[:, -1:] - 1)) < 2e-4
            close |= np.abs(np.diff(scores, axis=1, prepend=scores[:, :1] + 1)) < 2e-4
            assert ((found.items == items) | close).all()

    @pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gemma3", "gemma2-soft-caps", "gpt2"])
    def test_20_prompts_against_constrained_generate(self, name: str) -> None:
        self.against_generate(name, 4)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gemma3", "gemma2-soft-caps", "gpt2"])
    def test_200_prompts_against_constrained_generate(self, name: str) -> None:
        self.against_generate(name, 40)

    def legal_items(self, wanted: int) -> None:
        """At least ``wanted`` items out of ten catalogues: all known, none twice, none blocked, none not allowed."""
        torch.manual_seed(0)
        engine = LocalEngine(hf.LlamaForCausalLM(hf.LlamaConfig(**{**_COMMON, "vocab_size": 4 * 64 + 3})).eval())
        total = 0
        sizes = (1_000_000, 100_000, 10_000, 3000, 1000, 200, 60, 7, 2, 1)
        for number, n in enumerate(sizes):
            rng = np.random.default_rng(number)
            flat = rng.choice(64**4, size=n, replace=False)
            table = 3 + 64 * np.arange(4) + flat[:, None] // 64 ** np.arange(4)[::-1] % 64
            trie = Trie.build(table)
            assert len(np.unique(trie.items)) == n
            allowed = rng.random(n) < 0.8 if number % 2 else None
            for _ in range(-(-wanted // 2500)):
                prompts = random_prompts(number, 10)
                blocked = [rng.integers(0, n, rng.integers(0, 200)) for _ in prompts]
                only = [rng.integers(0, n, 300) if i % 5 == 4 else None for i in range(10)]
                found = engine.beam_search(prompts, trie, 50, allowed, blocked, only)
                for items, reason, bad, alone in zip(found.items, found.reasons, blocked, only, strict=True):
                    got = items[items >= 0]
                    ok = np.ones(n, dtype=bool) if allowed is None else allowed.copy()
                    ok[bad] = False
                    if alone is not None:
                        inside = np.zeros(n, dtype=bool)
                        inside[alone] = True
                        ok &= inside
                    assert (got < n).all()
                    assert ok[got].all()
                    assert len(np.unique(got)) == len(got) == min(50, ok.sum())
                    assert (reason is None) == (ok.sum() >= 50)
                    total += len(got)
        assert total >= wanted

    def test_5000_generated_items_are_legal(self) -> None:
        self.legal_items(5000)

    @pytest.mark.slow
    def test_50000_generated_items_are_legal(self) -> None:
        self.legal_items(50_000)


class TestMemory:
    @pytest.mark.parametrize("longest", [1, 4])
    @pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
    def test_out_of_memory_splits_the_batch(
        self, longest: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What does not fit is split, again and again, the rest of the load too, and every result stays."""
        trie = Trie.build(random_catalogue(9, 60, longest, codes=60 if longest == 1 else 5))
        prompts, engine = random_prompts(9, 17, common=60), make_local("llama")
        tails = [np.array([5, 6, 7])] * 17
        whole, scores = engine.beam_search(prompts, trie, 6), engine.score(prompts, tails)
        forward, sizes = engine._forward, []

        def small(inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            sizes.append(len(inputs))
            if len(inputs) > 3:
                raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes")
            return forward(inputs, *args, **kwargs)

        monkeypatch.setattr(engine, "_forward", small)
        split = engine.beam_search(prompts, trie, 6)
        assert max(sizes) > 3
        assert sizes.count(max(sizes)) == 1  # The lesson is learned once.
        np.testing.assert_array_equal(split.items, whole.items)
        np.testing.assert_allclose(split.scores, whole.scores, atol=1e-6)
        np.testing.assert_allclose(engine.score(prompts, tails), scores, atol=1e-9)

    @pytest.mark.parametrize("count", [5, 7, 17])
    def test_halves_of_an_odd_batch_are_tried(self, count: int) -> None:
        tried: list[int] = []

        def work(batch: np.ndarray) -> None:
            tried.append(len(batch))
            if len(batch) > (count + 1) // 2:
                raise MemoryError

        batches.run([np.arange(count)], np.full(count, 10), work)
        assert tried == [count, (count + 1) // 2, count // 2]

    @pytest.mark.parametrize("refused", ["plain", "tree"])
    def test_out_of_memory_in_the_check_is_told(self, refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
        forward = LocalEngine._forward

        def limited(self: Any, inputs: torch.Tensor, keep: int, cache: Any = None, **kwargs: Any) -> torch.Tensor:
            if (cache is None) == (refused == "plain"):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(self, inputs, keep, cache, **kwargs)

        monkeypatch.setattr(LocalEngine, "_forward", limited)
        with pytest.raises(DecodingError, match="out of memory"):
            LocalEngine(make_model("llama"))

    def test_plain_forwards_are_split_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trie, prompts, engine = Trie.build(random_catalogue(9, 30)), random_prompts(9, 4), make_local("bloom")
        whole, forward, sizes = engine.beam_search(prompts, trie, 6), engine._forward, []

        def small(inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            sizes.append(len(inputs))
            if len(inputs) > 2:
                raise MemoryError
            return forward(inputs, *args, **kwargs)

        monkeypatch.setattr(engine, "_forward", small)
        np.testing.assert_array_equal(engine.beam_search(prompts, trie, 6).items, whole.items)
        assert max(sizes) > 2
        sizes.clear()
        monkeypatch.setattr("genrec.engines.local.memory_at_hand", lambda _: 0)
        np.testing.assert_array_equal(engine.beam_search(prompts, trie, 6).items, whole.items)
        assert max(sizes) == 1

    def test_out_of_memory_alone_names_the_prompt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = make_local("llama")

        def refused(inputs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(engine, "_forward", refused)
        with pytest.raises(DecodingError, match="prompt 1: out of memory, though it is alone"):
            engine.beam_search([np.array([5]), np.array([5, 6, 7])], Trie.build(np.array([[3], [4]])), 2)

    def test_other_errors_are_not_taken_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = make_local("llama")

        def broken(inputs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            raise RuntimeError("shapes do not match")

        monkeypatch.setattr(engine, "_forward", broken)
        with pytest.raises(RuntimeError, match="shapes do not match"):
            engine.beam_search([np.array([5])] * 3, Trie.build(np.array([[3], [4]])), 2)

    def test_little_memory_makes_small_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trie, prompts = Trie.build(random_catalogue(9, 60)), random_prompts(9, 12)
        engine = make_local("llama")
        whole, forward, sizes = engine.beam_search(prompts, trie, 6), engine._forward, []

        def counted(inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            sizes.append(len(inputs))
            return forward(inputs, *args, **kwargs)

        monkeypatch.setattr(engine, "_forward", counted)
        for memory, largest in ((2**40, 12), (0, 1)):
            monkeypatch.setattr("genrec.engines.local.memory_at_hand", lambda _, memory=memory: memory)
            found = engine.beam_search(prompts, trie, 6)
            assert max(sizes) == largest
            sizes.clear()
            np.testing.assert_array_equal(found.items, whole.items)

    def test_memory_at_hand_is_what_the_machine_has(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        free = batches.memory_at_hand(torch.device("cpu"))
        assert 2**20 < free < 2**50
        """The least that the cgroups around the process leave; pages of files that the kernel gives back are free."""
        for own, folder, names in (
            ("0::/a/b\n", "a", ("memory.max", "memory.current", "inactive_file")),
            (
                "4:cpu,memory:/a/b\n",
                "memory/a/b",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            ),
        ):  # fmt: skip
            (tmp_path / folder).mkdir(parents=True)
            for name, text in zip(names, ("5000\n", "2000\n"), strict=False):
                (tmp_path / folder / name).write_text(text)
            (tmp_path / folder / "memory.stat").write_text(f"file 9\n{names[2]} 700\n")
            (tmp_path / "own").write_text(own)
            monkeypatch.setattr(batches, "_CGROUP", tmp_path)
            monkeypatch.setattr(batches, "_OWN_CGROUP", tmp_path / "own")
            assert batches.memory_at_hand(torch.device("cpu")) == 3700

    @given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200), st.integers(0, 5000), st.booleans())
    def test_micro_batches(self, lengths: list[int], tokens: int, memory: int, equal: bool) -> None:
        array = np.array(lengths, dtype=np.int64)
        found = list(batches.micro_batches(array, tokens, array * 10, memory, equal=equal))
        assert sorted(int(i) for batch in found for i in batch) == list(range(len(lengths)))
        for batch in found:
            longest = array[batch].max()
            assert len(batch) == 1 or len(batch) * longest <= min(tokens, memory // 10)
            assert not equal or (array[batch] == longest).all()


class TestLocal:
    @pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
    @pytest.mark.parametrize("longest", [1, 4])
    def test_the_batch_size_changes_nothing(self, name: str, longest: int) -> None:
        trie = Trie.build(random_catalogue(9, 60, longest, codes=60 if longest == 1 else 5))
        prompts = random_prompts(9, 9, common=60)
        one = LocalEngine(make_model(name), max_batch_tokens=1).beam_search(prompts, trie, 6)
        for size in (100, 333, 10_000):
            other = LocalEngine(make_model(name), max_batch_tokens=size).beam_search(prompts, trie, 6)
            np.testing.assert_array_equal(one.items, other.items)
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)

    @pytest.mark.parametrize("name", list(MODELS))
    @pytest.mark.parametrize("longest", [1, 4])
    def test_neighbours_order_and_batches_in_float32(self, name: str, longest: int) -> None:
        trie = Trie.build(random_catalogue(9, 60, longest, codes=60 if longest == 1 else 5))
        prompts, engine = random_prompts(9, 6, common=60), make_local(name, torch.float32)
        whole = engine.beam_search(prompts, trie, 60)
        assert (np.sort(whole.items, axis=1) == np.arange(trie.n_items)).all()
        by_item = np.take_along_axis(whole.scores, np.argsort(whole.items, axis=1), axis=1)
        back, alone = engine.beam_search(prompts[::-1], trie, 60), [engine.beam_search([p], trie, 60) for p in prompts]
        engine.max_batch_tokens = 333
        small = engine.beam_search(prompts, trie, 60)
        for items, scores in (
            (back.items[::-1], back.scores[::-1]), (small.items, small.scores),
            (np.concatenate([one.items for one in alone]), np.concatenate([one.scores for one in alone])),
        ):  # fmt: skip
            np.testing.assert_allclose(scores, np.take_along_axis(by_item, items, axis=1), atol=1e-4)

    @pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
    def test_what_is_forced_takes_one_forward(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Long titles differ early: the rest of all of them goes through the model together."""
        rng = np.random.default_rng(0)
        table = np.concatenate([np.arange(3, 11)[:, None], rng.integers(3, VOCAB, (8, 6))], axis=1)
        engine, prompts, calls = local_engine(name), random_prompts(0, 3), []
        forward = LocalEngine._forward
        monkeypatch.setattr(LocalEngine, "_forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw))
        found = engine.beam_search(prompts, Trie.build(table), 8)
        assert len(calls) == 1 + 2  # The prompts; three levels, as many as _AHEAD admits; the last three that are fed.
        for prompt, items, scores in zip(prompts, found.items, found.scores, strict=True):
            assert_ranking(items, scores, forward_scores(engine.model, prompt, table), np.arange(8))

    def test_ties_go_to_the_lower_item(self) -> None:
        model = make_model("llama")
        with torch.no_grad():
            model.lm_head.weight[10:40] = model.lm_head.weight[10]
        tokens = np.concatenate([np.arange(10, 40)[::-1], np.arange(40, 60)])[:, None]
        found = LocalEngine(model).beam_search(random_prompts(0, 4), Trie.build(tokens), 50)
        few = LocalEngine(model).beam_search(random_prompts(0, 4), Trie.build(tokens), 12)
        np.testing.assert_array_equal(found.items[:, :12], few.items)
        for items in found.items:
            tied = items[items < 30]
            assert tied.tolist() == sorted(tied.tolist())

    def test_leaves_the_model_as_it_was(self) -> None:
        """In the middle of training: mixed modes, gradients, checkpointing and use_cache=False stay."""
        torch.manual_seed(0)
        config = hf.Phi3Config(**_COMMON, resid_pdrop=0.5, attention_dropout=0.5, use_cache=False)
        model = hf.Phi3ForCausalLM(config).train()
        model.gradient_checkpointing_enable()
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]]), use_cache=False).loss.backward()
        gradient, settings = model.lm_head.weight.grad.clone(), model.config.to_dict()

        engine, table = LocalEngine(model), random_catalogue(2, 20)
        first = engine.beam_search(random_prompts(2, 3), Trie.build(table), 9)
        second = engine.beam_search(random_prompts(2, 3), Trie.build(table), 9)
        np.testing.assert_array_equal(first.scores, second.scores)  # no dropout
        with pytest.raises(DecodingError):
            engine.beam_search([np.array([], dtype=int)], Trie.build(table), 9)
        assert [module.training for module in model.modules()] == modes
        assert model.config.to_dict() == settings
        assert torch.equal(model.lm_head.weight.grad, gradient)
        assert not torch.is_inference_mode_enabled()
        model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]]), use_cache=False).loss.backward()
        assert not torch.equal(model.lm_head.weight.grad, gradient)

    def test_peft_model(self) -> None:
        torch.manual_seed(1)
        adapted = get_peft_model(
            make_model("llama"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        )
        table, prompts = random_catalogue(1, 20), random_prompts(1, 3)
        engine = LocalEngine(adapted.double())
        found = engine.beam_search(prompts, Trie.build(table), len(table))
        expected = forward_scores(adapted.eval(), prompts[0], table)
        assert_ranking(found.items[0], found.scores[0], expected, np.arange(len(table)))
        assert engine.tree

    @pytest.mark.parametrize("longest", [1, 3])
    def test_logits_that_are_not_finite_name_the_prompt(self, longest: int) -> None:
        engine = make_local("llama")
        trie = Trie.build(random_catalogue(6, 20, longest, codes=20))
        prompts = [np.array([50, 51]), np.array([50, 90, 51, 52]), np.array([52])]
        with torch.no_grad():
            engine.model.model.embed_tokens.weight[90] = float("nan")
        with pytest.raises(DecodingError, match=r"prompt 1: .* not finite"):
            engine.beam_search(prompts, trie, 3)
        with pytest.raises(DecodingError, match=r"prompt 1: .* not finite"):
            engine.score(prompts, [np.array([5])] * 3)
        with torch.no_grad():
            engine.model.lm_head.weight[:] = float("inf")
        with pytest.raises(DecodingError, match="not finite"):
            engine.beam_search(prompts, trie, 3)
        LocalEngine(engine.model)  # such a model loads without a warning; a search tells

    def test_refuses_prompts_beyond_the_context(self) -> None:
        engine, trie = local_engine("gpt2"), Trie.build(np.array([[3, 4], [4, 5]]))
        engine.beam_search([np.full(CONTEXT - 2, 5)], trie, 2)
        with pytest.raises(DecodingError, match=f"prompt 0 has {CONTEXT - 1} tokens; .* room for {CONTEXT - 2}"):
            engine.beam_search([np.full(CONTEXT - 1, 5)], trie, 2)
        engine.score([np.full(CONTEXT - 2, 5)], [np.array([3, 4])])
        with pytest.raises(DecodingError, match="prompt with completion 0"):
            engine.score([np.full(CONTEXT - 1, 5)], [np.array([3, 4])])

    def test_longrope_ends_where_its_frequencies_change(self) -> None:
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 2, "long_factor": [4.0] * 2,
                "original_max_position_embeddings": 40}  # fmt: skip
        sizes = {key: value for key, value in _COMMON.items() if key != "head_dim"}
        model = hf.Phi3ForCausalLM(hf.Phi3Config(**sizes, rope_parameters=rope, original_max_position_embeddings=40))
        assert LocalEngine(model).context == 40

    def test_refuses_recurrent_models(self) -> None:
        with pytest.raises(DecodingError, match="MambaForCausalLM is recurrent"):
            LocalEngine(hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1)))
        sizes = {key: value for key, value in _COMMON.items() if key != "head_dim"}
        config = hf.Lfm2Config(**sizes, layer_types=["conv", "full_attention"])
        with pytest.raises(DecodingError, match="linear attention"):
            LocalEngine(hf.Lfm2ForCausalLM(config))

    @pytest.mark.parametrize("wrong", ["ignored", "refused"])
    def test_a_model_that_mistreats_the_mask_is_found_out(self, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, forward = make_model("llama"), hf.LlamaModel.forward

        def changed(self: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            if attention_mask is not None and wrong == "refused":
                raise ValueError("4-D masks are not supported")
            return forward(self, *args, attention_mask=None, **kwargs)

        monkeypatch.setattr(hf.LlamaModel, "forward", changed)
        with pytest.warns(UserWarning, match=r"LlamaForCausalLM \(sdpa attention\) cannot decode beams as a tree"):
            engine = LocalEngine(model)
        table, prompts = random_catalogue(1, 20), random_prompts(1, 3)
        found = engine.beam_search(prompts, Trie.build(table), len(table))
        for i, prompt in enumerate(prompts):
            expected = forward_scores(model, prompt, table)
            assert_ranking(found.items[i], found.scores[i], expected, np.arange(len(table)))

    @pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
    @pytest.mark.parametrize("wrong", ["sees all", "no window", "one beam"])
    def test_wrong_masks_are_found_in_bfloat16(self, name: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if wrong == "no window" and name != "gemma3":
            pytest.skip("has no window")
        mask = LocalEngine._mask

        def changed(self: LocalEngine, visible: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> Any:
            if wrong == "sees all":
                visible = torch.ones_like(visible) & (keys[:, None, :] <= queries[:, :, None])
            elif wrong == "one beam":
                visible[0, 1] = visible[0, 0]
            made = mask(self, visible, queries, keys)
            return dict.fromkeys(made, made["full_attention"]) if wrong == "no window" else made

        monkeypatch.setattr(LocalEngine, "_mask", changed)
        with pytest.warns(UserWarning, match="cannot decode beams as a tree"):
            LocalEngine(make_model(name, torch.bfloat16))

    @pytest.mark.parametrize("name", [name for name in MODELS if name not in PLAIN])
    def test_bfloat16_decodes_as_a_tree(self, name: str) -> None:
        assert make_local(name, torch.bfloat16).tree

    def test_a_window_longer_than_the_check_is_kept(self) -> None:
        torch.manual_seed(0)
        model = hf.MistralForCausalLM(hf.MistralConfig(**_COMMON, sliding_window=4096))
        assert LocalEngine(model).tree
        assert model.config.sliding_window == 4096

    def test_bfloat16(self) -> None:
        engine, table = make_local("llama", torch.bfloat16), random_catalogue(1, 20)
        assert engine.tree
        prompts = random_prompts(1, 3)
        found = engine.beam_search(prompts, Trie.build(table), 5)
        tails = [table[item][table[item] >= 0] for item in found.items[:, 0]]
        np.testing.assert_allclose(engine.score(prompts, tails), found.scores[:, 0], atol=0.3)


class TestDummy:
    def test_seed_and_prefix_matter(self) -> None:
        trie, prompts = Trie.build(np.arange(50)[:, None]), [np.array([1, 2, 3]), np.array([2, 1, 3])]
        first = DummyEngine(VOCAB).beam_search(prompts, trie, 10)
        np.testing.assert_array_equal(first.items, DummyEngine(VOCAB).beam_search(prompts, trie, 10).items)
        assert not np.array_equal(first.items[0], first.items[1])
        assert not np.array_equal(first.items, DummyEngine(VOCAB, seed=1).beam_search(prompts, trie, 10).items)

    def test_probabilities_sum_to_one(self) -> None:
        scores = DummyEngine(VOCAB).score([np.array([4, 5])] * VOCAB, list(np.arange(VOCAB)[:, None]))
        assert np.exp(scores).sum() == pytest.approx(1.0)
