"""`genrec bench decode`: the local engine beside `generate`, and beside the floor that operations give."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    DynamicCache,
    LogitsProcessorList,
)

from genrec import adapter, base, config, files, progress, training
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
from genrec.benchmarks.materials import generated_data, load_model, shipped_prompt
from genrec.benchmarks.peers import TrieMask, disagreement, generate, generated, prefix_function
from genrec.dataset import Dataset
from genrec.decoding import Beams, Trie
from genrec.engines.local import LocalEngine
from genrec.errors import AdapterError, ConfigError, PromptError
from genrec.prompts import Prompt
from genrec.recommender import Recommender
from genrec.tokenization import make_frame, plain_tokenizer

PARTS = ("generate", "floor", "atomic", "prefix", "throughput", "profile", "beam-loss")
"""The parts of `genrec bench decode`, in their order."""
SETTINGS = ((100, 20), (200, 50))
_ITEMS, _LEVELS, _CODES = 12_000, 4, 256
_LARGE = 50_000_000  # Multiplications per position in the blocks.


# The floor.


def operations(model: Any) -> tuple[int, int]:
    """Multiplications per position: in the blocks, and in the head over the whole vocabulary.

    Attention's own products, which grow with the length, are not counted; at 200 positions they are a few per cent.
    """
    head = model.get_output_embeddings().weight
    outside = {id(head), id(model.get_input_embeddings().weight)}
    body = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in outside)
    return body, head.numel()


def floor(model: Any, length: int, trie: Trie, beams: int) -> float:
    """The fewest operations of an exact search, in prefills: the prompt once, and every live beam of every later level
    once, each with the logits of the whole vocabulary, which its normaliser needs."""
    body, head = operations(model)
    nodes, fed = np.zeros(1, dtype=np.int64), 0
    while True:
        nodes = trie.children(nodes)[2]
        inner = nodes[~trie.is_leaf(nodes)]
        if not len(inner):
            break
        fed += min(beams, len(inner))
        nodes = inner
    return 1 + fed * (body + head) / (length * body + head)


def prefill(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    """One forward of whole prompts into a cache, with the head on the last position: what every method pays once."""
    with torch.inference_mode():
        cache = DynamicCache()
        return model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits


class _Told(LocalEngine):
    """An engine that tells the shapes of its forwards: (sequences, positions), and positions whose logits it kept."""

    def __init__(self, model: Any) -> None:
        self.forwards: list[tuple[torch.Size, int]] = []
        super().__init__(model)

    def _forward(self, inputs: torch.Tensor, keep: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.forwards.append((inputs.shape, keep))
        return super()._forward(inputs, keep, *args, **kwargs)


def bare(model: Any, forwards: Sequence[tuple[torch.Size, int]]) -> None:
    """Forwards of these shapes and nothing else: no cache, no mask, no search."""
    with torch.inference_mode():
        for shape, keep in forwards:
            inputs = torch.zeros(shape, dtype=torch.long, device=model.device)
            model(input_ids=inputs, use_cache=False, logits_to_keep=keep)


# The parts.


def _random_prompts(vocabulary: int, lengths: Sequence[int], seed: int = 0) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, size=length) for length in lengths]


@dataclass(frozen=True)
class _Bench:
    """What the parts of `genrec bench decode` share."""

    model: Any
    name: str
    vocabulary: int
    users: int
    repeats: int
    clock: Clock
    settings: tuple[tuple[int, int], ...]
    items: int
    large: int
    has_goals: bool  # Whether it is the model, dtype and number of users that the goals beside `generate` are for.
    exact: Any = None  # The model in float32, where the other one is not.

    @property
    def is_large(self) -> bool:
        """Whether arithmetic outweighs Python's own share of a forward, which the goals beside the floor assume."""
        return operations(self.model)[0] >= _LARGE

    @property
    def rounding(self) -> float:
        """How far apart two ways to the same score may be."""
        return 1e-4 if self.model.dtype.itemsize >= 4 else 0.25

    def codes(self) -> tuple[NDArray[np.int64], Trie]:
        table = catalogue(self.items, _LEVELS, _CODES, self.vocabulary)
        return table, Trie.build(table)

    def inputs(self, prompts: Sequence[NDArray[Any]]) -> torch.Tensor:
        return torch.from_numpy(np.stack(prompts)).long().to(self.model.device)


