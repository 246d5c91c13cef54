from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from genrec import estimates
from genrec.estimates import Estimate, Sizes


class Row:
    def __init__(self, length: int) -> None:
        self.ids = np.zeros(length)


class Rows:
    """Rows whose length is their number plus one."""

    def row(self, number: int) -> Row:
        return Row(number + 1)


def test_sizes_count_padding_and_find_the_largest_and_the_median_step() -> None:
    order = np.array([[[0, 3], [1, 1]], [[9, 0], [2, 2]], [[4, 4], [5, -1]]])  # Three steps of two batches of two rows.
    sizes = Sizes.of(Rows(), order)  # type: ignore[arg-type]
    assert sizes.padded.tolist() == [[8, 4], [20, 6], [10, 12]]
    assert sizes.tokens == (1 + 4 + 2 + 2) + (10 + 1 + 3 + 3) + (5 + 5 + 6 + 1)
    assert sizes.largest() == (1, 0)
    assert sizes.median() == 2


def test_long_runs_are_measured_at_evenly_spaced_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "SAMPLE", 40)
    sizes = Sizes.of(Rows(), np.arange(400).reshape(100, 1, 4))  # type: ignore[arg-type]
    assert sizes.numbers.tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert sizes.largest() == (99, 0)


def test_seconds_are_a_part_per_step_and_a_part_per_token() -> None:
    sizes = Sizes(np.array([[10], [20], [60]]), 90, np.arange(3), 3)
    assert sizes.seconds([2.0, 4.0], [7.0]) == pytest.approx(2 + 3 + 7)  # 1 second a step and 0.1 a token.
    assert sizes.seconds([3.0], [1.0]) == pytest.approx(9)  # A faster large step says nothing about tokens.
    assert sizes.seconds([1.0], [9.0]) == pytest.approx(90 / 20)  # No step below nothing: by tokens alone.


def test_saved_bytes_are_those_that_the_backward_pass_needs() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model_wrapped = torch.nn.Linear(8, 3, bias=False)

        def compute_loss_context_manager(self) -> torch.autograd.graph.saved_tensors_hooks:
            return torch.autograd.graph.saved_tensors_hooks(lambda value: value, lambda value: value)

        def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return inputs

        def compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return model(inputs["x"]).square().sum()

    class Outer(Trainer):
        def compute_loss_context_manager(self) -> torch.autograd.graph.saved_tensors_hooks:
            import contextlib

            return contextlib.nullcontext()  # type: ignore[return-value]

    trainer = Outer()
    # The input (5 x 8 floats) for the weight's gradient and the output (5 x 3) for the square's; no parameter.
    assert estimates.activations(trainer, trainer.model_wrapped, {"x": torch.rand(5, 8)}) == 4 * (5 * 8 + 5 * 3)


def test_the_table_and_the_line_say_it_in_words() -> None:
    values = {item.name: 2**20 if item.type == "int" else 1.5 for item in fields(Estimate)}
    found = dict(Estimate(**{**values, "basis": "cpu", "padding": 0.123}).table())  # type: ignore[arg-type]
    assert found["memory"] == "1.0 MiB (weights 1.0 MiB, gradients 1.0 MiB, optimizer 1.0 MiB, activations 1.0 MiB)"
    assert found["padding"] == "12.3%"
    assert found["seconds"] == "1.5 (preparation 1.5, training 1.5, validation 1.5)"
    assert estimates.line(1234, 5, 67, 8900) == "1,234 rows, 5 steps, 67 of 8,900 parameters trained"
