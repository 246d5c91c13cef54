"""Training: a recipe and a data set in, an adapter folder out.

What is trained on, and in which order, is ``curriculum``'s. The weights that are kept are those of the best NDCG@10 on
validation cases, by the same constrained decoding that recommends.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel

from genrec import adapter as adapters
from genrec import base as bases
from genrec import checkpoints, estimates, features, learning_curve, progress
from genrec.config import Recipe, folder_name, load_recipe, workspace_of
from genrec.curriculum import HISTORY, WALK, Fresh, Rows, plan
from genrec.dataset import Dataset
from genrec.engines.local import LocalEngine
from genrec.errors import ConfigError, DataError, GenrecError, PromptError, StorageError, suggestion
from genrec.estimates import Estimate
from genrec.identification import identify
from genrec.options import PACE, training_options
from genrec.prompts import Prompt
from genrec.splits import Split
from genrec.tokenization import Tokenization, add_identifier_tokens
from genrec.toml import as_table
from genrec.trainer import Trainable, sft_config
from genrec.tuning import load, start_rows, with_lora
from genrec.validation import ValidationSet
from genrec.watch import Tally, Watch

# Keys of a fingerprint that may differ when a run goes on: they set how fast the rest of it learns.
_PACE = ("recipe.rows_learning_rate", *(f"recipe.training.{key}" for key in PACE))


def _prompts(recipe: Recipe, workspace: Path, data: Dataset) -> list[Prompt]:
    for task in recipe.tasks:
        if not (workspace / task.prompt).is_file():
            there = sorted(path.relative_to(workspace).as_posix() for path in workspace.glob("prompts/**/*.jinja"))
            raise PromptError(
                f"recipe: tasks name {task.prompt}, and there is no such file. {suggestion(task.prompt, there)}"
            )
    loaded = [Prompt.load(workspace / task.prompt) for task in recipe.tasks]
    for task, prompt in zip(recipe.tasks, loaded, strict=True):
        problems = prompt.check(*data.readable)
        if problems:
            raise PromptError(f"{task.prompt}:{problems[0]}")
    names = [prompt.name for prompt in loaded]
    if len(set(names)) < len(names):
        raise ConfigError(f"recipe: tasks name two prompts alike: {names}. Rename a file.")
    if not any(prompt.kind == "sequence" for prompt in loaded):
        raise ConfigError("recipe: no task is a sequence prompt, so the adapter could not recommend. Add next_item.")
    return loaded


@dataclass(frozen=True, eq=False)
class Prepared:
    """What an update trains on with, in the place of what a recipe would build: see ``genrec.update``.

    Attributes:
        base: What the adapter names as its base.
        prompts: In the order of the recipe's tasks.
        tokenization: With the identifiers of the data set.
        model: What is trained, with all rows in it and LoRA on it.
        split: Of the data set; without the validation cases that must not decide.
        fresh: Which events are targets.
        told: What decides the outcome besides, plain values.
        report: Called with the trained model before it is written; what it gives stands in genrec.json as "update".
        write: Called when the adapter's folder is complete, before it takes its name.
    """

    base: bases.Base
    prompts: list[Prompt]
    tokenization: Tokenization
    model: Any
    split: Split
    fresh: Fresh
    told: dict[str, Any]
    report: Callable[[Any], dict[str, Any]]
    write: Callable[[], None]


@dataclass(kw_only=True)
class _Run(Trainable):
    """A run made ready: everything that training needs; nothing is written."""

    data: Dataset
    split: Split
    base: bases.Base
    prompts: list[Prompt]
    prepared: Prepared | None = None

    @property
    def leader(self) -> Prompt:
        return next(prompt for prompt in self.prompts if prompt.kind == "sequence")

    @property
    def batch(self) -> int:
        """Rows of one step, over all processes."""
        return int(_step_rows(self.config))

    @property
    def steps(self) -> int:
        wanted = training_options(self.recipe.training).get("max_steps", -1)
        return wanted if wanted > 0 else math.ceil(len(self.rows) / self.batch)

    @property
    def order(self) -> np.ndarray:
        """int64 [steps * batch]: the row numbers of the run. -1 fills the last batch, so that every process gets as
        many rows and none is repeated; ``max_steps`` cuts the plan, or goes through it again."""
        filled = np.concatenate([np.arange(len(self.rows)), np.full(-len(self.rows) % self.batch, -1)])
        return np.resize(filled, self.steps * self.batch)

    @property
    def marks(self) -> dict[int, float]:
        """Step -> epoch, where to validate; the last step always."""
        rule, steps = self.recipe.validation, self.steps
        epochs = steps / math.ceil(len(self.rows) / self.batch) * (int(self.rows.plan.table[-1, 0]) + 1)
        if rule.steps:
            return {step: epochs * step / steps for step in [*range(rule.steps, steps, rule.steps), steps]}
        looks = max(1, round(epochs * rule.per_epoch))
        return {round(steps * look / looks): epochs * look / looks for look in range(1, looks + 1)}

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {
            "recipe": {**as_table(self.recipe), "training": training_options(self.recipe.training)},
            "data": self.data.hash,
            "exclude_seen": bool(self.data.manifest["exclude_seen"]),
            "identifiers": self.rows.tokenization.identifiers.hash,
            "base": self.base.hash,
            "prompts": {prompt.name: prompt.hash for prompt in self.prompts},
            "processes": self.config.world_size,
            "global batch": self.batch,
            "versions": adapters.versions(),
            **({} if self.prepared is None else {"update": self.prepared.told}),
        }

    def named(self, number: int) -> str:
        """A row of the plan in words."""
        epoch, task, kind, index, start, stop, _ = self.rows.plan.table[number].tolist()
        what = {HISTORY: f"history {index}, events {start} to {stop - 1}", WALK: f"walk {index}"}
        return f"epoch {epoch}, prompt {self.prompts[task].name}, {what.get(kind, f'item {index}')}"

    def engine(self) -> LocalEngine:
        """What validates, on the device that the trainer will choose: an engine plans its batches for where it is."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return LocalEngine(model if getattr(model, "is_quantized", False) else model.to(self.config.device))

    def validation(self) -> ValidationSet:
        return ValidationSet.draw(
            self.recipe, self.split, self.rows.tokenization, self.leader, self.rows.users,
            exclude_seen=bool(self.data.manifest["exclude_seen"]),
        )  # fmt: skip


