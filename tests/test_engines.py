from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from genrec.decoding import Trie
from genrec.engines import Engine
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
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**_GPT, hidden_size=16, n_layer=2, n_head=2)),
}
PLAIN = {"bloom"}  # cannot decode as a tree: its positions are built from a 2-D mask


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


# Every engine that the contract is held to: a name and how to get it. It must know VOCAB tokens.
ENGINES: dict[str, Callable[[], Engine]] = {
    "dummy": lambda: DummyEngine(VOCAB),
    **{name: (lambda name=name: local_engine(name)) for name in MODELS},  # type: ignore[misc]
}


def random_catalogue(seed: int, n: int, longest: int = 4, lowest: int = 3, codes: int = 5) -> np.ndarray:
    """Prefix-free identifiers of unequal length, in random order, padded with -1. Codes differ by level at first."""
    rng = np.random.default_rng(seed)
    kept: list[list[int]] = []
    for _ in range(n):
        new = [int(t) for t in lowest + rng.integers(0, codes, rng.integers(min(2, longest), longest + 1))]
        if not any(new[: len(old)] == old or old[: len(new)] == new for old in kept):
            kept.append(new)
    return np.array([row + [-1] * (longest - len(row)) for row in kept])


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


@pytest.mark.parametrize("name", list(ENGINES))
class TestContract:
    """What every engine must do. A new engine is one more entry of ENGINES."""

    @pytest.fixture
    def engine(self, name: str) -> Engine:
        return ENGINES[name]()

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
            assert_ranking(found.items[i], found.scores[i], expected, np.arange(len(table)))

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
                assert_ranking(found.items[i], found.scores[i], expected, np.flatnonzero(ok))
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
        assert "catalogue has 2 items and 5 were asked" in str(found.reasons[0])

    @pytest.mark.parametrize("seed", range(2))
    def test_nothing_illegal_comes_out(self, engine: Engine, seed: int) -> None:
        table, prompts = random_catalogue(seed + 10, 200, 4, codes=8), random_prompts(seed, 5)
        blocked = [np.random.default_rng(i).integers(0, len(table), 20) for i in range(5)]
        found = engine.beam_search(prompts, Trie.build(table), 10, blocked=blocked)
        for items, bad in zip(found.items, blocked, strict=True):
            assert len(set(items.tolist())) == 10
            assert (items >= 0).all()
            assert not set(items.tolist()) & set(bad.tolist())

    @pytest.mark.parametrize("beams", [0, -1, 65_537])
    def test_refuses_beams_out_of_range(self, engine: Engine, beams: int) -> None:
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
        engine = local_engine(name)
        rng = np.random.default_rng(beams)
        table = np.unique(rng.integers(3, 3 + (60 if longest == 1 else 6), (60, longest)), axis=0)
        legal: dict[tuple[int, ...], set[int]] = {}
        for row in table.tolist():
            for depth in range(longest):
                legal.setdefault(tuple(row[:depth]), set()).add(row[depth])
        for prompt in random_prompts(beams, 2, shortest=WINDOW + 4):
            start = len(prompt)

            def after(_: int, ids: torch.Tensor, start: int = start) -> list[int]:
                return sorted(legal[tuple(ids[start:].tolist())])

            output = engine.model.generate(
                torch.tensor(prompt[None]), attention_mask=torch.ones(1, start, dtype=torch.long),
                prefix_allowed_tokens_fn=after, num_beams=beams, num_return_sequences=beams, max_new_tokens=longest,
                do_sample=False, length_penalty=0.0, early_stopping=True, eos_token_id=None, pad_token_id=0,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            expected = [tuple(row) for row in output.sequences[:, start:].tolist()]
            found = engine.beam_search([prompt], Trie.build(table), beams)
            assert [tuple(table[item].tolist()) for item in found.items[0]] == expected
            if beams > 1:  # greedy search has no sequences_scores
                np.testing.assert_allclose(found.scores[0], output.sequences_scores.numpy(), atol=1e-5)


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
