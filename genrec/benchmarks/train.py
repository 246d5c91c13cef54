"""`genrec bench train`: what a training step costs beside a plain loop, and what a row of a whole history is worth."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model

from genrec import adapter, base, config, progress, tuning
from genrec.benchmarks import CLOCKS, Clock, Report, Row, begin, conditions, figure, interleaved, median, without_goals
from genrec.benchmarks.materials import generated_data, load_model, random_log, shipped_prompt
from genrec.benchmarks.rows import by_budget, pack, packed, padding, per_target
from genrec.benchmarks.timed import Timed
from genrec.curriculum import Plan, Rows, plan
from genrec.dataset import Dataset
from genrec.engines.local import LocalEngine
from genrec.errors import ConfigError
from genrec.identifiers import Identifiers
from genrec.options import LORA_DEFAULTS
from genrec.prompts import Prompt
from genrec.splits import Split
from genrec.tokenization import IGNORE, Tokenization, add_identifier_tokens
from genrec.trainer import OWN_INPUTS, TRL_TRAINER, ready
from genrec.validation import ValidationSet

PARTS = ("step", "rows", "items", "padding", "accuracy")
"""The parts of `genrec bench train`, in their order."""
ITEMS_GOALS = {"beauty": 4.0, "movielens-100k": 15.0}
"""By the name of a data set: supervised items a second of whole histories, over those of one row per target."""
# The blocks of the shipped prompts of these names.
SHARES = {"title_to_item": 0.1, "item_to_title": 0.1, "titles_to_item": 1.0, "click": 1.0}
"""The weights of questions beside next_item."""

Batch = Mapping[str, torch.Tensor]
Way = Literal["full", "lora"]
Loss = Callable[[Any, Batch], torch.Tensor]


@dataclass(frozen=True)
class Size:
    """A model, its identifiers and its batches.

    Attributes:
        name: As it is told.
        model: The name of a base, or empty for a small one that is made here.
        width, layers: Of the small one.
        items: Of the generated log; 0: as the data set has them.
        scheme: Of the identifiers; 4 levels of 256 codes where it has levels.
        max_length, batch, steps: Tokens of a row, rows of a batch, steps of a round.
    """

    name: str
    model: str = ""
    width: int = 64
    layers: int = 2
    items: int = 0
    scheme: str = "atomic"
    max_length: int = 128
    batch: int = 16
    steps: int = 20


@dataclass(frozen=True)
class _Setup:
    """What training needs: a model with identifier rows, on a data set, before anything is put on it."""

    size: Size
    model: Any
    recipe: config.Recipe
    prompts: list[Prompt]
    tokenization: Tokenization
    data: Dataset
    split: Split

    @property
    def ids(self) -> torch.Tensor:
        return adapter.identifier_ids(self.tokenization)

    @property
    def pad(self) -> int:
        return int(self.tokenization.tokenizer.pad_token_id)

    def rows(self, made: Plan) -> Rows:
        train, events = self.split.train, self.split.train_events
        return Rows(made, self.prompts, self.tokenization, train, self.data.user_rows, events=events)

    def whole(self, epochs: int = 1) -> Plan:
        """The plan of a recipe: every row trains all its items."""
        return plan(
            self.recipe, self.prompts, self.tokenization, self.split.train, None, self.data.user_rows,
            epochs=epochs, batch_size=self.size.batch, events=self.split.train_events,
        )  # fmt: skip


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"  # As the trainer chooses it.


def _setup(size: Size, data: Dataset, root: Path, way: Way = "full", questions: bool = False, **recipe: Any) -> _Setup:
    """A model for ``data``; a model of random weights has the tokenizer of a small base."""
    name = size.model
    if not name or name.startswith("random-"):
        small = root / f"base-{size.width}-{size.layers}-{len(data.item_ids)}"
        if not small.exists():
            base.create(data.items["title"].to_list(), small, width=size.width, layers=size.layers)
        tokenizer = base.find(str(small)).tokenizer()
        model = load_model(name or str(small), device=_device())
    else:
        tokenizer, model = base.find(name).tokenizer(), load_model(name, device=_device())
    made = Identifiers.build(size.scheme, data.item_ids, levels=4, codes=256)
    add_identifier_tokens(tokenizer, made)
    asked = [name for name in SHARES if name != "click" or "rating" in data.interactions.columns] if questions else []
    prompts = [Prompt.parse(shipped_prompt(name), name) for name in ("next_item", *asked)]
    tasks = tuple(config.Task(f"prompts/{prompt.name}.jinja", SHARES.get(prompt.name, 1.0)) for prompt in prompts)
    tokenization = Tokenization(tokenizer, made, data.items, max_length=size.max_length)
    adapter.resize(model, len(tokenizer))
    told = {
        "learning_rate": 1e-3, "weight_decay": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "per_device_train_batch_size": size.batch, "optim": "adamw_torch_fused",
    }  # fmt: skip
    filled = config.Recipe(
        base=name or "small", data="data", tasks=tasks, tuning=way, max_length=size.max_length,
        identifiers=config.IdentifierRecipe(size.scheme, 4, 256), training=told | recipe.pop("training", {}), **recipe,
    )  # fmt: skip
    setup = _Setup(size, model, filled, prompts, tokenization, data, data.split("leave_one_out"))
    tuning.start_rows(model, setup.ids, None, 0)
    return setup


# The plain loop.


def plain_loss(model: Any, batch: Batch) -> torch.Tensor:
    """What `model(..., labels=...)` gives: the head on every position."""
    loss: torch.Tensor = model(**batch, use_cache=False).loss
    return loss


def knowing_loss(model: Any, batch: Batch) -> torch.Tensor:
    """The same loss with the head on labelled positions alone. Of all labels, or their mean."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden = inner.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    mask = labels != IGNORE
    return torch.nn.functional.cross_entropy(inner.get_output_embeddings()(hidden[mask]).float(), labels[mask])


