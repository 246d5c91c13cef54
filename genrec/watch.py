"""What watches a training run: validation, early stopping, losses per task, TensorBoard, checkpoints, the bar."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce

from genrec import checkpoints
from genrec.checkpoints import Checkpoint
from genrec.errors import DecodingError, GenrecError


def diverged(step: int, run: Path | None, rate: float) -> GenrecError:
    """The error of a run whose loss or weights are no finite numbers any more.

    Args:
        step: Steps done.
        run: Where its checkpoints are.
        rate: Its training.learning_rate.
    """
    kept = checkpoints.newest(run) if run is not None else None
    lower = f"training.learning_rate={rate / 10:g}"
    advice = f"Lower training.learning_rate ({lower} is a good next try) or lengthen warmup_steps."
    if kept is not None:
        advice = (
            f"{kept} holds the last good weights. Go on from them with --resume {lower}, "
            "or begin again with --overwrite and a lower rate or longer warmup_steps."
        )
    return GenrecError(f"the loss was no finite number any more after {step} steps. Nothing was written. {advice}")


class Board:
    """TensorBoard's event files in ``run/tensorboard``; those of an earlier run go, but for one that goes on."""

    def __init__(self, run: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # Takes a second, which no other command should wait for.

        if not done:
            shutil.rmtree(run / "tensorboard", ignore_errors=True)
        # Of steps that a killed process had done after its last checkpoint, what is told now counts.
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=done + 1 if done else None)

    def loss(self, entry: Mapping[str, Any]) -> None:
        step = entry["step"]
        self.writer.add_scalar("loss/all", entry["loss"], step)
        for task, value in entry["tasks"].items():
            self.writer.add_scalar(f"loss/{task}", value, step)
        self.writer.add_scalar("learning_rate", entry["learning_rate"], step)

    def validation(self, entry: Mapping[str, Any]) -> None:
        for name in ("ndcg", "recall"):
            self.writer.add_scalar(f"validation/{name}_at_10", entry[f"{name}@10"], entry["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Watch(transformers.TrainerCallback):
    """Evaluates on validation cases, keeps the best weights, stops early, tells losses, writes checkpoints.

    Where there are several processes, each has a watch and all agree: the main process evaluates and tells the
    others, and it alone writes.

    Args:
        evaluate: Gives ``ndcg@10`` and ``recall@10`` of the model as it is.
        model: What is trained.
        marks: Step -> epoch, where to evaluate.
        patience: Evaluations without a better one before training stops (0: never).
        advance: Of the progress bar.
        tasks: Names of the tasks, in the order of their numbers in a batch.
        logging_steps: Steps between two entries of ``losses``.
        save_steps: Steps between two checkpoints besides those of evaluations (0: none).
        run: The folder of checkpoints and TensorBoard; None writes neither.
        fingerprint, total: Of the run, for its checkpoints.
        start: The checkpoint that the run goes on from.
        main: Whether this is the process that evaluates and writes.

    Attributes:
        curve: Every evaluation: step, epoch, seconds, ndcg@10, recall@10.
        losses: Every ``logging_steps``: step, loss per trained token, the same per task, learning_rate.
        best: The entry of ``curve`` whose weights are kept.
        changes: What a run that went on changed: the step, and the old and new values by key.
    """

    def __init__(
        self,
        evaluate: Callable[[], dict[str, float]],
        model: torch.nn.Module,
        marks: Mapping[int, float],
        patience: int,
        advance: Any,
        *,
        tasks: Sequence[str] = (),
        logging_steps: int = 20,
        save_steps: int = 0,
        run: Path | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        total: int = 0,
        start: Checkpoint | None = None,
        main: bool = True,
    ) -> None:
        self.evaluate, self.model, self.marks, self.patience, self.advance = evaluate, model, marks, patience, advance
        self.tasks, self.logging_steps, self.save_steps = list(tasks), logging_steps, save_steps
        self.run, self.fingerprint, self.total, self.start, self.main = run, fingerprint, total, start, main
        self.curve: list[dict[str, float]] = []
        self.losses: list[dict[str, Any]] = []
        self.best: dict[str, float] = {}
        self.changes: list[dict[str, Any]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.sums = torch.zeros(len(self.tasks), 2, dtype=torch.float64)  # Loss and tokens since the last entry.
        self.parts: list[torch.Tensor] = []  # Of ``sums``, float32 where the model is; fetched when they are needed.
        self.stopped, self.rate, self.done, seconds = False, math.nan, 0, 0.0
        self.learning_rate = math.nan
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.scaler: Any = None
        if start is not None:
            kept = start.watch
            self.done, self.curve, self.losses = start.step, kept["curve"], kept["losses"]
            self.best = next(entry for entry in self.curve if entry["step"] == kept["best"])
            self.changes = kept["changes"]
            self.weights = start.best or start.weights
            self.stopped, self.rate, seconds = kept["stopped"], kept["rate"], kept["seconds"]
            if main:  # They are those of all processes.
                self.sums = torch.tensor(kept["sums"], dtype=torch.float64)
        self.began = time.perf_counter() - seconds
        self.board = Board(run, self.done) if run is not None and main else None

    def add(self, tasks: torch.Tensor, losses: torch.Tensor) -> None:
        """Note the losses of trained tokens, float [tokens], and the task of each, int [tokens]."""
        told = torch.stack([losses.detach().float(), torch.ones_like(losses, dtype=torch.float32)], dim=1)
        self.parts.append(told.new_zeros(len(self.tasks), 2).index_add_(0, tasks, told))

    def summed(self) -> torch.Tensor:
        """Loss and tokens of each task since the last entry, of all processes: float64 [tasks, 2], on the CPU."""
        if self.parts:
            for part in torch.stack(self.parts).cpu().double():
                self.sums += part
            self.parts.clear()
        state = PartialState()
        if state.num_processes == 1:
            return self.sums.clone()
        return reduce(self.sums.to(state.device), "sum").cpu()

    def look(self, step: int, epoch: float) -> None:
        """Evaluate, and keep the weights if they are the best so far."""
        found: list[dict[str, float] | None] = [None]
        if self.main:
            try:
                found = [self.evaluate()]
            except DecodingError as error:
                if step == 0:
                    raise
                raise diverged(step, self.run, self.learning_rate) from error
        broadcast_object_list(found)
        assert found[0] is not None
        seconds = round(time.perf_counter() - self.began, 1)
        self.curve.append({"step": step, "epoch": round(epoch, 3), "seconds": seconds, **found[0]})
        if self.board is not None:
            self.board.validation(self.curve[-1])
        if not self.best or found[0]["ndcg@10"] > self.best["ndcg@10"]:
            self.best = self.curve[-1]
            self.weights = checkpoints.trained(self.model)

    def tell(self, step: int) -> None:
        """Make an entry of the losses since the last one."""
        sums = self.summed()
        self.sums.zero_()
        loss, tokens = sums.sum(dim=0).tolist()
        if not tokens:
            return
        tasks = {name: float(part / n) for name, (part, n) in zip(self.tasks, sums.tolist(), strict=True) if n}
        self.losses.append({"step": step, "loss": loss / tokens, "tasks": tasks, "learning_rate": self.rate})
        if self.board is not None:
            self.board.loss(self.losses[-1])

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        weights = checkpoints.trained(self.model)
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise diverged(step, self.run, self.learning_rate)
        sums = self.summed().tolist()
        states = gather_object([checkpoints.random_state()])
        if self.main and self.run is not None:
            checkpoints.save(self.run, self._checkpoint(step, weights, sums, states))
        PartialState().wait_for_everyone()

    def _checkpoint(self, step: int, weights: dict[str, torch.Tensor], sums: Any, states: list[Any]) -> Checkpoint:
        state = {
            "curve": self.curve,
            "losses": self.losses,
            "best": self.best["step"],
            "stopped": self.stopped,
            "rate": self.rate,
            "seconds": time.perf_counter() - self.began,
            "sums": sums,
            "changes": self.changes,
        }
        return Checkpoint(
            step=step,
            total=self.total,
            fingerprint=dict(self.fingerprint or {}),
            weights=weights,
            best={} if self.best["step"] == step else self.weights,
            optimizer=checkpoints.optimizer_state(self.optimizer, self.model),
            scheduler=self.scheduler.state_dict(),
            scaler={} if self.scaler is None else self.scaler.state_dict(),
            random=states,
            watch=state,
        )

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        self.optimizer, self.scheduler = optimizer, lr_scheduler
        self.learning_rate = getattr(args, "learning_rate", math.nan)
        if self.start is None:
            self.look(0, 0.0)
            return
        checkpoints.set_optimizer_state(optimizer, self.model, self.start.optimizer)
        checkpoints.set_schedule(lr_scheduler, self.start.scheduler)
        if self.scaler is not None:
            self.scaler.load_state_dict(self.start.scaler)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.start is not None and state.global_step == 0:  # Making the iterator over batches has drawn a number.
            checkpoints.set_random_state(self.start.random[getattr(args, "process_index", 0)])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rate = float(self.optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = self.done + state.global_step
        if self.tasks and step % self.logging_steps == 0:
            self.tell(step)
        if step in self.marks:
            self.look(step, self.marks[step])
            behind = len(self.curve) - 1 - self.curve.index(self.best)
            self.stopped = bool(self.patience and behind >= self.patience)
            control.should_training_stop = self.stopped
        if self.run is not None and (step in self.marks or (self.save_steps and step % self.save_steps == 0)):
            self.save(step)
        self.advance(1, note=f"NDCG@10 {self.curve[-1]['ndcg@10']:.4f} (best {self.best['ndcg@10']:.4f})")

    def finish(self, step: int) -> None:
        """Make an entry of the losses since the last one, and put the best weights back into the model."""
        if self.tasks:
            self.tell(step)
        checkpoints.set_trained(self.model, self.weights)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


class Tally:
    """Counts how often each row of a plan was trained, to be held against how often it should have been."""

    def __init__(self, rows: int) -> None:
        self.seen = np.zeros(rows, dtype=np.int64)

    def add(self, rows: torch.Tensor) -> None:
        """Note the rows of a batch, int [rows]; -1 is a row that only fills a batch."""
        numbers = rows.cpu().numpy()
        np.add.at(self.seen, numbers[numbers >= 0], 1)

    def check(self, order: np.ndarray, device: Any, named: Callable[[int], str]) -> None:
        """Compare with the row numbers ``order`` of all processes' batches.

        Raises:
            GenrecError: A row was dropped or repeated; names the first one by ``named``.
        """
        seen = reduce(torch.from_numpy(self.seen).to(device), "sum").cpu().numpy()
        wanted = np.bincount(order[order >= 0], minlength=len(self.seen))
        wrong = np.flatnonzero(seen != wanted)
        if len(wrong):
            row = int(wrong[0])
            raise GenrecError(
                f"{len(wrong)} of {len(seen)} training rows were not trained as often as planned. The first is row "
                f"{row} ({named(row)}): planned {wanted[row]}, trained {seen[row]}. Nothing was written; this is a "
                "defect of genrec or of its libraries: please report it."
            )