def _step_rows(config: transformers.TrainingArguments) -> int:
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size


def _named(
    recipe: str | Path | Recipe, name: str | None, workspace: str | Path | None, assignments: Sequence[str]
) -> tuple[Recipe, str, Path]:
    """The recipe, its name, and the workspace."""
    if isinstance(recipe, Recipe):
        if name is None:
            raise ConfigError("train: a Recipe has no file name, so name= must say what to call the adapter.")
        return recipe, folder_name(name, "train"), Path(workspace or Path.cwd())
    path = Path(recipe)
    name = folder_name(name or path.stem, "train")
    return load_recipe(path, assignments), name, Path(workspace or workspace_of(path))


def is_main() -> bool:
    """Whether this process writes and speaks: the only one, or the first of those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def _one_voice() -> Iterator[None]:
    """Of several processes the main one alone shows progress."""
    before = progress.quiet
    progress.quiet = before or not is_main()
    try:
        yield
    finally:
        progress.quiet = before


def _build(
    recipe: Recipe, root: Path, data: Dataset, split: Split, vectors: np.ndarray
) -> tuple[bases.Base, list[Prompt], Tokenization, Any]:
    """Base, prompts, tokenization and the model to be trained, as a recipe says."""
    base = bases.find(recipe.base, root)
    prompts = _prompts(recipe, root, data)
    identifiers, inherited = identify(recipe, base, root, data, split, vectors)
    tokenizer = base.tokenizer()
    add_identifier_tokens(tokenizer, identifiers)
    tokenization = Tokenization(tokenizer, identifiers, data.items, max_length=recipe.max_length)
    model = load(recipe, base)
    ids = adapters.identifier_ids(tokenization)
    adapters.resize(model, len(tokenizer))
    if not inherited:
        started = identifiers.token_vectors(vectors) if recipe.rows == "features" else None
        start_rows(model, ids, started, recipe.seed)
    return base, prompts, tokenization, model if recipe.tuning == "full" else with_lora(model, recipe, ids)


def rows_of(events: int, train: Sequence[np.ndarray], tokenization: Tokenization) -> int:
    """How many rows hold about so many events, where histories are cut to ``max_length`` tokens; at least 1."""
    fit = max(1.0, tokenization.max_length / float(tokenization.lengths.mean()))
    lengths = np.array([len(history) for history in train if len(history)])
    mean = lengths.sum() / np.ceil(lengths / fit).sum() if len(lengths) else 1.0
    return max(1, round(events / mean))


def check_length(recipe: Recipe, model: Any, name: str) -> None:
    """Refuse rows that are longer than the model of the base ``name`` reads."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and recipe.max_length > context:
        raise ConfigError(f"recipe: max_length is {recipe.max_length}, and base {name} reads {context} tokens.")


