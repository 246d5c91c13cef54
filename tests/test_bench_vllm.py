from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

from genrec.benchmarks import catalogue
from genrec.benchmarks import vllm as benchmark
from genrec.cli import app
from genrec.config import VllmOptions
from genrec.decoding import Beams, Trie
from genrec.engines.local import LocalEngine
from genrec.errors import ConfigError


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_REST", 0.0)


class Llm:
    """In place of ``vllm.LLM``: beam search finds the first identifiers of its catalogue, and then no item at all."""

    def __init__(self, table: np.ndarray[Any, Any], grammars: bool = True) -> None:
        self.table, self.grammars = table, grammars
        self.prompts: list[tuple[int, ...]] = []
        self.asked: list[SimpleNamespace] = []

    def generate(self, prompts: Sequence[dict[str, Any]], sampling: SimpleNamespace, use_tqdm: bool) -> None:
        assert (sampling.max_tokens, sampling.detokenize, use_tqdm) == (1, False, False)
        assert not hasattr(sampling, "logprobs")
        self._note(prompts)

    def beam_search(self, prompts: Sequence[dict[str, Any]], asked: SimpleNamespace) -> list[SimpleNamespace]:
        self._note(prompts)
        self.asked.append(asked)
        if asked.structured_outputs is not None and not self.grammars:
            raise ValueError("no grammars here")
        sequences = [
            SimpleNamespace(tokens=[1, 2, *row], cum_logprob=-1.0 - place)
            for place, row in enumerate([*self.table.tolist()[: asked.beam_width - 1], [0] * asked.max_tokens])
        ]
        return [SimpleNamespace(sequences=sequences) for _ in prompts]

    def _note(self, prompts: Sequence[dict[str, Any]]) -> None:
        self.prompts += [tuple(prompt["prompt_token_ids"]) for prompt in prompts]


def package() -> SimpleNamespace:
    sampling = SimpleNamespace(BeamSearchParams=SimpleNamespace, StructuredOutputsParams=SimpleNamespace)
    return SimpleNamespace(SamplingParams=SimpleNamespace, sampling_params=sampling)


def model(vocabulary: int) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).eval()


def bench(llm: Llm, vocabulary: int = 40, gpus: int = 0) -> benchmark.Bench:
    engine = LocalEngine(model(vocabulary))
    prompts, peers = benchmark.Prompts(20, 6), benchmark.Peers(package(), llm)
    return benchmark.Bench(engine, engine, peers, prompts, "tiny", 2, 5, 3, 1e-3, gpus)


def identifiers(grammar: str) -> Iterator[tuple[int, ...]]:
    """All that a grammar of token ids allows, read by its words alone."""
    rules = dict(rule.split(" ::= ") for rule in grammar.split("\n"))

    def below(name: str) -> Iterator[tuple[int, ...]]:
        for way in rules[name].split(" | "):
            match = re.fullmatch(r"Token\(([\d, ]+)\)(?: (n\d+))?", way)
            assert match is not None
            for token in map(int, match[1].split(", ")):
                yield from ((token, *rest) for rest in below(match[2])) if match[2] else ((token,),)

    return below("root")


@pytest.mark.parametrize("levels", [1, 3])
def test_the_grammar_allows_the_identifiers_and_nothing_else(levels: int) -> None:
    table = catalogue(60, levels, 100 if levels == 1 else 5, 7)
    assert sorted(identifiers(benchmark.grammar(Trie.build(table)))) == sorted(map(tuple, table.tolist()))


def test_the_grammar_of_identifiers_of_unequal_lengths() -> None:
    table = np.array([[4, -1], [5, 6], [5, 7]])
    assert sorted(identifiers(benchmark.grammar(Trie.build(table)))) == [(4,), (5, 6), (5, 7)]


def test_no_prompt_comes_twice() -> None:
    prompts = benchmark.Prompts(1000, 9)
    drawn = [tuple(prompt) for _ in range(5) for prompt in prompts.draw(8)]
    assert len(set(drawn)) == 40
    assert {len(prompt) for prompt in drawn} == {9}


def test_a_written_model_has_a_word_for_each_token(tmp_path: Path) -> None:
    made = model(40)
    benchmark.write_model(made, tmp_path)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 40
    assert tokenizer.eos_token_id == 0
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.model.embed_tokens.weight, made.model.embed_tokens.weight)


def test_lists_of_a_peer_become_items() -> None:
    table = catalogue(9, 2, 4, 20)
    llm = Llm(table)
    found = benchmark.Peers(package(), llm).beam_search([np.array([3, 4])], table, 4, "root ::= Token(1)")
    assert found.items.tolist() == [[0, 1, 2, -1]]
    assert found.scores.tolist() == [[-1, -2, -3, -4]]
    asked = llm.asked[0]
    assert (asked.beam_width, asked.max_tokens, asked.ignore_eos, asked.length_penalty) == (4, 2, True, 0)
    assert asked.structured_outputs.grammar == "root ::= Token(1)"


def test_share_found_looks_at_items_alone() -> None:
    wanted = Beams(np.array([[1, 2], [3, -1]], dtype=np.int32), np.zeros((2, 2), dtype=np.float32), [None, None])
    found = Beams(np.array([[2, 9], [-1, 3]], dtype=np.int32), np.zeros((2, 2), dtype=np.float32), [None, None])
    assert benchmark.share_found(found, wanted) == 75


