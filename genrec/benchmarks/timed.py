"""Training that ends when its time is over."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from genrec.benchmarks import CLOCKS, Clock


@dataclass
class Timed(transformers.TrainerCallback):
    """Ends training when its time is over; validates at half time and at the end, which takes none of it."""

    limit: float
    evaluate: Callable[[], dict[str, float]]
    clock: Clock
    found: list[float] = field(default_factory=list)
    steps: int = 0
    began: float = 0.0
    outside: float = 0.0

    def share(self) -> float:
        """Of the time that is over."""
        return (CLOCKS[self.clock]() - self.began - self.outside) / self.limit

    def schedule(self, trainer: Any) -> None:
        """Have the learning rate of ``trainer`` follow the clock, not the steps."""

        def create(num_training_steps: int, optimizer: Any = None) -> Any:
            chosen = trainer.optimizer if optimizer is None else optimizer
            trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, lambda _: rate_at(self.share()))
            return trainer.lr_scheduler

        trainer.create_scheduler = create

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = CLOCKS[self.clock]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step
        share = self.share()
        if share >= (len(self.found) + 1) / 2:
            before = CLOCKS[self.clock]()
            self.found += [self.evaluate()["ndcg@10"]] * (min(int(2 * share), 2) - len(self.found))
            self.outside += CLOCKS[self.clock]() - before
        control.should_training_stop = share >= 1


def rate_at(share: float) -> float:
    """The learning rate's factor when ``share`` of the time is over: a twentieth to warm up, then a cosine to 0."""
    if share < 0.05:
        return max(share / 0.05, 0.01)
    return 0.5 * (1 + math.cos(math.pi * min((share - 0.05) / 0.95, 1.0)))