@contextmanager
def _ready(recipe: Recipe, root: Path, data: Dataset | None, prepared: Prepared | None = None) -> Iterator[_Run]:
    """Read, check and build everything that a run needs."""
    data = data or Dataset.load(root / recipe.data)
    split = data.split(recipe.split, ties=recipe.ties, seed=recipe.split_seed) if prepared is None else prepared.split
    split.check()
    if not len(split.valid):
        raise DataError(
            f"{recipe.data}: the split {recipe.split} leaves no validation case (users need 3 interactions or more), "
            "so nothing could tell which weights to keep. Import more of the log, or another split."
        )
    transformers.set_seed(recipe.seed)
    vectors = features.item_vectors(data.items, split.train, dimensions=recipe.features, seed=recipe.seed)
    if prepared is None:
        base, prompts, tokenization, model = _build(recipe, root, data, split, vectors.vectors)
    else:
        base, prompts, tokenization, model = prepared.base, prepared.prompts, prepared.tokenization, prepared.model
    check_length(recipe, model, base.name)
    neighbours = None
    if recipe.walks.used:
        neighbours = features.neighbours(vectors.tfidf, recipe.walks.neighbours)
    with tempfile.TemporaryDirectory() as scratch:
        config = sft_config(recipe, scratch)
        if recipe.batch_events:
            config.per_device_train_batch_size = rows_of(recipe.batch_events, split.train, tokenization)
        epochs = training_options(recipe.training)["num_train_epochs"]
        made = plan(
            recipe, prompts, tokenization, split.train, neighbours, data.user_rows,
            epochs=epochs, batch_size=_step_rows(config), events=split.train_events,
            fresh=None if prepared is None else prepared.fresh,
        )  # fmt: skip
        rows = Rows(made, prompts, tokenization, split.train, data.user_rows, split.train_weights, split.train_events)
        yield _Run(
            recipe=recipe, data=data, split=split, base=base, prompts=prompts, rows=rows, model=model, config=config,
            prepared=prepared,
        )  # fmt: skip


def beginning(
    name: str, workspace: Path, *, overwrite: bool, resume: bool
) -> tuple[Path | None, checkpoints.Checkpoint | None]:
    """The newest checkpoint of the run of an adapter's name, and what it holds where training is to go on from it.

    Raises:
        StorageError: An adapter or an interrupted run is there, and the options do not say what becomes of it.
    """
    out, folder = workspace / "adapters" / name, workspace / "runs" / name
    newest = checkpoints.newest(folder)
    if out.exists() and not overwrite:
        advice = "Pass --overwrite to replace it once training is done."
        if resume or newest is not None:
            begun = f"{folder} holds an interrupted run at {newest.name}. " if newest is not None else ""
            advice = f"{begun}Pass --resume --overwrite to go on, and to replace the adapter once training is done."
        raise StorageError(f"{out} exists already. {advice}")
    start = checkpoints.load(newest) if newest is not None and not (overwrite and not resume) else None
    if start is not None and not resume:
        raise StorageError(
            f"{folder} holds an interrupted run at step {start.step} of {start.total}. "
            "Pass --resume to go on, or --overwrite to begin again."
        )
    return newest, start


