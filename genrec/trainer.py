"""The trainer: TRL's, with rows that are made when they are asked for, the loss of genrec, and rates of its own for
identifier rows. The only module that imports TRL; what is trained, and what becomes of it, is ``training``'s.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate.utils import DistributedType
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

from genrec import adapter as adapters
from genrec import base as bases
from genrec.config import Recipe
from genrec.curriculum import HISTORY, Rows
from genrec.dropout import dropout
from genrec.errors import ConfigError
from genrec.negatives import Negatives
from genrec.options import training_options
from genrec.rows import is_rows
from genrec.tokenization import IGNORE
from genrec.watch import Tally, Watch, diverged

TRL_TRAINER = SFTTrainer  # Whose loss a benchmark compares with.
OWN_INPUTS = ("weights", "rows", "tasks", "kinds")  # Of a batch: what no model takes.


class Trainer(SFTTrainer):
    """TRL's trainer with rows in the plan's order and the LM head applied to labelled positions only.

    TRL computes every position's logits in chunks with entropy and accuracy, which costs small models with large
    vocabularies more than the rest of the step; the loss is the same (a test holds it equal).
    """

    def __init__(self, *arguments: Any, watch: Watch | None = None, tally: Tally | None = None,
                 rows_rate: float | None = None, total: int = 0, negatives: Negatives | None = None,
                 **options: Any) -> None:  # fmt: skip
        self.watch, self.tally, self.rows_rate, self.total = watch, tally, rows_rate, total
        self.negatives = negatives
        super().__init__(*arguments, **options)
        self.model_accepts_loss_kwargs = True  # Of a step's tokens; a model that would take none gets none of ours.

    def floating_point_ops(self, inputs: Any) -> int:
        """None is told, and counting all parameters for it at every step is felt with small models."""
        return 0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        labels = inputs.pop("labels")[:, 1:]
        weights, rows, tasks, kinds = (inputs.pop(key, None) for key in OWN_INPUTS)
        mask = labels != IGNORE
        inner = self.accelerator.unwrap_model(model)
        inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner

        logits, target = self._logits(model, inner.get_output_embeddings(), inputs, labels, mask, kinds)
        losses = torch.nn.functional.cross_entropy(
            logits, target, reduction="none", label_smoothing=self.args.label_smoothing_factor
        )
        if weights is not None:
            losses = losses * weights[:, 1:][mask]
        loss = losses.sum()
        if not torch.isfinite(loss):
            done = 0 if self.watch is None else self.watch.done
            run = None if self.watch is None else self.watch.run
            raise diverged(done + self.state.global_step, run, self.args.learning_rate)
        if self.tally is not None and rows is not None:
            self.tally.add(rows)
        if self.watch is not None and tasks is not None:
            self.watch.add(tasks[:, None].expand_as(mask)[mask], losses)
        if num_items_in_batch is None:
            return loss / mask.sum().clamp(min=1)
        # The count is that of all processes, and of their gradients the mean is taken.
        return loss / torch.as_tensor(num_items_in_batch).clamp(min=1) * self.accelerator.num_processes

    def _logits(
        self, model: Any, head: Any, inputs: Any, labels: torch.Tensor, mask: torch.Tensor, kinds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [labelled, candidates], and int64 [labelled], which of them is right."""
        if self.negatives is not None:
            with self.negatives.on(head, labels, mask, kinds == HISTORY) as weights:
                logits = model(**inputs, use_cache=False).logits[0]
            return logits.float() + weights, torch.zeros(len(weights), dtype=torch.long, device=labels.device)

        def labelled(_: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return (arguments[0][:, :-1][mask][None],)

        handle = head.register_forward_pre_hook(labelled)
        try:
            return model(**inputs, use_cache=False).logits[0].float(), labels[mask]
        finally:
            handle.remove()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """TRL's, with the identifier rows in groups of their own where they have their own learning rate."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.rows_rate is not None:
            own = {id(p) for name, p in self.model.named_parameters() if is_rows(name)}
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in own]
                if moved:
                    group["params"] = [p for p in group["params"] if id(p) not in own]
                    optimizer.add_param_group(
                        {"params": moved, "weight_decay": group["weight_decay"], "lr": self.rows_rate}
                    )
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """TRL's, over the steps of the whole run where this is the rest of one that was interrupted."""
        return super().create_scheduler(self.total or num_training_steps, optimizer)


def sft_config(recipe: Recipe, output: str) -> SFTConfig:
    given = {**training_options(recipe.training), "num_train_epochs": 1, "max_steps": -1}  # The plan holds all epochs.
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
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=recipe.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
            **given,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"recipe: [training] was refused: {error}") from error


