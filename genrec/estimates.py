"""What a training run will take: rows, tokens, padding, parameters, memory and time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from genrec.curriculum import Rows

SAMPLE = 20_000  # Rows whose length is looked up; of a longer run, those of evenly spaced steps.


@dataclass(frozen=True)
class Estimate:
    """An estimate of a training run; bytes and seconds are for this machine.

    Attributes:
        rows, steps: Of the whole run.
        items: Identifiers of sequence prompts that carry loss, over the whole run.
        tokens_per_epoch: Without padding.
        padding: Share of the batches' positions that are padding.
        trainable, parameters: Parameters trained, and all.
        weights, gradients, optimizer, activations: Bytes; see ``basis``.
        memory: Their sum.
        preparation, training, validation: Seconds; ``validation`` is that of all evaluations.
        seconds: Their sum.
        basis: How memory and time were found out.
    """

    rows: int
    steps: int
    items: int
    tokens_per_epoch: int
    padding: float
    trainable: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    memory: int
    preparation: float
    training: float
    validation: float
    seconds: float
    basis: str

    def table(self) -> list[list[str]]:
        """Rows of a table: what, and how much."""
        memory = ", ".join(
            f"{name} {_mebibytes(getattr(self, name))}" for name in ("weights", "gradients", "optimizer", "activations")
        )
        parts = ", ".join(f"{name} {getattr(self, name):.1f}" for name in ("preparation", "training", "validation"))
        return [
            ["training rows", f"{self.rows:,}"],
            ["supervised items", f"{self.items:,}"],
            ["tokens per epoch", f"{self.tokens_per_epoch:,}"],
            ["padding", f"{self.padding:.1%}"],
            ["steps", f"{self.steps:,}"],
            ["trained parameters", f"{self.trainable:,} of {self.parameters:,}"],
            ["memory", f"{_mebibytes(self.memory)} ({memory})"],
            ["seconds", f"{self.seconds:.1f} ({parts})"],
            ["how", self.basis],
        ]


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trained parameters, and all."""
    counts = [(value.numel(), value.requires_grad) for value in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


def line(rows: int, steps: int, trained: int, total: int) -> str:
    """The estimate in one line, known before anything is timed."""
    return f"{rows:,} rows, {steps:,} steps, {trained:,} of {total:,} parameters trained"


class Clock(transformers.TrainerCallback):
    """Seconds of each step, with the making of its batches."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def state_bytes(optimizer: Any) -> int:
    """Bytes of what an optimizer keeps."""
    kept = {id(value): value for state in optimizer.state.values() for value in state.values()}
    return sum(value.nbytes for value in kept.values() if isinstance(value, torch.Tensor))


def activations(trainer: Any, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of one batch, parameters left out."""
    own = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model_wrapped, trainer._prepare_inputs(inputs))
    del loss
    return sum(kept.values())


@dataclass(frozen=True)
class Sizes:
    """Lengths of the rows of a run's batches, or of evenly spaced steps of it.

    Attributes:
        padded: int64 [steps, batches], positions of every process's batches of a step, padding included.
        tokens: Positions of them that are no padding.
        numbers: int64 [steps], which steps of the run these are.
        steps: Of the whole run.
    """

    padded: np.ndarray
    tokens: int
    numbers: np.ndarray
    steps: int

    @classmethod
    def of(cls, rows: Rows, order: np.ndarray) -> Sizes:
        """Measure the rows ``order``, int64 [steps, batches, rows]; -1 is a row of one token."""
        steps = len(order)
        numbers = np.unique(
            np.linspace(0, steps - 1, min(steps, max(1, SAMPLE * steps // order.size))).astype(np.int64)
        )
        looked = order[numbers]
        found = {int(row): len(rows.row(int(row)).ids) for row in np.unique(looked) if row >= 0}
        length = np.vectorize(lambda row: found.get(row, 1), otypes=[np.int64])(looked)
        return cls(length.max(axis=2) * order.shape[2], int(length.sum()), numbers, steps)

    def largest(self) -> tuple[int, int]:
        """The step with the longest batch, and that batch's place in it."""
        step, batch = np.unravel_index(int(self.padded.argmax()), self.padded.shape)
        return int(self.numbers[step]), int(batch)

    def median(self) -> int:
        """The step of the median size."""
        sizes = self.padded.sum(axis=1)
        return int(self.numbers[np.argsort(sizes, kind="stable")[len(sizes) // 2]])

    def seconds(self, median: Sequence[float], largest: Sequence[float]) -> float:
        """Seconds of all steps, from those of the median and of the largest one: a part per step, a part per token."""
        sizes = self.padded.sum(axis=1)
        small = int(sizes[self.numbers == self.median()][0])
        large = int(sizes[self.numbers == self.largest()[0]][0])
        usual, most = float(np.mean(median)), float(np.mean(largest))
        each = max(0.0, (most - usual) / (large - small)) if large > small else 0.0
        each = min(each, usual / small)  # No step takes less than nothing.
        return float(((usual - each * small) + each * sizes).mean() * self.steps)

    def estimate(
        self,
        rows: Rows,
        order: np.ndarray,
        model: torch.nn.Module,
        *,
        median: Sequence[float],
        largest: Sequence[float],
        looks: int,
        validation: float,
        preparation: float,
        optimizer: int,
        activations: int,
        device: str,
    ) -> Estimate:
        """Put the measurements together.

        Args:
            rows, order, model: Of the run.
            median, largest: Seconds of steps of the median and the largest size.
            looks, validation: How often is validated, and the seconds of one.
            preparation: Seconds until the first step.
            optimizer, activations: Bytes.
            device: Where it was measured.
        """
        table = rows.plan.table[order[order >= 0]]
        sequence = np.array([prompt.kind == "sequence" for prompt in rows.prompts])[table[:, 1]]
        items = int((table[sequence, 5] - table[sequence, 4] - table[sequence, 6]).sum())
        trained, total = parameters(model)
        weights = sum(value.nbytes for value in [*model.parameters(), *model.buffers()])
        gradients = sum(value.nbytes for value in model.parameters() if value.requires_grad)
        epochs = max(1.0, self.steps * (int(rows.plan.table[-1, 0]) + 1) * order[0].size / len(rows))
        training = self.seconds(median, largest)
        part = "" if len(self.numbers) == self.steps else f", lengths of {len(self.numbers)} of {self.steps} steps"
        return Estimate(
            rows=len(rows),
            steps=self.steps,
            items=items,
            tokens_per_epoch=round(self.tokens / len(self.numbers) * self.steps / epochs),
            padding=1 - self.tokens / int(self.padded.sum()),
            trainable=trained,
            parameters=total,
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            activations=activations,
            memory=weights + gradients + optimizer + activations,
            preparation=preparation,
            training=training,
            validation=looks * validation,
            seconds=preparation + training + looks * validation,
            basis=f"{device}; activations: what autograd kept of the largest batch; libraries, temporary values and "
            f"decoding come on top; time: steps of median and largest size and one validation{part}",
        )