def train(
    recipe: str | Path | Recipe,
    data: Dataset | None = None,
    *,
    name: str | None = None,
    workspace: str | Path | None = None,
    assignments: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    prepared: Prepared | None = None,
) -> Path:
    """Train as a recipe says and write ``adapters/NAME``.

    While it runs, checkpoints and TensorBoard's events stand in ``runs/NAME``; the checkpoints go when the adapter is
    written. In several processes (``accelerate launch``) the main one writes, and all return when it has.

    Args:
        recipe: A recipe file, or a ``Recipe`` (then ``name`` is needed).
        data: The data set; read from the recipe's ``data`` folder where it is not given.
        name: Of the adapter; the recipe file's name where it is not given.
        workspace: What relative paths are relative to; the folder above the recipe's where it is not given.
        assignments: ``key=value`` changes to a recipe file.
        overwrite: Replace an adapter that is there. Without ``resume`` it throws an interrupted run away, and says so.
        resume: Go on where a run was interrupted, to the very adapter that it would have made. Learning rates, their
            schedule and ``max_grad_norm`` may be others for the rest of it.
        prepared: What an update trains on with, in the place of what the recipe would build.

    Returns:
        The adapter's folder.

    Raises:
        ConfigError, DataError, PromptError, AdapterError: See their messages. Nothing is written.
        StorageError: An adapter or an interrupted run is there, or the disk refused.
    """
    recipe, name, root = _named(recipe, name, workspace, assignments)
    out, folder = root / "adapters" / name, root / "runs" / name
    newest, start = beginning(name, root, overwrite=overwrite, resume=resume)
    with _one_voice(), _ready(recipe, root, data, prepared) as run:
        begins = gather_object([0 if start is None else start.step])
        if len(set(begins)) > 1:
            raise StorageError(
                f"{folder}: the processes would begin at steps {begins}. Put it on a disk that all share."
            )
        if start is not None:
            assert newest is not None
            changed = checkpoints.check(newest, start.fingerprint, run.fingerprint, _PACE)
            progress.say(f"going on from {newest}: step {start.step} of {start.total}")
            for key, (was, now) in changed.items():
                progress.say(f"going on with {key.removeprefix('recipe.')} {now}, was {was}")
            if changed:
                start.watch["changes"].append({"step": start.step, **changed})
        elif resume:
            progress.say(f"nothing to resume in {folder}: starting from the beginning")
        elif newest is not None:
            progress.say(f"--overwrite: the interrupted run in {folder} is thrown away at {newest.name}")
        if is_main():
            checkpoints.tidy(folder)
            if start is None:
                checkpoints.remove(folder)
        progress.say(estimates.line(len(run.rows), run.steps, *estimates.parameters(run.model)))
        watch = _run(run, folder, start)
        if is_main():
            _save(run, watch, out, overwrite)
            checkpoints.remove(folder)
        PartialState().wait_for_everyone()
    return out


