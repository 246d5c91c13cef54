"""Training: a recipe and a data set in, an adapter folder out. The only module that imports TRL.

Rows come from histories (cut into windows of whole items), from walks over textual neighbours, and from question
prompts about items and histories. The weights that are kept are those of the best NDCG@10 on validation cases, by the
same constrained decoding that recommends.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from trl import SFTConfig, SFTTrainer

from genrec import adapter as adapters
from genrec import base as bases
from genrec import features, learning_curve, metrics, progress
from genrec.config import IdentifierRecipe, Recipe, SplitKind, Ties, as_table, load_recipe, suggestion, workspace_of
from genrec.curriculum import Rows, plan
from genrec.dataset import Dataset
from genrec.decoding import Trie
from genrec.dropout import dropout
from genrec.engines.local import LocalEngine
from genrec.errors import ConfigError, DataError, DecodingError, GenrecError, LeakError, PromptError, StorageError
from genrec.identifiers import Identifiers
from genrec.prompts import Prompt
from genrec.splits import Split
from genrec.tokenization import IGNORE, Tokenization, add_identifier_tokens, text_tokens

VALIDATION_BEAMS = 20
_INFINITY = math.inf
TRAINING_KEYS: dict[str, tuple[Any, ...]] = {
    # Keys of SFTConfig that a recipe may set: a type and its range (both ends included), or the values that work here.
    "num_train_epochs": (int, 1, _INFINITY),
    "max_steps": (int, -1, _INFINITY),
    "per_device_train_batch_size": (int, 1, _INFINITY),
    "gradient_accumulation_steps": (int, 1, _INFINITY),
    "learning_rate": (float, 0, _INFINITY),
    "weight_decay": (float, 0, _INFINITY),
    "warmup_steps": (float, 0, _INFINITY),
    "lr_scheduler_type": (
        "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial",
        "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
    ),
    "lr_scheduler_kwargs": (dict,),
    "optim": ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    "adam_beta1": (float, 0, 0.999999),
    "adam_beta2": (float, 0, 0.999999),
    "adam_epsilon": (float, 0, 1),
    "max_grad_norm": (float, 0, _INFINITY),
    "label_smoothing_factor": (float, 0, 1),
    "logging_steps": (int, 1, _INFINITY),
    "bf16": (bool,),
    "fp16": (bool,),
    "tf32": (bool,),
    "gradient_checkpointing": (bool,),
    "use_cpu": (bool,),
    "average_tokens_across_devices": (bool,),
    "ddp_find_unused_parameters": (bool,),
    "ddp_timeout": (int, 1, _INFINITY),
}  # fmt: skip
_TRAINING_ELSEWHERE = {  # What a recipe says in another place.
    "max_length": "write max_length at the top level of the recipe",
    "seed": "write seed at the top level of the recipe",
    "output_dir": "the adapter's folder follows from the recipe's name",
    "model_init_kwargs": "write dtype at the top level of the recipe",
    "eval_strategy": "see [validation]",
    "eval_steps": "see [validation]",
    "save_strategy": "the best weights by validation are kept",
}
_LORA_ELSEWHERE = {
    "trainable_token_indices": "the identifier rows are trained",
    "bias": 'an adapter holds no biases; train them with tuning = "full"',
    "modules_to_save": 'an adapter holds no whole modules; train them with tuning = "full"',
}
_TRAINING_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 10,
    "logging_steps": 20,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "warmup_steps": 0.05,
    "lr_scheduler_type": "cosine",
    "gradient_checkpointing": False,
    "bf16": False,
}
_LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


# The model


def start_rows(model: transformers.PreTrainedModel, ids: torch.Tensor, vectors: np.ndarray | None, seed: int) -> None:
    """Set the embedding rows of new tokens, in the scale of the rows that are there.

    With ``vectors`` (float32 [tokens, d]) a row is their random projection (Johnson-Lindenstrauss: near vectors make
    near rows) plus a tenth of noise, which tells equal vectors apart; a token with a zero vector, or without
    ``vectors``, starts random.
    """
    rng = np.random.default_rng([seed, 2])
    weight = model.get_input_embeddings().weight
    old = weight[: int(ids.min())] if int(ids.min()) > 0 else weight
    scale = float(old.detach().float().std())
    noise = rng.standard_normal((len(ids), weight.shape[1]))
    values = noise
    if vectors is not None:
        projected = vectors @ rng.standard_normal((vectors.shape[1], weight.shape[1]))
        norm = np.sqrt(np.mean(projected**2, axis=1, keepdims=True))
        known = norm[:, 0] > 0
        values = np.where(known[:, None], projected / np.where(norm > 0, norm, 1) + 0.1 * noise, noise)
    rows = torch.tensor(scale * values, dtype=torch.float32)
    adapters.set_rows(model, ids, {"input": rows, "output": rows})


def _diverged(step: int) -> GenrecError:
    return GenrecError(
        f"the loss was no finite number any more after {step} steps. Nothing was written. "
        "Lower training.learning_rate (a tenth of it is a good next try) or lengthen warmup_steps."
    )


class _Trainer(SFTTrainer):
    """TRL's trainer with rows in the plan's order and the LM head applied to labelled positions only.

    TRL computes every position's logits in chunks with entropy and accuracy, which costs small models with large
    vocabularies more than the rest of the step; the loss is the same (a test holds it equal).
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        labels = inputs.pop("labels")[:, 1:]
        weights = inputs.pop("weights", None)
        mask = labels != IGNORE
        inner = self.accelerator.unwrap_model(model)
        inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner

        def labelled(_: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return (arguments[0][:, :-1][mask][None],)

        handle = inner.get_output_embeddings().register_forward_pre_hook(labelled)
        try:
            logits = model(**inputs, use_cache=False).logits[0]
        finally:
            handle.remove()
        loss = torch.nn.functional.cross_entropy(
            logits.float(),
            labels[mask],
            reduction="sum" if weights is None else "none",
            label_smoothing=self.args.label_smoothing_factor,
        )
        if weights is not None:
            loss = (loss * weights[:, 1:][mask]).sum()
        if not torch.isfinite(loss):
            raise _diverged(self.state.global_step)
        count = num_items_in_batch if num_items_in_batch is not None else mask.sum()
        return loss / count * (self.accelerator.num_processes if num_items_in_batch is not None else 1)


# Validation


class _Watch(transformers.TrainerCallback):
    """Evaluates on validation cases, keeps the best weights in memory, draws the bar, stops early."""

    def __init__(
        self, evaluate: Any, model: torch.nn.Module, marks: Mapping[int, float], patience: int, advance: Any
    ) -> None:
        self.evaluate, self.model, self.patience, self.advance = evaluate, model, patience, advance
        self.marks = marks  # Step -> epoch, where to evaluate.
        self.curve: list[dict[str, float]] = []
        self.losses: list[tuple[int, float]] = []
        self.best: dict[str, Any] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.began = time.perf_counter()

    def look(self, step: int, epoch: float) -> None:
        try:
            found = self.evaluate()
        except DecodingError as error:
            if step == 0:
                raise
            raise _diverged(step) from error
        self.curve.append(
            {"step": step, "epoch": round(epoch, 3), "seconds": round(time.perf_counter() - self.began, 1), **found}
        )
        if not self.best or found["ndcg@10"] > self.best["ndcg@10"]:
            self.best = self.curve[-1]
            trained = ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)
            self.weights = {name: value.detach().cpu().clone() for name, value in trained}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(0, 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.marks:
            self.look(state.global_step, self.marks[state.global_step])
            behind = len(self.curve) - 1 - self.curve.index(self.best)
            if self.patience and behind >= self.patience:
                control.should_training_stop = True
        self.advance(1, note=f"NDCG@10 {self.curve[-1]['ndcg@10']:.4f} (best {self.best['ndcg@10']:.4f})")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # A run that is shorter than the steps between two logs has its mean loss alone.
        key = "train_loss" if logs and "train_loss" in logs and not self.losses else "loss"
        if logs and key in logs:
            self.losses.append((state.global_step, float(logs[key])))

    def keep_best(self) -> None:
        """Put the best weights back into the model."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in self.weights.items():
                parameters[name].copy_(value)


# The run


def _check_keys(given: Mapping[str, Any], known: set[str], elsewhere: Mapping[str, str], table: str) -> None:
    for key in given:
        if key in elsewhere:
            raise ConfigError(f"recipe: {table}.{key} is not yours to set: {elsewhere[key]}.")
        if key not in known:
            raise ConfigError(f"recipe: unknown key {table}.{key}. {suggestion(key, known)}")


def _training_options(recipe: Recipe) -> dict[str, Any]:
    """The table ``[training]`` over the defaults, with every key and value checked."""
    _check_keys(recipe.training, set(TRAINING_KEYS), _TRAINING_ELSEWHERE, "training")
    for key, value in recipe.training.items():
        kind, *limits = TRAINING_KEYS[key]
        if isinstance(kind, str):
            if value not in TRAINING_KEYS[key]:
                raise ConfigError(f"recipe: training.{key} is {value!r}. {suggestion(str(value), TRAINING_KEYS[key])}")
            continue
        fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or type(value) is not bool)
        if not fits or (limits and not limits[0] <= value <= limits[1]):
            span = f" from {limits[0]} to {limits[1]}" if limits and limits[1] < _INFINITY else ""
            span = f" of at least {limits[0]}" if limits and not span else span
            raise ConfigError(f"recipe: training.{key} is {value!r}. It takes a value of type {kind.__name__}{span}.")
    return {**_TRAINING_DEFAULTS, **recipe.training}


def _sft_config(recipe: Recipe, output: str) -> SFTConfig:
    given = {**_training_options(recipe), "num_train_epochs": 1}  # The plan holds all epochs.
    try:
        # Keywords of a schedule are read when training begins; a wrong one is found out here.
        transformers.get_scheduler(
            given["lr_scheduler_type"], torch.optim.SGD([torch.zeros(1)]), num_warmup_steps=1, num_training_steps=3,
            scheduler_specific_kwargs=given.get("lr_scheduler_kwargs"),
        )  # fmt: skip
        return SFTConfig(
            output_dir=output,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=recipe.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
            **given,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"recipe: [training] was refused: {error}") from error


def _with_lora(model: transformers.PreTrainedModel, recipe: Recipe, ids: torch.Tensor) -> PeftModel:
    """LoRA on the blocks, and of the embedding (and an untied head) the identifier rows alone."""
    _check_keys(recipe.lora, {item.name for item in fields(LoraConfig)} - set(_LORA_ELSEWHERE), _LORA_ELSEWHERE, "lora")
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    layers = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings:
        layers.append(model.get_output_embeddings())
    trained = {names[id(layer)]: ids.tolist() for layer in layers}
    try:
        config = LoraConfig(**{**_LORA_DEFAULTS, **recipe.lora}, trainable_token_indices=trained)
        result = get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"recipe: [lora] was refused: {error}") from error
    head = model.get_output_embeddings()
    if getattr(head, "token_adapter", None) is not None:
        head.bias = None  # TRL reads the attribute, and PEFT's wrapper of a tied head lacks it.
    return result


def _prompts(recipe: Recipe, workspace: Path, data: Dataset) -> list[Prompt]:
    loaded = [Prompt.load(workspace / task.prompt) for task in recipe.tasks]
    for task, prompt in zip(recipe.tasks, loaded, strict=True):
        users = [] if data.users is None else data.users.columns
        problems = prompt.check(item_columns=data.items.columns, user_columns=users)
        if problems:
            first = problems[0]
            raise PromptError(f"{task.prompt}:{first.line}:{first.column}: {first.message} {first.fix}")
    names = [prompt.name for prompt in loaded]
    if len(set(names)) < len(names):
        raise ConfigError(f"recipe: tasks name two prompts alike: {names}. Rename a file.")
    if not any(prompt.kind == "sequence" for prompt in loaded):
        raise ConfigError("recipe: no task is a sequence prompt, so the adapter could not recommend. Add next_item.")
    return loaded


def _titles(data: Dataset, base: bases.Base) -> list[list[str]]:
    return text_tokens(base.tokenizer(), data.items["title"].to_list())


def build_identifiers(
    data: Dataset | str | Path,
    scheme: str,
    *,
    base: str | None = None,
    levels: int = 3,
    codes: int = 256,
    split: SplitKind = "leave_one_out",
    ties: Ties = "file",
    split_seed: int = 0,
    dimensions: int = 64,
    seed: int = 0,
) -> Identifiers:
    """Identifiers for a data set, from features of its catalogue and the training part of its split alone.

    Args:
        data: A data set, or its folder.
        scheme: A key of ``identifiers.SCHEMES``.
        base: The base whose tokens spell the titles; read by the scheme "title" alone.
        levels, codes: See ``Identifiers.build``.
        split, ties, split_seed: What part of the interactions is for training, as the recipe says that will use them.
        dimensions: Of the text vectors, and as many again of the collaborative ones (``features`` of a recipe).
        seed: Of features and clusters.

    Raises:
        ConfigError: An unknown scheme, no base for "title", or more items than ``codes ** levels``.
    """
    data = data if isinstance(data, Dataset) else Dataset.load(data)
    part = data.split(split, ties=ties, seed=split_seed)
    vectors = features.item_vectors(data.items, part.train, dimensions=dimensions, seed=seed).vectors
    titles = _titles(data, bases.find(base)) if scheme == "title" and base is not None else None
    made = Identifiers.build(scheme, data.item_ids, vectors, titles=titles, levels=levels, codes=codes, seed=seed)
    return replace(made, fitted_on=part.train_hash) if scheme == "semantic" else made


def identify(
    recipe: Recipe, base: bases.Base, workspace: Path, data: Dataset, split: Split, vectors: np.ndarray
) -> tuple[Identifiers, bool]:
    """The identifiers to train with: those that the base brings, or those that the recipe asks for; and whether they
    are inherited, rows and all.

    Raises:
        AdapterError: The base is a product of training of which a file is missing or changed.
        ConfigError: The recipe asks for other identifiers than the base has, or they are of other items.
        LeakError: Base or identifiers were fitted on other interactions than this split's training part.
    """
    wanted = recipe.identifiers or IdentifierRecipe()
    inherited = any((base.folder / name).exists() for name in ("genrec.json", "identifiers.parquet"))
    if inherited:
        product = adapters.Adapter.load(base.folder)
        found, source, fitted_on = product.identifiers, f"base {base.name}", product.manifest["fitted_on"]
        made_by = product.manifest["recipe"].get("identifiers") or as_table(IdentifierRecipe())
        if recipe.identifiers is not None and (wanted.scheme != found.scheme or as_table(wanted) != made_by):
            raise ConfigError(
                f"recipe: [identifiers] asks for {wanted.file or wanted.scheme!r} (levels {wanted.levels}, codes "
                f"{wanted.codes}), and base {base.name} brings its own ({found.scheme!r}). "
                "Remove [identifiers] to inherit them."
            )
    elif wanted.file:
        found, source = Identifiers.load(workspace / wanted.file), f"identifiers {wanted.file}"
        fitted_on = found.fitted_on
    else:
        titles = _titles(data, base) if wanted.scheme == "title" else None
        made = Identifiers.build(
            wanted.scheme, data.item_ids, vectors,
            titles=titles, levels=wanted.levels, codes=wanted.codes, seed=recipe.seed,
        )  # fmt: skip
        return replace(made, fitted_on=split.train_hash) if made.scheme == "semantic" else made, False
    if list(found.item_ids) != data.item_ids:
        raise ConfigError(
            f"{source} has identifiers for {len(found.item_ids)} items, and they are not the {len(data.item_ids)} "
            f"items of {recipe.data}, in that order. Make them from this data set."
        )
    if fitted_on and fitted_on != split.train_hash:
        raise LeakError(
            f"{source} was fitted on other interactions ({fitted_on[:16]}) than the training part of this recipe's "
            f"split ({split.train_hash[:16]}), so it may have seen what is to be predicted. Make it again with the "
            "same data, split, ties and split_seed."
        )
    return found, inherited


def train(
    recipe: str | Path | Recipe,
    data: Dataset | None = None,
    *,
    name: str | None = None,
    workspace: str | Path | None = None,
    assignments: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Train as a recipe says and write ``adapters/NAME``.

    Args:
        recipe: A recipe file, or a ``Recipe`` (then ``name`` is needed).
        data: The data set; read from the recipe's ``data`` folder where it is not given.
        name: Of the adapter; the recipe file's name where it is not given.
        workspace: What relative paths are relative to; the folder above the recipe's where it is not given.
        assignments: ``key=value`` changes to a recipe file.
        overwrite: Replace an adapter that is there.

    Returns:
        The adapter's folder.

    Raises:
        ConfigError, DataError, PromptError, AdapterError: See their messages. Nothing is written.
    """
    if isinstance(recipe, Recipe):
        if name is None:
            raise ConfigError("train: a Recipe has no file name, so name= must say what to call the adapter.")
        root = Path(workspace or Path.cwd())
    else:
        path = Path(recipe)
        recipe = load_recipe(path, assignments)
        name, root = name or path.stem, Path(workspace or workspace_of(path))
    out = root / "adapters" / name
    if out.exists() and not overwrite:
        raise StorageError(f"{out} exists already. Pass --overwrite to replace it once training is done.")
    data = data or Dataset.load(root / recipe.data)
    split = data.split(recipe.split, ties=recipe.ties, seed=recipe.split_seed)
    split.check()
    if not len(split.valid):
        raise DataError(
            f"{recipe.data}: the split {recipe.split} leaves no validation case (users need 3 interactions or more), "
            "so nothing could tell which weights to keep. Import more of the log, or another split."
        )
    base = bases.find(recipe.base, root)
    prompts = _prompts(recipe, root, data)
    transformers.set_seed(recipe.seed)

    vectors = features.item_vectors(data.items, split.train, dimensions=recipe.features, seed=recipe.seed)
    identifiers, inherited = identify(recipe, base, root, data, split, vectors.vectors)
    tokenizer = base.tokenizer()
    add_identifier_tokens(tokenizer, identifiers)
    tokenization = Tokenization(tokenizer, identifiers, data.items, max_length=recipe.max_length)
    leader = next(prompt for prompt in prompts if prompt.kind == "sequence")

    model = base.model(getattr(torch, recipe.dtype))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and recipe.max_length > context:
        raise ConfigError(f"recipe: max_length is {recipe.max_length}, and base {base.name} reads {context} tokens.")
    ids = adapters.identifier_ids(tokenization)
    adapters.resize(model, len(tokenizer))
    if not inherited:
        started = identifiers.token_vectors(vectors.vectors) if recipe.rows == "features" else None
        start_rows(model, ids, started, recipe.seed)

    neighbours = None
    if recipe.walks.share > 0 or recipe.walks.alone > 0:
        neighbours = features.neighbours(vectors.tfidf, recipe.walks.neighbours)
    with tempfile.TemporaryDirectory() as scratch:
        config = _sft_config(recipe, scratch)
        epochs = _training_options(recipe)["num_train_epochs"]
        made = plan(
            recipe, prompts, tokenization, split.train, neighbours, data.user_rows,
            epochs=epochs, batch_size=config.per_device_train_batch_size,
        )  # fmt: skip
        rows = Rows(made, prompts, tokenization, split.train, data.user_rows, split.train_weights)
        trained = _with_lora(model, recipe, ids) if recipe.tuning == "lora" else model
        watch = _run(recipe, config, trained, rows, leader, split, exclude_seen=bool(data.manifest["exclude_seen"]))

    extra = {
        "learning_curve.json": json.dumps({"validation": watch.curve, "loss": watch.losses}, indent=1).encode(),
        "learning_curve.png": learning_curve.picture(watch.curve, watch.losses),
    }
    ordered = {prompt.name: prompt for prompt in [leader, *(prompt for prompt in prompts if prompt is not leader)]}
    adapters.save(
        out,
        model=trained,
        base=base,
        tokenization=tokenization,
        prompts=ordered,
        manifest={
            "recipe": as_table(recipe),
            "data": {"path": recipe.data, "hash": data.hash, "manifest": data.manifest},
            "fitted_on": split.train_hash,
            "protocol": split.protocol,
            "training_rows": len(rows),
            "kept": watch.best,
        },
        extra=extra,
        overwrite=overwrite,
    )
    return out


def _run(
    recipe: Recipe,
    config: SFTConfig,
    model: Any,
    rows: Rows,
    prompt: Prompt,
    split: Split,
    *,
    exclude_seen: bool,
) -> _Watch:
    """Train ``model`` in place on ``rows`` and leave the best weights by validation in it."""
    tokenization = rows.tokenization
    chosen = split.valid.draw(recipe.validation.users, [recipe.seed, 3])
    histories, targets = [split.valid.histories[case] for case in chosen], split.valid.targets[chosen]
    who = [rows.users[split.valid.users[case]] if rows.users is not None else None for case in chosen]
    asked = [tokenization.sequence(prompt, history, user) for history, user in zip(histories, who, strict=True)]
    blocked = [np.unique(history) for history in histories] if exclude_seen else None
    trie = Trie.build(tokenization.tokens)
    engine = LocalEngine(model.get_base_model() if isinstance(model, PeftModel) else model)

    def evaluate() -> dict[str, float]:
        found = engine.beam_search(asked, trie, min(VALIDATION_BEAMS, trie.n_items), blocked=blocked).items
        place = metrics.ranks(found, targets)
        return {
            "ndcg@10": float(metrics.METRICS["ndcg"](place, 10).mean()),
            "recall@10": float(metrics.METRICS["recall"](place, 10).mean()),
        }

    def collate(examples: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        made = rows.batch([example["row"] for example in examples], tokenization.tokenizer.pad_token_id)
        return {key: torch.from_numpy(value) for key, value in made.items()}

    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    planned = math.ceil(len(rows) / batch)
    steps = config.max_steps if config.max_steps > 0 else planned
    epochs = steps / planned * (int(rows.plan.table[-1, 0]) + 1)
    looks = max(1, round(epochs * recipe.validation.per_epoch))
    marks = {round(steps * look / looks): epochs * look / looks for look in range(1, looks + 1)}
    with (
        progress.bar("training", steps) as advance,
        dropout(model, recipe.dropout),
        bases.quiet(),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", category=FutureWarning, module="trl")
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        watch = _Watch(evaluate, model, marks, recipe.validation.patience, advance)
        try:
            trainer = _Trainer(
                model=model,
                args=config,
                # Row numbers alone: the collator makes the rows, so nothing is stored or hashed twice.
                train_dataset=datasets.Dataset.from_dict({"row": range(len(rows))}),
                data_collator=collate,
                processing_class=tokenization.tokenizer,
                callbacks=[watch],
            )
        except ValueError as error:  # Such as fp16 without a GPU.
            raise ConfigError(f"recipe: [training] was refused: {error}") from error
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    watch.keep_best()
    return watch