def _loop(
    model: Any, batches: Sequence[Batch], loss_of: Loss, rate: float, told: Callable[[torch.Tensor], None]
) -> None:
    """A training loop as one writes it: AdamW, gradients clipped; ``told`` hears of every step's loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    model.train()
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        told(loss.detach())


def with_peft_rows(setup: _Setup) -> Any:
    """LoRA with the identifier rows as PEFT trains them."""
    torch.manual_seed(0)
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in setup.model.named_modules()}
    layers = [setup.model.get_input_embeddings()]
    if not setup.model.config.tie_word_embeddings:
        layers.append(setup.model.get_output_embeddings())
    rows = {names[id(layer)]: setup.ids.tolist() for layer in layers}
    return get_peft_model(copy.deepcopy(setup.model), LoraConfig(**LORA_DEFAULTS, trainable_token_indices=rows))


def with_own_rows(setup: _Setup) -> Any:
    """LoRA with the identifier rows as genrec trains them."""
    torch.manual_seed(0)
    return tuning.with_lora(copy.deepcopy(setup.model), setup.recipe, setup.ids)


def _whole_model(setup: _Setup) -> Any:
    return copy.deepcopy(setup.model)


@dataclass
class _Times(transformers.TrainerCallback):
    """Moments of the ends of steps, and their losses."""

    clock: Clock
    ends: list[float] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)

    def end(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(CLOCKS[self.clock]())

    def step(self, loss: torch.Tensor) -> None:
        self.losses.append(loss)
        self.end()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end()

    def each(self, warm: int) -> float:
        """Seconds per step, but for the first ``warm``."""
        return (self.ends[-1] - self.ends[warm - 1]) / (len(self.ends) - warm)


def _in_trainer(setup: _Setup, build: Callable[[_Setup], Any], rows: Rows, clock: Clock, theirs: bool) -> _Times:
    """A round in genrec's trainer, or in the same with the loss that TRL's own trainer has."""
    times, model = _Times(clock), build(setup)
    with ready(setup.recipe, rows, model, times) as made:
        trainer: Any = made
        own = trainer.compute_loss

        def recorded(model: Any, inputs: Any, **options: Any) -> torch.Tensor:
            if theirs:
                plain = {key: value for key, value in inputs.items() if key not in OWN_INPUTS}
                loss = TRL_TRAINER.compute_loss(trainer, model, plain, **options)
            else:
                loss = own(model, inputs, **options)
            times.losses.append(loss.detach())
            return cast(torch.Tensor, loss)

        trainer.compute_loss = recorded
        trainer.train()
    return times


def _in_loop(
    setup: _Setup, build: Callable[[_Setup], Any], batches: Sequence[Batch], clock: Clock, loss_of: Loss
) -> _Times:
    times = _Times(clock)
    _loop(build(setup), batches, loss_of, float(setup.recipe.training["learning_rate"]), times.step)
    return times


def _rounds(
    sides: Mapping[str, Callable[[], _Times]], warm: int, repeats: int, patience: float = 120.0
) -> tuple[dict[str, list[float]], float]:
    """Seconds per step of every round of every side, in turn; and how far apart the losses of the sides are.

    Every round begins with the same weights and takes the same batches, so all losses of all sides should be equal.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    spent = dict.fromkeys(sides, 0.0)
    losses: dict[str, torch.Tensor] = {}
    for _ in range(repeats):
        for name, side in sides.items():
            if spent[name] > patience:
                continue
            times = side()
            spent[name] += times.ends[-1] - times.ends[0]
            seconds[name].append(times.each(warm))
            losses[name] = torch.stack(times.losses).float().cpu()
    first = next(iter(losses.values()))
    return seconds, max(float((first - other).abs().max()) for other in losses.values())