def _save(run: _Run, watch: Watch, out: Path, overwrite: bool) -> None:
    """Write the adapter."""
    told = {"validation": watch.curve, "loss": watch.losses}
    adapters.save(
        out,
        model=run.model,
        tuning=run.recipe.tuning,
        base=run.base,
        tokenization=run.rows.tokenization,
        prompts={prompt.name: prompt for prompt in sorted(run.prompts, key=lambda prompt: prompt is not run.leader)},
        manifest={
            "recipe": as_table(run.recipe),
            "data": {"path": run.recipe.data, "hash": run.data.hash, "manifest": run.data.manifest},
            "user_columns": adapters.user_columns(run.data.users, run.prompts),
            "fitted_on": run.split.train_hash,
            "protocol": run.split.protocol,
            "training_rows": len(run.rows),
            "kept": watch.best,
            **({"changed_on_resume": watch.changes} if watch.changes else {}),
            **({} if run.prepared is None else {"update": run.prepared.report(run.model)}),
        },
        extra={
            "learning_curve.json": json.dumps(told, indent=1).encode(),
            "learning_curve.png": learning_curve.picture(watch.curve, watch.losses),
        },
        overwrite=overwrite,
        before=None if run.prepared is None else run.prepared.write,
    )


def _run(run: _Run, folder: Path, start: checkpoints.Checkpoint | None) -> Watch:
    """Train the model in place, from ``start`` on, and leave the best weights by validation in it."""
    validation, engine = run.validation(), run.engine()
    order, done = run.order, 0 if start is None else start.step
    if start is not None:
        checkpoints.set_trained(run.model, start.weights)
    with progress.bar("training", run.steps) as advance:
        advance(done)
        watch = Watch(
            lambda: validation.evaluate(engine),
            run.model,
            run.marks,
            run.recipe.validation.patience,
            advance,
            tasks=[prompt.name for prompt in run.prompts],
            logging_steps=int(run.config.logging_steps),
            save_steps=run.recipe.training.get("save_steps", 0),
            run=folder,
            fingerprint=run.fingerprint,
            total=run.steps,
            start=start,
            main=is_main(),
        )
        try:
            if done < run.steps and not watch.stopped:
                tally = Tally(len(run.rows))
                rest = order[done * run.batch :]
                with run.trainer(rest, watch, watch=watch, tally=tally, total=run.steps) as trainer:
                    watch.scaler = trainer.accelerator.scaler
                    trainer.train()
                    seen = trainer.state.global_step
                    tally.check(rest[: seen * run.batch], run.config.device, run.named)
                    if not watch.stopped and done + seen < run.steps:
                        raise GenrecError(f"training ended at step {done + seen} of {run.steps}. Nothing was written.")
                    done += seen
            watch.finish(done)
        finally:
            watch.close()
    return watch


def estimate(
    recipe: str | Path | Recipe,
    data: Dataset | None = None,
    *,
    name: str | None = None,
    workspace: str | Path | None = None,
    assignments: Sequence[str] = (),
) -> Estimate:
    """What ``train`` with the same arguments would take, from building everything and timing a few real steps.

    Writes nothing, and reads no adapter or run that is there. Raises what ``train`` would before its first step.
    """
    began = time.perf_counter()
    recipe, _, root = _named(recipe, name or "", workspace, assignments)
    with _one_voice(), _ready(recipe, root, data) as run:
        validation, engine = run.validation(), run.engine()
        prepared = time.perf_counter() - began
        batches = run.order.reshape(run.steps, -1, run.config.per_device_train_batch_size)
        sizes = estimates.Sizes.of(run.rows, batches)
        (largest, place), median, clock = sizes.largest(), sizes.median(), estimates.Clock()
        chosen = batches[[median, median, median, largest, largest]].reshape(-1)
        with run.trainer(chosen, clock) as trainer:
            trainer.train()
            inputs = run.collate([{"row": int(row)} for row in batches[largest, place]])
            activations = estimates.activations(trainer, run.model, inputs)
            state = estimates.state_bytes(trainer.optimizer)
        began = time.perf_counter()
        validation.evaluate(engine)
        return sizes.estimate(
            run.rows, batches, run.model,
            median=clock.seconds[1:3], largest=clock.seconds[3:], looks=len(run.marks) + 1,
            validation=time.perf_counter() - began, preparation=prepared,
            optimizer=state, activations=activations, device=str(run.config.device),
        )  # fmt: skip