def test_every_side_gets_prompts_of_its_own_and_as_many() -> None:
    table = catalogue(30, 2, 6, 20)
    llm = Llm(table)
    rows = bench(llm).compare("semantic", table, 4)
    # A round to compare lists on two fixed prompts, the same for both ways; then three rounds of two prompts each.
    assert len(llm.prompts) == 2 * 2 + 3 * 2 * 2
    assert len(set(llm.prompts)) == 2 + 3 * 2 * 2
    told = {(row.what, row.unit): row for row in rows}
    assert told["vllm and local: places with another item", ""].met
    assert told["vllm and local: largest difference of scores", ""].value == 0
    assert 0 < told["LLM.beam_search: of local's items", "%"].value < 100
    assert told["vllm", "users/s"].n == "3"
    assert "5 users" in told["vllm / local", "x"].setting
    assert "2 users" in told["vllm / LLM.beam_search with a grammar", "x"].setting
    assert told["vllm: a million users", "hours"].value > 0
    assert not any(row.goal for row in rows if row.unit)  # Goals beside beam search are a GPU's.
    assert not any("LLM.generate" in row.what for row in rows)


def test_one_token_is_held_against_requests_without_log_probabilities() -> None:
    table = 20 + np.arange(12)[:, None]
    llm = Llm(table)
    rows = {row.what: row for row in bench(llm).compare("atomic", table, 3) if row.unit != "users/s"}
    assert rows["vllm / LLM.generate"].goal == ">= 0.9"
    assert rows["vllm / LLM.generate"].n == "3/3"
    # Two fixed prompts for two ways, a round of two for each, and a load of five to warm up and in every round.
    assert len(llm.prompts) == 2 * 2 + 3 * 2 * 2 + 5 + 3 * 5


def test_a_million_users_take_the_hours_of_all_gpus_and_goals_are_theirs() -> None:
    table = catalogue(60, 2, 8, 20)
    rows = {(row.what, row.unit): row for row in bench(Llm(table), gpus=2).compare("semantic", table, 50)}
    rate = rows["vllm", "users/s"]
    assert rows["vllm: a million users", "GPU-hours"].value * 3600 / 2 > 0
    assert rows["vllm / LLM.beam_search", "x"].goal == ">= 5"
    assert rows["vllm / LLM.beam_search with a grammar", "x"].goal == ""
    assert rate.goal == ""


def test_a_way_that_vllm_refuses_is_a_row_and_the_others_go_on() -> None:
    table = catalogue(30, 2, 6, 20)
    rows = bench(Llm(table, grammars=False)).compare("semantic", table, 4)
    refused = [row for row in rows if "refused" in row.what]
    assert [row.what for row in refused] == [
        "LLM.beam_search with a grammar: refused by vLLM, ValueError('no grammars here')"
    ]
    assert not any("grammar" in row.what for row in rows if row.unit)
    assert any(row.what == "vllm / LLM.beam_search" for row in rows)


def test_a_run_measures_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[VllmOptions, int]] = []

    @contextmanager
    def start(made: Any, folder: Path, dtype: str, options: VllmOptions, beams: int) -> Iterator[Any]:
        started.append((options, beams))
        yield LocalEngine(made), benchmark.Peers(package(), Llm(catalogue(60, 3, 8, 1060)))

    monkeypatch.setattr(benchmark, "start", start)
    monkeypatch.setattr(benchmark.vllms, "version", lambda: "0.32.9")
    options = VllmOptions(max_num_seqs=7)
    report = benchmark.decode(
        "random-small", parts=["semantic"], users=2, load=3, repeats=1, quick=True, options=options
    )
    assert {row.part for row in report.rows} == {"semantic"}
    assert report.agrees
    assert all(row.met is None for row in report.rows if row.unit)
    assert started == [(options, 3)]
    assert report.conditions["options"]["max_num_seqs"] == 7
    assert report.conditions["engine"] == "vllm"
    assert report.conditions["versions"]["vllm"] == "0.32.9"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--part", "semantc"], r"no part 'semantc'. Did you mean 'semantic'\?"),
        (["--load", "0"], "load is 0; it is at least 1"),
        (["--device", "cuda"], "device is 'cuda', and vLLM"),
        (["--clock", "cpu"], "--clock cpu goes with --engine local"),
        (["--data", "data/tiny"], "--data goes with --engine local"),
        (["vllm.max_num_seq=3"], "unknown key 'max_num_seq'. Did you mean 'max_num_seqs'"),
        (["tensor_parallel_size=2"], "unknown key 'tensor_parallel_size'. Write vllm.key=value"),
    ],
)
def test_a_run_refuses_what_it_does_not_know(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        CliRunner().invoke(app, ["bench", "decode", "--engine", "vllm", *arguments], catch_exceptions=False)


def test_options_of_vllm_go_with_its_engine() -> None:
    with pytest.raises(ConfigError, match=r"'vllm.max_num_seqs=3' goes with --engine vllm"):
        CliRunner().invoke(app, ["bench", "decode", "vllm.max_num_seqs=3"], catch_exceptions=False)