def _fixed(setup: _Setup, steps: int) -> tuple[Rows, list[Batch]]:
    """The first ``steps`` whole batches of a plan, as rows for the trainer and as tensors for a loop."""
    made = setup.whole()
    count = steps * setup.size.batch
    if len(made.table) < count:
        made = setup.whole(math.ceil(count / len(made.table)))
    rows = setup.rows(replace(made, table=made.table[:count]))
    starts = range(0, count, setup.size.batch)
    return rows, [_tensors(rows, range(start, start + setup.size.batch), setup.pad) for start in starts]


def _told(setup: _Setup, batches: Sequence[Batch]) -> str:
    shape = f"{setup.size.batch} rows, {np.mean([batch['input_ids'].numel() for batch in batches]):,.0f} tokens a batch"
    vocabulary = setup.model.get_input_embeddings().weight.shape[0]
    return f"{setup.size.name}, {setup.recipe.tuning}, {vocabulary:,} words, {shape}"


def _step(setup: _Setup, repeats: int, clock: Clock, warm: int = 3) -> list[Row]:
    """One size and way of tuning: genrec's trainer, both plain loops and TRL's loss, in turn, with the same model."""
    rows, batches = _fixed(setup, setup.size.steps + warm)
    build = _whole_model if setup.recipe.tuning == "full" else with_own_rows  # The same model on all sides.
    setting = _told(setup, batches)
    progress.say(f"step: {setting}")
    sides = {
        "genrec": partial(_in_trainer, setup, build, rows, clock, False),
        "knowing": partial(_in_loop, setup, build, batches, clock, knowing_loss),
        "plain": partial(_in_loop, setup, build, batches, clock, plain_loss),
        "trl": partial(_in_trainer, setup, build, rows, clock, True),
    }
    seconds, apart = _rounds(sides, warm, repeats)
    each = {name: median(taken) for name, taken in seconds.items()}
    faster = min("knowing", "plain", key=each.__getitem__)
    names = {"knowing": "plain loop, head on labels", "plain": "plain loop, labels=", "trl": "trainer with TRL's loss"}
    return [
        figure("step", setting, "genrec", 1e3 * each["genrec"], "ms", samples=[seconds["genrec"]]),
        *(figure("step", setting, names[name], 1e3 * each[name], "ms", samples=[seconds[name]]) for name in names),
        figure(
            "step", setting, f"genrec / {names[faster]}", each["genrec"] / each[faster], "x", most=1.15,
            samples=[seconds["genrec"], seconds[faster]],
        ),
        figure(
            "step", setting, "trainer with TRL's loss / genrec", each["trl"] / each["genrec"], "x",
            samples=[seconds["trl"], seconds["genrec"]],
        ),
        figure("step", setting, "largest difference of the losses", apart, "", most=1e-3),
    ]  # fmt: skip