def _generate_and_floor(bench: _Bench, length: int, beams: int, peers: bool) -> list[Row]:
    """One setting: the engine, both ways of `generate` if ``peers``, and a prefill, in turn.

    What the sides answer is compared in the round that warms up, with half of the prompts; `generate` is asked for
    scores there alone.
    """
    table, trie = bench.codes()
    engine, prompts = _Told(bench.model), _random_prompts(bench.vocabulary, [length] * bench.users)
    setting = f"{length} tokens, {beams} beams"
    progress.say(f"{setting}: {'engine, generate, prefill' if peers else 'engine, prefill'}")
    found: dict[str, Beams] = {}
    constraints: dict[str, dict[str, Any]] = {
        "mask": {"logits_processor": LogitsProcessorList([TrieMask(trie, length)])},
        "function": {"prefix_allowed_tokens_fn": prefix_function(table, length)},
    }
    ways = constraints if peers else {}
    half = prompts[: (bench.users + 1) // 2]

    def searched(some: list[NDArray[np.int64]]) -> None:
        engine.forwards = []
        found["engine"] = engine.beam_search(some, trie, beams)

    def compared(way: str) -> None:
        found[way] = generate(bench.model, half, table, beams, **ways[way])

    calls: dict[str, Callable[[], Any]] = {
        "prefill": partial(prefill, bench.model, bench.inputs(prompts)),
        "engine": partial(searched, prompts),
        "bare": lambda: bare(bench.model, engine.forwards),
    }
    calls |= {
        way: partial(generated, bench.model, bench.inputs(prompts), _LEVELS, beams, **how) for way, how in ways.items()
    }
    warm = calls | {"engine": partial(searched, half)} | {way: partial(compared, way) for way in ways}
    taken = interleaved(calls, bench.repeats, bench.clock, warm=warm)
    seconds = {name: median(times) for name, times in taken.items()}
    own = Beams(found["engine"].items[: len(half)], found["engine"].scores[: len(half)], [])
    rows = []
    if peers:
        goal = {SETTINGS[0]: 12.0, SETTINGS[1]: 30.0}.get((length, beams)) if bench.has_goals else None
        for name, what, least in (
            ("function", "generate with prefix_allowed_tokens_fn", goal),
            ("mask", "generate with a vectorised mask", None),
        ):
            differ, apart = disagreement(own, found[name], bench.rounding)
            times, ratio = (taken[name], taken["engine"]), seconds[name] / seconds["engine"]
            rows += [
                figure("generate", setting, f"{what}, per user", seconds[name] / bench.users, "s", samples=times[:1]),
                figure("generate", setting, f"{what} / engine", ratio, "x", least=least, samples=times),
                figure("generate", setting, f"{what}: places with another item", differ, "", most=0),
                figure("generate", setting, f"{what}: largest difference of scores", apart, "", most=bench.rounding),
            ]
    if bench.exact is not None:
        exact = LocalEngine(bench.exact).beam_search(half, trie, beams).items
        same = np.mean([len(set(a) & set(b)) / beams for a, b in zip(exact.tolist(), own.items.tolist(), strict=True)])
        rows.append(figure("floor", setting, "items found that float32 finds too", 100 * float(same), "%"))
    least_prefills, reached = floor(bench.model, length, trie, beams), seconds["engine"] / seconds["prefill"]
    one, alone = [taken["engine"]], [taken["prefill"]]
    most = 1.15 if bench.is_large else None
    return [
        *rows,
        figure("floor", setting, "engine, per user", seconds["engine"] / bench.users, "s", samples=one),
        figure("floor", setting, "prefill alone, per user", seconds["prefill"] / bench.users, "s", samples=alone),
        figure("floor", setting, "floor by operations", least_prefills, "prefills"),
        figure("floor", setting, "reached", reached, "prefills", samples=one + alone),
        figure(
            "floor",
            setting,
            "reached / floor",
            reached / least_prefills,
            "x",
            most=most,
            samples=one + alone,
        ),
        figure(
            "floor",
            setting,
            "engine / its own forwards bare",
            seconds["engine"] / seconds["bare"],
            "x",
            samples=[taken["engine"], taken["bare"]],
        ),
    ]


def _best_tokens(logits: torch.Tensor, first: int, allowed: Any, blocked: Sequence[Any], k: int) -> Beams:
    """The best items of one token each by a masked top-k of a prefill's logits [n, 1, vocabulary]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = torch.log_softmax(logits[:, 0].to(dtype), dim=-1)[:, first:].cpu().numpy()
    scores[:, ~allowed] = -np.inf
    for row, items in zip(scores, blocked, strict=True):
        row[items] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)
    picked = np.take_along_axis(scores, best, axis=1).astype(np.float32)
    return Beams(np.where(np.isfinite(picked), best, -1), picked, [None] * len(best))


def _atomic(bench: _Bench, items: int) -> list[Row]:
    """One token per item: everything beside the prefill is a normaliser, masks and a top-k."""
    progress.say(f"atomic identifiers, {items:,} items")
    length = bench.settings[0][0]
    adapter.resize(bench.model, bench.vocabulary + items)
    engine, rng = LocalEngine(bench.model), np.random.default_rng(0)
    trie = Trie.build(bench.vocabulary + np.arange(items)[:, None])
    prompts = _random_prompts(bench.vocabulary, [length] * bench.users)
    inputs, allowed = bench.inputs(prompts), rng.random(items) < 0.9
    blocked = [rng.choice(items, size=min(200, items // 2), replace=False) for _ in prompts]
    calls: dict[str, Callable[[], Any]] = {
        "prefill": lambda: prefill(bench.model, inputs),
        "engine": lambda: engine.beam_search(prompts, trie, 50, allowed, blocked),
    }
    taken = interleaved(calls, 2 * bench.repeats + 1, bench.clock)
    seconds = {name: median(times) for name, times in taken.items()}
    setting = f"{items:,} items, {length} tokens, 50 best, masks"
    logits = prefill(bench.model, inputs)
    # The model is larger where a part before needed more tokens: what is left over is no item.
    mask = np.append(allowed, np.zeros(logits.shape[-1] - bench.vocabulary - items, dtype=bool))
    expected = _best_tokens(logits, bench.vocabulary, mask, blocked, min(50, items))
    differ, _ = disagreement(engine.beam_search(prompts, trie, 50, allowed, blocked), expected, bench.rounding)
    ratio, both = seconds["engine"] / seconds["prefill"], [taken["engine"], taken["prefill"]]
    what = "engine / prefill with the head on the last position"
    return [
        figure("atomic", setting, "engine, per user", seconds["engine"] / bench.users, "s", samples=both[:1]),
        figure("atomic", setting, what, ratio, "x", most=1.05 if bench.is_large else None, samples=both),
        figure("atomic", setting, "places that differ from a masked top-k of the prefill", differ, "", most=0),
    ]


class _Unshared(LocalEngine):
    """Prefills every prompt whole."""

    def _prefill_common(self, prompts: Any) -> None:
        return None


class _Fixed(LocalEngine):
    """Takes every load as one batch, whatever the memory."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, max_batch_tokens=2**40)

    def _memory(self) -> int:
        return 2**60


_HEAD = (
    "You recommend products of a shop. You read what a customer bought, oldest first, each product by its identifier, "
    "and you name the product that the customer buys next. Look for what goes together: a refill of what runs out, "
    "the "
    "next part of a series, an accessory of something new, the same brand in another kind, and the season of the last "
    "purchases. What was bought last says more than what was bought long ago, and what was bought twice says more than "
    "what was bought once. Do not name what the customer has already, unless it is used up. Do not explain anything. "
    "Answer with one identifier of the catalogue and nothing else: not a title, not a brand, not a price. "
)


def _common_prefix(bench: _Bench) -> list[Row]:
    """What all prompts of a load begin with: the head of the shipped prompt, and of one with a long system block."""
    return [*_one_prefix(bench, "shipped prompt", ""), *_one_prefix(bench, "long prompt", _HEAD)]


def _one_prefix(bench: _Bench, name: str, system: str) -> list[Row]:
    table, trie = bench.codes()
    try:
        tokenizer = base.find("smollm2" if bench.name.startswith("random-") else bench.name).tokenizer()
    except (AdapterError, PromptError):
        length = 180 if system else 12
        head = _random_prompts(bench.vocabulary, [length])[0]
        progress.say(f"the model brings no tokenizer: a head of {length} random tokens")
    else:
        block = f"{{% block system %}}{system}{{% endblock %}}" if system else ""
        prompt = Prompt.parse(block + shipped_prompt("next_item"), "next_item")
        frame, plain = make_frame(tokenizer, system=bool(system)), plain_tokenizer(tokenizer)
        told = [
            [token for part in prompt.render(block) for token in plain.encode(part.text, add_special_tokens=False).ids]
            for block in ("system", "user")
        ]
        ids = frame.before_system + told[0] + frame.before_user + told[1] + frame.before_answer
        head = np.array(ids, dtype=np.int64)
    head = head[: getattr(bench.model.config, "max_position_embeddings", 8192) // 2]
    rng = np.random.default_rng(0)
    prompts = [
        np.concatenate([head, table[rng.integers(len(table), size=rng.integers(1, 16))].ravel()])
        for _ in range(4 * bench.users)
    ]
    progress.say(f"a common prefix of {len(head)} tokens")
    shared, whole = LocalEngine(bench.model), _Unshared(bench.model)
    found: dict[str, Beams] = {}

    def searched(name: str, engine: LocalEngine) -> None:
        found[name] = engine.beam_search(prompts, trie, 20)

    calls = {name: partial(searched, name, engine) for name, engine in (("shared", shared), ("whole", whole))}
    seconds = interleaved(calls, bench.repeats, bench.clock)
    ratio = median(seconds["whole"]) / median(seconds["shared"])
    differ, _ = disagreement(found["shared"], found["whole"], bench.rounding)
    setting = f"{name}, head of {len(head)} tokens, 1-15 items, {len(prompts)} users, 20 beams"
    what = "every prompt prefilled whole / common prefix once"
    return [
        figure("prefix", setting, what, ratio, "x", least=1 if system else None, samples=list(seconds.values())),
        figure("prefix", setting, "places that differ", differ, "", most=0),
    ]


def _throughput(bench: _Bench, load: int) -> list[Row]:
    """Users a second at prompts of unequal lengths, with a base as small as the quickstart's and with the model."""
    small = load_model("random-small", bench.model.dtype, str(bench.model.device))
    adapter.resize(small, 1000 + _LEVELS * _CODES)
    few = min(load, 8 * bench.users)
    return [
        *_batches(bench, "small base", small, 1000, load, (1, 8, 32, 128, 512)),
        *_batches(bench, bench.name, bench.model, bench.vocabulary, few, (1, 4, 16, 32)),
    ]


def _batches(bench: _Bench, name: str, model: Any, vocabulary: int, users: int, peers: Sequence[int]) -> list[Row]:
    """The engine's own batches beside fixed ones of users sorted by length, the strongest peer of a fixed size.

    The goal is the small base's: with a larger model there are fewer users.
    """
    trie = Trie.build(catalogue(bench.items, _LEVELS, _CODES, vocabulary))
    items = np.random.default_rng(0).geometric(0.08, size=users).clip(max=48)
    prompts = sorted(_random_prompts(vocabulary, (4 + _LEVELS * items).tolist()), key=len, reverse=True)
    engine, fixed = LocalEngine(model), _Fixed(model)
    progress.say(f"throughput: {users:,} users, {name}")

    def in_batches(size: int) -> None:
        parts = [fixed.beam_search(prompts[at : at + size], trie, 20) for at in range(0, users, size)]
        found[size] = Beams(np.concatenate([p.items for p in parts]), np.concatenate([p.scores for p in parts]), [])

    def in_own_batches() -> None:
        found[0] = engine.beam_search(prompts, trie, 20)

    found: dict[int, Beams] = {}
    calls: dict[str, Callable[[], Any]] = {"engine": in_own_batches}
    calls |= {f"{size}": partial(in_batches, size) for size in peers if size <= users}
    seconds = interleaved(calls, bench.repeats, bench.clock)
    rates = {key: users / median(taken) for key, taken in seconds.items()}
    own = rates.pop("engine")
    best = max(rates, key=rates.__getitem__)
    differ = sum(disagreement(found[0], found[size], bench.rounding)[0] for size in found)
    setting = f"{name}, {users:,} users of {len(prompts[-1])}-{len(prompts[0])} tokens, 20 beams"
    return [
        figure("throughput", setting, "engine", own, "users/s", samples=[seconds["engine"]]),
        *(
            figure("throughput", setting, f"fixed batches of {key}", rate, "users/s", samples=[seconds[key]])
            for key, rate in rates.items()
        ),
        figure(
            "throughput", setting, f"engine / best fixed size ({best})", own / rates[best], "x",
            least=0.85 if name == "small base" else None, samples=[seconds["engine"], seconds[best]],
        ),
        figure("throughput", setting, "places that differ, all sizes", differ, "", most=0),
    ]  # fmt: skip


def _profile(bench: _Bench) -> list[Row]:
    """Where the time of a search goes, by operation."""
    from torch.profiler import ProfilerActivity, profile

    _, trie = bench.codes()
    engine, rows = LocalEngine(bench.model), []
    cuda = bench.model.device.type == "cuda"
    for length, beams in bench.settings:
        prompts = _random_prompts(bench.vocabulary, [length] * bench.users)
        engine.beam_search(prompts, trie, beams)
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as taken:
            began = time.perf_counter()
            engine.beam_search(prompts, trie, beams)
            if cuda:
                torch.cuda.synchronize()
            wall = 1e6 * (time.perf_counter() - began)
        spent = [(e.key, e.self_device_time_total if cuda else e.self_cpu_time_total) for e in taken.key_averages()]
        total = max(wall, sum(time_ for _, time_ in spent))
        outside = 100 * (1 - sum(time_ for _, time_ in spent) / total)
        rows.append(figure("profile", f"{length} tokens, {beams} beams", "outside of operators", outside, "%"))
        for name, time_ in sorted(spent, key=lambda pair: -pair[1])[:8]:
            rows.append(figure("profile", f"{length} tokens, {beams} beams", name, 100 * time_ / total, "%"))
    return rows


def _beam_loss(data: Path | None, quick: bool) -> list[Row]:
    """How much of the exact top 10 a beam search of a few beams finds, with an adapter trained here."""
    loaded = Dataset.load(data) if data is not None else generated_data(*((200, 120) if quick else ()))
    n = len(loaded.item_ids)
    codes = max(4, int(np.ceil(n ** (1 / 3))) * 2)
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        (root / "prompts").mkdir()
        files.write_text(root / "prompts" / "next_item.jinja", shipped_prompt("next_item"))
        base.create(loaded.items["title"].to_list(), root / "adapters" / "random", vocabulary=600)
        loaded.save(root / "data" / "log")
        recipe = config.Recipe(
            base="adapters/random", data="data/log", tasks=(config.Task("prompts/next_item.jinja"),), tuning="full",
            max_length=96, dropout=0.1, identifiers=config.IdentifierRecipe("semantic", 3, codes),
            validation=config.Validation(users=200),
            training={"num_train_epochs": 1 if quick else 4, "learning_rate": 2e-3, "per_device_train_batch_size": 16},
        )  # fmt: skip
        began = time.perf_counter()
        progress.say(f"beam loss: training on {len(loaded.user_ids):,} users and {n:,} items")
        trained = Recommender.load(training.train(recipe, loaded, name="bench", workspace=root))
        took = time.perf_counter() - began
        cases = loaded.split("leave_one_out").test
        chosen = np.arange(min(len(cases), 20 if quick else 200))
        histories = [cases.histories[i] for i in chosen]
        exact = trained.search(histories, 10, num_beams=n).items
        rows = []
        setting = (
            f"{'generated data' if data is None else data.name}, {n:,} items of 3 x {codes} codes, {len(chosen)} users"
            f", a small random base trained for {took:.0f} s in float32"
        )
        for beams in (10, 20, 50):
            found = trained.search(histories, 10, num_beams=beams).items
            hits = [
                len(set(a[a >= 0]) & set(b[b >= 0])) / max(1, (b >= 0).sum()) for a, b in zip(found, exact, strict=True)
            ]
            what = f"of the exact top 10 found with {beams} beams"
            rows.append(figure("beam-loss", setting, what, 100 * float(np.mean(hits)), "%"))
    return rows


def decode(
    model: str = "smollm2",
    *,
    parts: Sequence[str] = PARTS,
    users: int = 4,
    load: int = 1000,
    threads: int | None = None,
    repeats: int = 5,
    clock: Clock = "wall",
    device: str = "cpu",
    dtype: config.Dtype = "float32",
    data: Path | None = None,
    quick: bool = False,
    tokens: int | None = None,
    beams: int | None = None,
) -> Report:
    """`genrec bench decode`: the engine beside its peers and the floor.

    Args:
        model: A base, by name or folder, or ``random-small``, ``random-135m`` or ``random-0.6b``.
        parts: Which of ``PARTS``.
        users: Prompts of one call.
        load: Users of the throughput part.
        threads: PyTorch's; unset: as it is.
        repeats: Rounds whose medians are reported.
        clock: ``cpu`` counts processor time, for a machine that does other things too.
        device, dtype: Where and how the model runs.
        data: A data set folder for the part ``beam-loss``; unset: generated data.
        quick: Tiny settings that show that everything runs; their times mean nothing and have no goals.
        tokens, beams: One setting of your own instead of ``SETTINGS``, both or none.

    Raises:
        ConfigError: An unknown part, or a number out of range.
        AdapterError: No such base.
    """
    if (tokens is None) != (beams is None):
        raise ConfigError("bench decode: --tokens and --beams make a setting together; give both.")
    begin("decode", parts, PARTS, threads, users=users, load=load, repeats=repeats, tokens=tokens, beams=beams)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device is {device!r}, and PyTorch refused it: {error}") from error
    load = min(load, 40) if quick else load
    settings, items, large = (((12, 3),), 60, 90) if quick else (SETTINGS, _ITEMS, 200_000)
    if tokens is not None and beams is not None:
        settings = ((tokens, beams),)
    given = {
        "model": model, "parts": list(parts), "users": users, "load": load, "repeats": repeats, "clock": clock,
        "device": device, "dtype": dtype, "data": None if data is None else str(data), "quick": quick,
        "settings": [list(setting) for setting in settings], "items": items,
    }  # fmt: skip
    rows: list[Row] = []
    if set(parts) - {"beam-loss"}:
        halved = dtype != "float32" and "floor" in parts
        loaded = load_model(model, torch.float32 if halved else getattr(torch, dtype), device)
        vocabulary = loaded.get_input_embeddings().weight.shape[0]
        adapter.resize(loaded, vocabulary + _LEVELS * _CODES)
        exact = loaded if halved else None
        if exact is not None:
            loaded = copy.deepcopy(exact).to(getattr(torch, dtype))
        has_goals = (model, dtype, users) == ("smollm2", "float32", 4)
        bench = _Bench(loaded, model, vocabulary, users, repeats, clock, settings, items, large, has_goals, exact)
        if {"generate", "floor"} & set(parts):
            for length, beams in settings:
                found = _generate_and_floor(bench, length, beams, "generate" in parts)
                rows += [row for row in found if row.part in parts]
        if "prefix" in parts:
            rows += _common_prefix(bench)
        if "throughput" in parts:
            rows += _throughput(bench, load)
        if "profile" in parts:
            rows += _profile(bench)
        if "atomic" in parts:  # Last: it enlarges the vocabulary.
            rows += [*_atomic(bench, items), *_atomic(bench, large)]
    if "beam-loss" in parts:
        rows += _beam_loss(data, quick)
    if quick:
        rows = without_goals(rows)
    return Report(conditions(**given), sorted(rows, key=lambda row: PARTS.index(row.part)), "decode")
