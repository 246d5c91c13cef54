"""`genrec bench decode --engine vllm`: genrec's engine on vLLM, beside what vLLM itself offers and beside ``local``.

All sides run the same weights, in turn, each call on prompts of its own: a prompt that came before would lie in the
prefix cache.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from genrec import adapter, base, config, progress
from genrec.benchmarks import (
    Clock,
    Report,
    Row,
    begin,
    catalogue,
    conditions,
    figure,
    interleaved,
    median,
    without_goals,
)
from genrec.benchmarks.materials import load_model
from genrec.benchmarks.peers import disagreement
from genrec.config import Dtype, VllmOptions
from genrec.decoding import Beams, Trie
from genrec.engines import Engine
from genrec.engines import vllm as vllms
from genrec.engines.local import LocalEngine
from genrec.engines.pooled import VllmEngine
from genrec.errors import ConfigError
from genrec.toml import as_table

PARTS = ("atomic", "semantic")
"""The parts of `genrec bench decode --engine vllm`: identifiers of one token, and of three levels."""
_ITEMS, _LEVELS, _CODES = 12_000, 3, 256
_BEAMS = {"cpu": (20, 50), "cuda": (50, 128)}
_GOALS = {50: 5.0, 128: 20.0}  # Times `LLM.beam_search`, on a GPU, by beams.
_CEILING = 0.9  # Of the requests a second of one-token requests without log-probabilities.
# What one side leaves vLLM's processes to do, a grammar above all, and their waiting, would be the next side's time.
_REST = 3.0
_PATIENCE = 30.0  # Seconds that one side is measured for; a call of vLLM's beam search may take as long.
# Of a GPU's memory, at most: genrec's engine and vLLM's own methods are two engines, and ``local`` has the rest.
_MEMORY = 0.4


def grammar(trie: Trie) -> str:
    """The trie as a grammar of token ids for xgrammar: one rule for each inner node."""
    inner = ~trie.is_leaf(np.arange(len(trie.token)))
    rules = []
    for node in np.flatnonzero(inner):
        _, tokens, children = trie.children(np.array([node]))
        ends = inner[children]
        ways = [f"Token({token}) n{child}" for token, child in zip(tokens[ends], children[ends], strict=True)]
        if not ends.all():
            ways.append(f"Token({', '.join(map(str, tokens[~ends]))})")
        rules.append(f"{f'n{node}' if node else 'root'} ::= {' | '.join(ways)}")
    return "\n".join(rules)


def write_model(model: Any, folder: Path) -> None:
    """Write a model as a checkpoint, with a tokenizer that has one word for each of its tokens.

    vLLM's own beam search needs a tokenizer; what the words are does not matter to any side.
    """
    with base.quiet():
        model.save_pretrained(folder)
    words = {f"w{token}": token for token in range(model.config.vocab_size)}
    tokenizer = Tokenizer(BPE(vocab=words, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()  # xgrammar asks for the kind of a vocabulary, and knows this one.
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(folder)


@contextmanager
def start(model: Any, folder: Path, dtype: Dtype, options: VllmOptions, beams: int) -> Iterator[tuple[Engine, Peers]]:
    """The engine and vLLM's own methods, each with the model in processes of its own, until the block ends.

    Args:
        model: On the CPU.
        folder: Where it is written to.
        dtype: Of the weights.
        options: How vLLM runs, on both sides.
        beams: The most that will be asked for.
    """
    write_model(model, folder)
    engine = VllmEngine(folder, dtype=dtype, options=options)
    try:
        with vllms.generator(engine.server, **Peers.arguments(beams)) as (vllm, llm):
            yield engine, Peers(vllm, llm)
    finally:
        engine.close()


class Prompts:
    """Random prompts, none of them twice."""

    def __init__(self, vocabulary: int, tokens: int, seed: int = 0) -> None:
        self.vocabulary, self.tokens, self._rng = vocabulary, tokens, np.random.default_rng(seed)

    def draw(self, users: int) -> list[NDArray[np.int64]]:
        return list(self._rng.integers(3, self.vocabulary, size=(users, self.tokens)))


class Peers:
    """What vLLM itself offers: one-token requests, and ``LLM.beam_search``.

    Args:
        vllm: The package.
        llm: A ``vllm.LLM`` that generates, as ``arguments`` wants it.
    """

    def __init__(self, vllm: Any, llm: Any) -> None:
        self.vllm, self.llm = vllm, llm

    @staticmethod
    def arguments(beams: int) -> dict[str, Any]:
        """What the methods need of ``vllm.LLM``. Under a grammar, `processed_logprobs` is what keeps ``2 * beams``
        legal tokens in a step's list; raw log-probabilities are cut to the best of the whole vocabulary first."""
        return {
            "max_logprobs": 2 * beams,
            "logprobs_mode": "processed_logprobs",
            "structured_outputs_config": {"backend": "xgrammar"},
        }

    def generate(self, prompts: Sequence[NDArray[Any]]) -> None:
        """One token for each prompt, without log-probabilities: what one-token requests cost at least."""
        sampling = self.vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        with _unwarned():
            self.llm.generate(self._given(prompts), sampling, use_tqdm=False)

    def beam_search(
        self, prompts: Sequence[NDArray[Any]], table: NDArray[Any], beams: int, rules: str | None = None
    ) -> Beams:
        """``LLM.beam_search``, free or under a grammar; -1 stands for what is no item of ``table``."""
        sampling, levels = self.vllm.sampling_params, table.shape[1]
        constraint = None if rules is None else sampling.StructuredOutputsParams(grammar=rules)
        asked = sampling.BeamSearchParams(
            beam_width=beams, max_tokens=levels, ignore_eos=True, length_penalty=0.0, structured_outputs=constraint
        )
        with _unwarned():
            outputs = self.llm.beam_search(self._given(prompts), asked)
        index = {tuple(row): item for item, row in enumerate(table.tolist())}
        items = np.full((len(prompts), beams), -1, dtype=np.int32)
        scores = np.full((len(prompts), beams), -np.inf, dtype=np.float32)
        for row, output in enumerate(outputs):
            for place, sequence in enumerate(output.sequences):
                items[row, place] = index.get(tuple(sequence.tokens[-levels:]), -1)
                scores[row, place] = sequence.cum_logprob
        return Beams(items, scores, [None] * len(prompts))

    @staticmethod
    def _given(prompts: Sequence[NDArray[Any]]) -> list[dict[str, list[int]]]:
        return [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without what vLLM's methods warn of: they use parts of other packages that will be gone one day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def share_found(found: Beams, wanted: Beams) -> float:
    """Percent of the items of ``wanted`` that stand in the list of the same prompt in ``found``."""
    pairs = zip(found.items, wanted.items, strict=True)
    return 100 * float(np.mean([np.isin(own[own >= 0], other).mean() for other, own in pairs]))


@dataclass(frozen=True)
class Bench:
    """What one run compares.

    Attributes:
        engine, local: The two engines of genrec.
        peers: vLLM's own methods.
        prompts: Where prompts come from.
        name: Of the model.
        users: Prompts of one call of beam search.
        load: Prompts of one call at full load.
        repeats: Rounds.
        rounding: How far apart two ways to the same score may be.
        gpus: That the engine runs on; 0 on a CPU.
    """

    engine: Engine
    local: Engine
    peers: Peers
    prompts: Prompts
    name: str
    users: int
    load: int
    repeats: int
    rounding: float
    gpus: int

    def compare(self, part: str, table: NDArray[np.int64], beams: int) -> list[Row]:
        """The rows of one part at one number of beams."""
        trie, levels = Trie.build(table), table.shape[1]
        kind = "one token" if levels == 1 else f"{levels} codes"
        told = f"{self.name}, {len(table):,} items of {kind}, {self.prompts.tokens} tokens, {beams} beams"
        progress.say(told)
        few, many = f"{told}, {self.users} users", f"{told}, {self.load:,} users"
        rules, fixed = grammar(trie), self.prompts.draw(self.users)
        searches: dict[str, Callable[[Sequence[NDArray[Any]]], Beams]] = {
            "vllm": lambda prompts: self.engine.beam_search(prompts, trie, beams),
            "local": lambda prompts: self.local.beam_search(prompts, trie, beams),
            "LLM.beam_search": lambda prompts: self.peers.beam_search(prompts, table, beams),
            "LLM.beam_search with a grammar": lambda prompts: self.peers.beam_search(prompts, table, beams, rules),
        }
        found = {name: search(fixed) for name, search in searches.items() if name in ("vllm", "local")}
        rows = self._agreement(part, few, found)
        for name in ("LLM.beam_search", "LLM.beam_search with a grammar"):
            try:
                found[name] = searches[name](fixed)
            except (ValueError, RuntimeError, TypeError, AssertionError) as error:  # vLLM refuses with all of these.
                rows.append(figure(part, few, f"{name}: refused by vLLM, {error!r}"[:300], 0, ""))
                del searches[name]
            else:
                what = f"{name}: of local's items"
                rows.append(figure(part, few, what, share_found(found[name], found["local"]), "%"))
        return rows + self._times(part, few, many, searches, beams, levels)

    def _agreement(self, part: str, setting: str, found: dict[str, Beams]) -> list[Row]:
        differ, apart = disagreement(found["vllm"], found["local"], self.rounding)
        return [
            figure(part, setting, "vllm and local: places with another item", differ, "", most=0),
            figure(part, setting, "vllm and local: largest difference of scores", apart, "", most=self.rounding),
        ]

    def _times(
        self, part: str, few: str, many: str, searches: dict[str, Callable[..., Beams]], beams: int, levels: int
    ) -> list[Row]:
        def drawn(call: Callable[[Sequence[NDArray[Any]]], Any], users: int) -> Any:
            return call(self.prompts.draw(users))

        loads: dict[str, Callable[[], Any]] = {
            f"{name} at load": partial(drawn, searches[name], self.load) for name in ("vllm", "local")
        }
        if levels == 1:
            loads["LLM.generate"] = partial(drawn, self.peers.generate, self.load)
        taken = interleaved(loads, self.repeats, patience=_PATIENCE, rest=_REST)
        calls = {name: partial(drawn, search, self.users) for name, search in searches.items()}
        # What was found for the rows of agreement has warmed up all searches.
        taken |= interleaved(calls, self.repeats, patience=_PATIENCE, warm={}, rest=_REST)
        seconds = {name: median(times) for name, times in taken.items()}

        def ratio(what: str, setting: str, slow: str, fast: str, least: float | None = None) -> Row:
            samples = (taken[slow], taken[fast])
            return figure(part, setting, what, seconds[slow] / seconds[fast], "x", least=least, samples=samples)

        rate, alone = self.load / seconds["vllm at load"], [taken["vllm at load"]]
        local = self.load / seconds["local at load"]
        rows = [
            figure(part, many, "vllm", rate, "users/s", samples=alone),
            figure(part, many, "local", local, "users/s", samples=[taken["local at load"]]),
            ratio("vllm / local", many, "local at load", "vllm at load"),
        ]
        hours, unit = 1e6 / rate / 3600 * max(1, self.gpus), "GPU-hours" if self.gpus else "hours"
        rows.append(figure(part, many, "vllm: a million users", hours, unit, samples=alone))
        if levels == 1:
            ceiling, what = taken["LLM.generate"], "LLM.generate of one token, no log-probabilities"
            rows.append(figure(part, many, what, self.load / median(ceiling), "requests/s", samples=[ceiling]))
            rows.append(ratio("vllm / LLM.generate", many, "LLM.generate", "vllm at load", _CEILING))
        rows += [
            figure(part, few, name, self.users / seconds[name], "users/s", samples=[taken[name]]) for name in searches
        ]
        for name in searches:
            if name.startswith("LLM"):
                least = _GOALS.get(beams) if self.gpus and levels > 1 and name == "LLM.beam_search" else None
                rows.append(ratio(f"vllm / {name}", few, name, "vllm", least))
        return rows


def check(device: str, clock: Clock, data: Path | None) -> None:
    """Refuse what `genrec bench decode` takes with ``local`` alone.

    Raises:
        ConfigError: A device, processor time, or a data set is given.
    """
    config.check_vllm_device(device)
    for told, given in (("--clock cpu", clock != "wall"), ("--data", data is not None)):
        if given:
            raise ConfigError(f"bench decode: {told} goes with --engine local. Leave it out beside --engine vllm.")


def decode(
    model: str = "smollm2",
    *,
    parts: Sequence[str] = PARTS,
    users: int = 4,
    load: int = 1000,
    threads: int | None = None,
    repeats: int = 5,
    dtype: Dtype = "float32",
    quick: bool = False,
    tokens: int | None = None,
    beams: int | None = None,
    options: VllmOptions | None = None,
) -> Report:
    """`genrec bench decode --engine vllm`: users a second of genrec's vLLM engine, of vLLM's own one-token requests and
    beam search, and of ``local``, all with the same random prompts and identifiers, in one run.

    Args:
        model: A base, by name or folder, or ``random-small``, ``random-135m`` or ``random-0.6b``.
        parts: Which of ``PARTS``.
        users: Prompts of a call beside ``LLM.beam_search``.
        load: Prompts of a call beside ``LLM.generate``, and of the users a second.
        threads: PyTorch's, for ``local``; unset: as it is.
        repeats: Rounds whose medians are reported.
        dtype: Of the weights.
        quick: Tiny settings that show that everything runs; their times mean nothing and have no goals.
        tokens: Of each prompt; unset: 100.
        beams: Unset: 20 and 50 on a CPU, 50 and 128 on a GPU.
        options: How vLLM runs. Of a GPU's memory each of the two engines takes at most .4.

    Raises:
        ConfigError: An unknown part, a number out of range, or vLLM is not installed here.
        AdapterError: No such base.
        EngineError: vLLM died or stopped answering.
    """
    numbers = {"users": users, "load": load, "repeats": repeats, "tokens": tokens, "beams": beams}
    begin("decode --engine vllm", parts, PARTS, threads, **numbers)
    vllms.version()  # Refused here, where it is missing, and not after a model was made.
    cuda = torch.cuda.is_available()
    options = options or VllmOptions()
    if cuda:
        options = replace(options, gpu_memory_utilization=min(_MEMORY, options.gpu_memory_utilization))
    load = min(load, 8) if quick else load
    tokens = tokens or (12 if quick else 100)
    items, codes = (60, 8) if quick else (_ITEMS, _CODES)
    chosen = (beams,) if beams is not None else (3,) if quick else _BEAMS["cuda" if cuda else "cpu"]
    loaded = load_model(model, getattr(torch, dtype))
    vocabulary = loaded.get_input_embeddings().weight.shape[0]
    adapter.resize(loaded, vocabulary + items + _LEVELS * codes)
    tables = {
        "atomic": vocabulary + np.arange(items, dtype=np.int64)[:, None],
        "semantic": catalogue(items, _LEVELS, codes, vocabulary + items),
    }
    given = {
        "engine": "vllm", "model": model, "parts": list(parts), "users": users, "load": load, "repeats": repeats,
        "dtype": dtype, "quick": quick, "tokens": tokens, "beams": list(chosen), "items": items,
        "options": as_table(options),
    }  # fmt: skip
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory() as name,
        start(loaded, Path(name), dtype, options, max(chosen)) as (engine, peers),
    ):
        local = LocalEngine(loaded.to("cuda" if cuda else "cpu"))
        gpus = options.tensor_parallel_size * options.data_parallel_size if cuda else 0
        rounding = 1e-3 if dtype == "float32" else 0.25
        bench = Bench(engine, local, peers, Prompts(vocabulary, tokens), model, users, load, repeats, rounding, gpus)
        for part in PARTS:
            if part in parts:
                for width in chosen:
                    rows += bench.compare(part, tables[part], width)
    if quick:
        rows = without_goals(rows)
    found = conditions(**given)
    found["versions"]["vllm"] = vllms.version()
    return Report(found, rows, "decode")