def _token_rows(setup: _Setup, repeats: int, clock: Clock, warm: int = 3) -> list[Row]:
    """Identifier rows beside LoRA, as PEFT trains them and as genrec does, in the same loop."""
    _, batches = _fixed(setup, setup.size.steps + warm)
    setting = _told(setup, batches)
    progress.say(f"rows: {setting}")
    sides = {
        "own": partial(_in_loop, setup, with_own_rows, batches, clock, knowing_loss),
        "peft": partial(_in_loop, setup, with_peft_rows, batches, clock, knowing_loss),
    }
    seconds, apart = _rounds(sides, warm, repeats)
    own, peft = median(seconds["own"]), median(seconds["peft"])
    return [
        figure("rows", setting, "genrec's rows, a step", 1e3 * own, "ms", samples=[seconds["own"]]),
        figure("rows", setting, "PEFT's token rows, a step", 1e3 * peft, "ms", samples=[seconds["peft"]]),
        figure(
            "rows", setting, "PEFT's token rows / genrec's", peft / own, "x", samples=[seconds["peft"], seconds["own"]]
        ),
        figure("rows", setting, "largest difference of the losses", apart, "", most=1e-3),
    ]


def _lengths(rows: Rows) -> NDArray[np.int64]:
    return np.array([len(rows.row(number).ids) for number in range(len(rows))], dtype=np.int64)


def _tensors(rows: Rows, numbers: Any, pad: int) -> Batch:
    found = rows.batch(numbers, pad)
    return {key: torch.from_numpy(value).to(_device()) for key, value in found.items()}


