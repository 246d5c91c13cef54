from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from genrec.errors import GenrecError
from genrec.watch import Board, Tally, Watch, diverged

# Validation decides


def watched(values: list[float], patience: int = 0) -> tuple[Any, torch.nn.Linear, Any]:
    """Steps of which each sets the weight to its number, judged by ``values``."""
    model, scores = torch.nn.Linear(1, 1), iter(values)
    model.bias.requires_grad = False
    marks = {step: float(step) for step in range(1, len(values))}
    watch = Watch(lambda: {"ndcg@10": next(scores), "recall@10": 0.0}, model, marks, patience, lambda *_, **__: None)

    class State:
        global_step, epoch = 0, 0.0

    class Control:
        should_training_stop = False

    with torch.no_grad():
        model.weight.fill_(0)
        watch.on_train_begin(None, State, Control)
        for step in range(1, len(values)):
            model.weight.fill_(step)
            State.global_step = step
            watch.on_step_end(None, State, Control)
            if Control.should_training_stop:
                break
    watch.finish(State.global_step)
    return watch, model, State


@pytest.mark.parametrize(
    ("values", "kept"), [([0.1, 0.3, 0.2], 1), ([0.5, 0.3, 0.2], 0), ([0.1, 0.2, 0.3], 2), ([0.1, 0.3, 0.3], 1)]
)
def test_the_weights_of_the_best_look_are_kept(values: list[float], kept: int) -> None:
    watch, model, _ = watched(values)
    assert model.weight.item() == kept
    assert watch.best["step"] == kept
    assert [point["ndcg@10"] for point in watch.curve] == values
    assert [point["epoch"] for point in watch.curve] == [0.0, 1.0, 2.0]
    assert set(watch.weights) == {"weight"}


def test_training_stops_when_patience_is_spent() -> None:
    _, model, state = watched([0.1, 0.3, 0.2, 0.2, 0.9], patience=2)
    assert state.global_step == 3
    assert model.weight.item() == 1


def test_losses_are_means_per_trained_token_of_all_and_of_each_task() -> None:
    watch = Watch(dict, torch.nn.Linear(1, 1), {}, 0, None, tasks=["a", "b", "never"])
    watch.rate = 0.25
    watch.add(torch.tensor([0, 0, 1]), torch.tensor([1.0, 2.0, 9.0]))
    watch.add(torch.tensor([1]), torch.tensor([3.0]))
    watch.tell(20)
    watch.tell(40)  # Nothing since.
    watch.add(torch.tensor([0]), torch.tensor([7.0], dtype=torch.bfloat16))
    watch.weights = {}
    watch.finish(43)
    assert watch.losses == [
        {"step": 20, "loss": 15 / 4, "tasks": {"a": 1.5, "b": 6.0}, "learning_rate": 0.25},
        {"step": 43, "loss": 7.0, "tasks": {"a": 7.0}, "learning_rate": 0.25},
    ]


def test_losses_stay_where_they_are_until_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy would make a GPU wait at every batch; and float64 is not for every device."""
    watch = Watch(dict, torch.nn.Linear(1, 1), {}, 0, None, tasks=["a"])
    watch.add(torch.zeros(3, dtype=torch.int64, device="meta"), torch.zeros(3, device="meta"))
    assert [(part.device.type, part.dtype, part.shape) for part in watch.parts] == [("meta", torch.float32, (1, 2))]


def test_a_row_that_was_dropped_or_repeated_is_named() -> None:
    tally = Tally(4)
    for rows in ([0, 1, -1], [2, 3, -1]):
        tally.add(torch.tensor(rows))
    tally.check(np.array([3, 2, 1, 0, -1, -1]), "cpu", str)
    with pytest.raises(GenrecError, match=r"1 of 4 training rows .* row 1 \(row one\): planned 2, trained 1"):
        tally.check(np.array([3, 2, 1, 0, 1]), "cpu", {1: "row one"}.__getitem__)
    tally.add(torch.tensor([3]))
    with pytest.raises(GenrecError, match=r"row 3 \(3\): planned 1, trained 2"):
        tally.check(np.arange(4), "cpu", str)


def test_a_diverged_run_says_which_checkpoint_is_left(tmp_path: Path) -> None:
    for run in (None, tmp_path):
        assert str(diverged(7, run, 1e-3)).endswith(
            "Lower training.learning_rate (training.learning_rate=0.0001 is a good next try) or lengthen warmup_steps."
        )
    (tmp_path / "step-00000004").mkdir()
    assert (
        f"{tmp_path / 'step-00000004'} holds the last good weights. "
        "Go on from them with --resume training.learning_rate=0.0001, or" in str(diverged(7, tmp_path, 1e-3))
    )


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_is_told_and_a_run_that_goes_on_adds_to_it(tmp_path: Path) -> None:
    def entry(step: int) -> dict[str, Any]:
        return {"step": step, "loss": step / 10, "tasks": {"next_item": 0.5}, "learning_rate": 1e-2}

    first = Board(tmp_path, 0)
    first.validation({"step": 0, "ndcg@10": 0.25, "recall@10": 0.5})
    for step in (10, 20):
        first.loss(entry(step))
    first.close()
    again = Board(tmp_path, 10)  # Step 20 was done, but no checkpoint written after it.
    again.loss(entry(20))
    again.close()
    assert scalars(tmp_path) == {
        "validation/ndcg_at_10": [(0, 0.25)],
        "validation/recall_at_10": [(0, 0.5)],
        "loss/all": [(10, 1.0), (20, 2.0)],
        "loss/next_item": [(10, 0.5), (20, 0.5)],
        "learning_rate": [(10, 0.01), (20, 0.01)],
    }
    fresh = Board(tmp_path, 0)
    fresh.loss(entry(5))
    fresh.close()
    assert scalars(tmp_path)["loss/all"] == [(5, 0.5)]