@dataclass(kw_only=True)
class Trainable:
    """Rows, and a model to be trained on them."""

    recipe: Recipe
    rows: Rows
    model: Any
    config: SFTConfig

    def collate(self, examples: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        """A padded batch of rows, with number, task and kind of each; a row -1 is one token without a label."""
        pad = self.rows.tokenization.tokenizer.pad_token_id
        numbers = [example["row"] for example in examples]
        real = [number for number in numbers if number >= 0]
        made = self.rows.batch(real or [0], pad)
        fillers = len(numbers) - len(real)
        if not real:
            made = {key: value[:0, :1] for key, value in made.items()}
        blank = {"input_ids": pad, "labels": IGNORE}
        for key, value in made.items():
            filler = np.full((fillers, value.shape[1]), blank.get(key, 0), dtype=value.dtype)
            if key == "attention_mask":
                filler[:, 0] = 1
            made[key] = np.concatenate([value, filler])
        made["rows"] = np.array(real + [-1] * fillers, dtype=np.int64)
        for key, column in (("tasks", 1), ("kinds", 2)):
            told = self.rows.plan.table[real, column]
            made[key] = np.concatenate([told, np.zeros(fillers)]).astype(np.int64)
        return {key: torch.from_numpy(value) for key, value in made.items()}

    def negatives(self) -> Negatives | None:
        """What the softmax of training is over beside the target, where the recipe says that it is not all."""
        tokenization, count = self.rows.tokenization, self.recipe.negatives
        if not count:
            return None
        ids = adapters.identifier_ids(tokenization)
        seen = np.unique(np.concatenate([np.empty(0, dtype=np.int32), *self.rows.train]))
        unseen = ids[~torch.isin(ids, torch.from_numpy(tokenization.tokens[seen].astype(np.int64)))]
        return Negatives(ids, len(tokenization.tokenizer), count, unseen)

    @contextmanager
    def trainer(self, order: np.ndarray, callback: Any, **options: Any) -> Iterator[Trainer]:
        """TRL's trainer of the rows ``order``, with dropout on and without the noise of the libraries."""
        with dropout(self.model, self.recipe.dropout), bases.quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="trl")
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*label_smoothing_factor")  # Ours acts.
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            try:
                made = Trainer(
                    model=self.model,
                    args=self.config,
                    # Row numbers alone: the collator makes the rows, so nothing is stored or hashed twice.
                    train_dataset=datasets.Dataset.from_dict({"row": order.tolist()}),
                    data_collator=self.collate,
                    processing_class=self.rows.tokenization.tokenizer,
                    callbacks=[callback],
                    rows_rate=self.recipe.rows_learning_rate,
                    negatives=self.negatives(),
                    **options,
                )
            except ValueError as error:  # Such as fp16 without a GPU.
                raise ConfigError(f"recipe: [training] was refused: {error}") from error
            kind = made.accelerator.distributed_type
            if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
                raise ConfigError(
                    f"this process was launched for {kind.value}, which divides the model, and validation and "
                    "checkpoints need it whole. Launch it without, as in docs/training.md."
                )
            made.remove_callback(transformers.PrinterCallback)
            yield made


@contextmanager
def ready(recipe: Recipe, rows: Rows, model: Any, callback: Any, epochs: float = 1.0) -> Iterator[SFTTrainer]:
    """The trainer that ``train`` has, on given rows, with all that hangs on it but validation and checkpoints.

    Args:
        recipe: Its ``[training]``, dropout and rows_learning_rate count.
        rows, model: What is trained on what.
        callback: Of transformers, called besides.
        epochs: How often the rows are gone through.
    """
    blank, names = {"ndcg@10": 0.0, "recall@10": 0.0}, [prompt.name for prompt in rows.prompts]
    watch = Watch(lambda: blank, model, {}, 0, lambda *_, **__: None, tasks=names)
    with tempfile.TemporaryDirectory() as scratch:
        run = Trainable(recipe=recipe, rows=rows, model=model, config=sft_config(recipe, scratch))
        run.config.num_train_epochs = epochs
        with run.trainer(np.arange(len(rows)), watch, watch=watch, tally=Tally(len(rows))) as trainer:
            trainer.add_callback(callback)
            yield trainer