def _items(setup: _Setup, repeats: int, clock: Clock, goal: float | None, budget: int, batches: int) -> list[Row]:
    """Supervised items a second of both kinds of rows, by the same steps of the same model."""
    sequence = setup.whole()
    tables = {"whole": sequence, "target": replace(sequence, table=per_target(sequence, setup))}
    items: dict[str, float] = {}
    tokens: dict[str, float] = {}
    batches_of: dict[str, list[Batch]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name, made in tables.items():
        rows = setup.rows(made)
        chosen = by_budget(_lengths(rows), budget, batches)
        trained = (made.table[:, 5] - made.table[:, 4] - made.table[:, 6])[np.concatenate(chosen)]
        found = [_tensors(rows, numbers, setup.pad) for numbers in chosen]
        items[name] = float(trained.sum())
        tokens[name] = float(np.mean([batch["input_ids"].numel() for batch in found]))
        batches_of[name] = found
        calls[name] = partial(_loop, copy.deepcopy(setup.model), found, knowing_loss, 1e-4, lambda _: None)
    dense = {name: items[name] / (tokens[name] * len(batches_of[name])) for name in calls}
    setting = (
        f"{setup.size.name}, {setup.data.manifest['name']}, rows of at most {setup.size.max_length} tokens, batches of "
        f"at most {budget:,} ({tokens['whole']:,.0f} and {tokens['target']:,.0f})"
    )
    progress.say(f"items: {setting}")
    seconds = interleaved(calls, repeats, clock)
    rates = {name: items[name] / median(seconds[name]) for name in calls}
    return [
        figure("items", setting, "whole histories", rates["whole"], "items/s", samples=[seconds["whole"]]),
        figure("items", setting, "one row per target", rates["target"], "items/s", samples=[seconds["target"]]),
        figure(
            "items", setting, "whole histories / one row per target", rates["whole"] / rates["target"], "x", least=goal,
            samples=[seconds["whole"], seconds["target"]],
        ),
        figure("items", setting, "the same, per token of a batch", dense["whole"] / dense["target"], "x"),
    ]  # fmt: skip


def _summed(model: Any, batches: Sequence[Batch], total: list[float]) -> None:
    """Forward and backward of batches, with the sum of all losses, as one number in ``total``."""
    model.train()
    total.clear()
    for batch in batches:
        loss = knowing_loss(model, batch) * (batch["labels"][:, 1:] != IGNORE).sum()
        loss.backward()
        total.append(float(loss.detach()))
        model.zero_grad()


def _padding(setup: _Setup, repeats: int, clock: Clock, batches: int) -> list[Row]:
    """Shares of two epochs with questions of every kind, and the time of packed batches of the same rows."""
    rows, size = setup.rows(setup.whole(epochs=2)), setup.size
    lengths = _lengths(rows)
    shuffled = np.random.default_rng(0).permutation(lengths)
    room = size.max_length
    tasks = ", ".join(prompt.name for prompt in setup.prompts)
    setting = (
        f"{setup.data.manifest['name']}, {tasks}, 2 epochs, rows of at most {room} tokens, batches of {size.batch}"
    )
    progress.say(f"padding: {setting}")
    # The same rows twice: in whole batches of the trainer's order, and packed.
    whole = np.random.default_rng(0).permutation(len(lengths) // size.batch)[:batches]
    numbers = [np.arange(size.batch * batch, size.batch * (batch + 1)) for batch in whole]
    some = np.concatenate(numbers)
    packs = [[int(some[number]) for number in one] for one in packed(lengths[some], room)]
    bucketed = [_tensors(rows, one, setup.pad) for one in numbers]
    packed_ = [
        {key: value.to(_device()) for key, value in pack(rows, packs[at : at + size.batch], setup.pad).items()}
        for at in range(0, len(packs), size.batch)
    ]
    sums: dict[str, list[float]] = {"bucketed": [], "packed": []}
    calls = {
        "bucketed": partial(_summed, setup.model, bucketed, sums["bucketed"]),
        "packed": partial(_summed, setup.model, packed_, sums["packed"]),
    }
    seconds = interleaved(calls, repeats, clock)
    apart = abs(sum(sums["packed"]) / sum(sums["bucketed"]) - 1)
    filled = 1 - sum(lengths[some]) / sum(batch["input_ids"].numel() for batch in packed_)
    ratio, both = median(seconds["packed"]) / median(seconds["bucketed"]), [seconds["packed"], seconds["bucketed"]]
    where = f"{size.name}, {len(some)} rows of {setup.data.manifest['name']}"
    return [
        figure("padding", setting, "padding in the trainer's order", 100 * padding(lengths, size.batch), "%", most=10),
        figure("padding", setting, "padding in a random order", 100 * padding(shuffled, size.batch), "%"),
        figure("padding", setting, "padding of packed rows", 100 * float(filled), "%"),
        figure("padding", where, "packed / the trainer's batches, forward and backward", ratio, "x", samples=both),
        figure("padding", where, "relative difference of the losses", apart, "", most=1e-4),
    ]


def _accuracy(setup: _Setup, minutes: float, clock: Clock, users: int) -> list[Row]:
    """Validation NDCG@10 of both kinds of rows, each trained for the same time by genrec's trainer."""
    recipe = replace(setup.recipe, validation=config.Validation(users=users))
    seen = bool(setup.data.manifest["exclude_seen"])
    asked = ValidationSet.draw(
        recipe, setup.split, setup.tokenization, setup.prompts[0], setup.data.user_rows, exclude_seen=seen
    )
    made = setup.whole(epochs=4)
    targets = per_target(setup.whole(), setup)
    whole_tokens, target_tokens = (
        float(_lengths(setup.rows(Plan(table[:2000], made.walks))).mean()) for table in (made.table, targets)
    )
    # As many rows of a target as make a batch of the same tokens, bucketed like the others.
    fitting = max(1, round(setup.size.batch * whole_tokens / target_tokens))
    length = targets[:, 5] - targets[:, 4]
    rng = np.random.default_rng(0)
    epochs = []
    for _ in range(4):
        order = np.lexsort((rng.random(len(targets)), length))
        cut = len(order) // fitting * fitting
        epochs.append(targets[rng.permutation(order[:cut].reshape(-1, fitting)).ravel()])
    sides = {
        "whole histories": (made, setup.size.batch),
        "one row per target": (Plan(np.concatenate(epochs), []), fitting),
    }
    rows = []
    for name, (plan_, batch) in sides.items():
        progress.say(f"accuracy: {name}, {minutes:g} minutes")
        side = replace(setup, recipe=replace(recipe, training=recipe.training | {"per_device_train_batch_size": batch}))
        model = copy.deepcopy(setup.model)
        engine = LocalEngine(model)

        def evaluate(model: Any = model, engine: LocalEngine = engine) -> dict[str, float]:
            model.eval()
            with torch.no_grad():
                found = asked.evaluate(engine)
            model.train()
            return found

        watch = Timed(60 * minutes, evaluate, clock)
        transformers.set_seed(0)
        with ready(side.recipe, setup.rows(plan_), model, watch, epochs=10_000) as trainer:
            watch.schedule(trainer)
            trainer.train()
        setting = (
            f"{setup.size.name}, {setup.data.manifest['name']}, {minutes:g} minutes each, {len(asked.prompts)} users"
        )
        half, end = watch.found
        seen_rows = watch.steps * batch
        rows += [
            figure("accuracy", setting, f"{name}: validation NDCG@10 at half time", half, "NDCG@10"),
            figure("accuracy", setting, f"{name}: validation NDCG@10", end, "NDCG@10"),
            figure("accuracy", setting, f"{name}: epochs", seen_rows / (len(plan_.table) / 4), "epochs"),
        ]
    more = rows[1].value - rows[4].value
    return [*rows, figure("accuracy", setting, "whole histories: NDCG@10 above one row per target", more, "NDCG@10")]


def train(
    model: str = "smollm2",
    *,
    parts: Sequence[str] = PARTS,
    threads: int | None = None,
    repeats: int = 5,
    clock: Clock = "wall",
    data: Path | None = None,
    minutes: float = 2.0,
    quick: bool = False,
) -> Report:
    """`genrec bench train`: training beside plain loops, and whole histories beside one row per target.

    Args:
        model: A base, by name or folder, or ``random-135m`` or ``random-0.6b``, beside the small ones; empty: none.
        parts: Which of ``PARTS``.
        threads: PyTorch's; unset: as it is.
        repeats: Rounds whose medians are reported.
        clock: ``cpu`` counts processor time, for a machine that does other things too.
        data: A data set folder for ``items``, ``padding`` and ``accuracy``; unset: generated data.
        minutes: Of each side of ``accuracy``.
        quick: Tiny settings that show that everything runs; their times mean nothing and have no goals.

    Raises:
        ConfigError: An unknown part, or a number out of range.
        AdapterError: No such base.
    """
    if minutes <= 0:
        raise ConfigError(f"bench train: minutes is {minutes:g}; it is above 0.")
    begin("train", parts, PARTS, threads, repeats=repeats)
    sizes = [
        Size("small base", items=1682),
        Size("128 wide, 3 layers", width=128, layers=3, items=12_000, steps=10),
        Size(model, model, items=12_000, scheme="random", max_length=64, batch=4, steps=3),
    ]
    if quick:
        sizes = [replace(size, items=60, max_length=24, batch=2, steps=2) for size in sizes[::2]]
        minutes = min(minutes, 0.02)
    sizes = sizes if model else sizes[:-1]
    given = {
        "model": model, "parts": list(parts), "repeats": repeats, "clock": clock,
        "data": None if data is None else str(data), "minutes": minutes, "quick": quick,
    }  # fmt: skip
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        ways: tuple[Way, ...] = ("full", "lora")
        for size in sizes if {"step", "rows"} & set(parts) else ():
            users = (size.steps + 3) * size.batch
            log = random_log(users, size.items, *((5, 20) if quick else (20, 140)))
            for way in ways:
                setup = _setup(size, log, root, way)
                if "step" in parts:
                    rows += _step(setup, repeats, clock)
                if "rows" in parts and way == "lora":
                    rows += _token_rows(setup, repeats, clock)
        if {"items", "padding", "accuracy"} & set(parts):
            loaded = Dataset.load(data) if data is not None else generated_data(*((200, 120) if quick else ()))
            goal = ITEMS_GOALS.get(loaded.manifest["name"])
            length, batch = (24, 4) if quick else (128, 16)
            small = Size("small base", max_length=length, batch=batch)
            if "items" in parts:
                setup = _setup(small, loaded, root)
                rows += _items(setup, repeats, clock, goal, length * batch, 3 if quick else 40)
                if model:
                    large = Size(model, model, scheme="random", max_length=4 * length, batch=batch)
                    rows += _items(_setup(large, loaded, root), repeats, clock, goal, 8 * length, 2 if quick else 3)
            if "padding" in parts:
                # The longest title of a catalogue may need more than a history is given.
                long = replace(small, max_length=64 if quick else 512)
                rows += _padding(_setup(long, loaded, root, questions=True), repeats, clock, 3 if quick else 40)
            if "accuracy" in parts:
                training_ = {"lr_scheduler_type": "constant", "learning_rate": 1e-3, "weight_decay": 0.01}
                setup = _setup(small, loaded, root, dropout=0.2, training=training_)
                rows += _accuracy(setup, minutes, clock, 20 if quick else 1000)
    if quick:
        rows = without_goals(rows)
    return Report(conditions(**given), sorted(rows, key=lambda row: PARTS.index(row.part)), "train")
