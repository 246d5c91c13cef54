from __future__ import annotations

import errno
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError

from genrec import checkpoints, files
from genrec.checkpoints import Checkpoint
from genrec.errors import ConfigError, StorageError


def made(step: int = 5) -> Checkpoint:
    weights = {"a.weight": torch.randn(3, 2), "b": torch.randn(2).to(torch.bfloat16)}
    return Checkpoint(
        step=step,
        total=9,
        fingerprint={"recipe": {"seed": 1}},
        weights=weights,
        best={name: value + 1 for name, value in weights.items()},
        optimizer={"a.weight": {"step": torch.tensor(3.0), "exp_avg": torch.ones(3, 2)}, "b": {"step": 3, "RMS": 0.1}},
        scheduler={"last_epoch": 5, "_last_lr": [0.1 + 0.2]},
        scaler={},
        random=[checkpoints.random_state(), checkpoints.random_state()],
        watch={"curve": [{"step": 0, "ndcg@10": 1 / 3}]},
    )


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_a_checkpoint_comes_back_bit_for_bit_and_the_newest_two_stay(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "run") is None
    for step in (3, 5, 120):
        checkpoints.save(tmp_path / "run", made(step))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-00000005", "step-00000120"]
    newest = checkpoints.newest(tmp_path / "run")
    assert newest == tmp_path / "run" / "step-00000120"
    saved = made(7)
    checkpoints.save(tmp_path / "other", saved)
    loaded = checkpoints.load(tmp_path / "other" / "step-00000007")
    assert same(vars(loaded), vars(saved))
    assert {path.suffix for path in newest.iterdir()} == {".json", ".safetensors"}  # No pickle.


def test_the_generators_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        return [float(torch.rand(())), float(np.random.standard_normal()), random.random(), random.gauss(0, 1)]

    draw()
    state = checkpoints.random_state()
    first = draw()
    checkpoints.set_random_state(state)
    assert draw() == first != draw()


@pytest.mark.parametrize("where", ["weights", "state"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    checkpoints.save(tmp_path, made(3))
    before = files.file_hash(*sorted((tmp_path / "step-00000003").iterdir()))

    def refuse(*_: Any, **__: Any) -> None:
        if where == "weights":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((checkpoints, "save_file") if where == "weights" else (files, "_sync")), refuse)
    with pytest.raises(StorageError, match=r"cannot write .*step-00000005: No space left on device"):
        checkpoints.save(tmp_path, made(5))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    assert files.file_hash(*sorted((tmp_path / "step-00000003").iterdir())) == before


def test_what_killed_processes_left_is_tidied_and_everything_else_stays(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, made(3))
    for name in (".step-00000005.123.tmp", ".step-00000001.9.old", "tensorboard", ".step-x.tmp"):
        (tmp_path / name).mkdir()
    checkpoints.tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-x.tmp", "step-00000003", "tensorboard"]
    checkpoints.remove(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-x.tmp", "tensorboard"]
    checkpoints.remove(tmp_path / "nothing")
    checkpoints.save(tmp_path / "run", made())
    checkpoints.remove(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["state.json", "weights.safetensors", "random.safetensors"])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, file: str, how: str) -> None:
    checkpoints.save(tmp_path, made())
    path = tmp_path / "step-00000005" / file
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.unlink()
    with pytest.raises(StorageError, match=r"step-00000005: this checkpoint is damaged: .* Remove it"):
        checkpoints.load(path.parent)


@pytest.mark.parametrize("there", ["0", "none"])
def test_a_checkpoint_of_another_format_is_no_damaged_one(tmp_path: Path, there: str) -> None:
    checkpoints.save(tmp_path, made())
    path = tmp_path / "step-00000005" / "state.json"
    text = path.read_text()
    assert '"format_version": 1, ' in text
    path.write_text(text.replace('"format_version": 1, ', '"format_version": 0, "more": 1, ' if there == "0" else ""))
    with pytest.raises(
        StorageError, match=r"is a checkpoint of format (0|None), and this genrec goes on from format 1"
    ):
        checkpoints.load(path.parent)


def test_another_run_is_refused_by_the_key_that_differs() -> None:
    path = Path("runs/shop/step-00000005")
    there = {"recipe": {"training": {"learning_rate": 1e-3}, "k": [1, 2]}, "data": "a" * 64}
    checkpoints.check(path, there, {**there, "recipe": {**there["recipe"], "k": (1, 2)}})  # type: ignore[dict-item]
    other = {"recipe": {"training": {"learning_rate": 1e-4}, "k": [1, 2]}, "data": "a" * 64}
    with pytest.raises(ConfigError, match=r"recipe\.training\.learning_rate = 0\.001, and this run has 0\.0001"):
        checkpoints.check(path, there, other)
    with pytest.raises(ConfigError, match=r"made with data = \"a{16}\", and this run has \"b{16}\""):
        checkpoints.check(path, there, {**there, "data": "b" * 64})
    with pytest.raises(ConfigError, match=r"made with recipe\.k = \[1, 2\], and this run has null"):
        checkpoints.check(path, there, {**there, "recipe": {"training": {"learning_rate": 1e-3}}})
    assert checkpoints.check(path, there, there, ["recipe.training"]) == {}
    changed = {"recipe.training.learning_rate": [1e-3, 1e-4]}
    assert checkpoints.check(path, there, other, ["recipe.training"]) == changed
    assert checkpoints.check(path, there, other, ["recipe.training.learning_rate"]) == changed
    with pytest.raises(ConfigError, match=r"recipe\.training\.learning_rate = "):
        checkpoints.check(path, there, other, ["recipe.training.learning", "recipe.k"])


def optimizers() -> list[Any]:
    from transformers.optimization import Adafactor

    return [
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
        lambda p: Adafactor(p, lr=0.1, scale_parameter=False, relative_step=False),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", optimizers(), ids=["adamw", "sgd", "adagrad", "rmsprop", "adafactor", "fused"])
def test_an_optimizer_goes_on_as_if_nothing_had_happened(tmp_path: Path, make: Any, dtype: torch.dtype) -> None:
    """Adafactor keeps float32 of bfloat16 weights."""

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(dtype)

    def groups(net: torch.nn.Module) -> list[dict[str, Any]]:  # Not in the model's own order.
        return [{"params": [net[1].weight, net[0].weight]}, {"params": [net[1].bias, net[0].bias], "lr": 0.01}]

    def steps(net: torch.nn.Module, optimizer: Any, count: int) -> None:
        for _ in range(count):
            net(torch.rand(5, 4).to(dtype)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, there = model(), model()
    full = make(groups(whole))
    torch.manual_seed(1)
    steps(whole, full, 6)
    optimizer = make(groups(there))
    torch.manual_seed(1)
    steps(there, optimizer, 2)
    state = checkpoints.random_state()
    kept = replace(made(2), optimizer=checkpoints.optimizer_state(optimizer, there), weights=checkpoints.trained(there))
    checkpoints.save(tmp_path, kept)
    loaded = checkpoints.load(tmp_path / "step-00000002")
    again = model()
    checkpoints.set_trained(again, loaded.weights)
    fresh = make(groups(again))
    checkpoints.set_optimizer_state(fresh, again, loaded.optimizer)
    assert same(checkpoints.optimizer_state(fresh, again), kept.optimizer)
    checkpoints.set_random_state(state)
    steps(again, fresh, 4)
    assert same(checkpoints.trained(again), checkpoints.trained(whole))


@pytest.mark.parametrize("kind", ["linear", "cosine_with_min_lr", "polynomial", "constant", "inverse_sqrt"])
def test_a_schedule_goes_on_at_its_rates_or_at_new_ones(kind: str) -> None:
    more = {"cosine_with_min_lr": {"min_lr_rate": 0.1}}

    def schedule(rate: float, groups: int = 2) -> tuple[Any, Any]:
        parameters = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate / (1 + n)} for n in range(groups)]
        optimizer = torch.optim.SGD(parameters, lr=rate)
        made_ = transformers.get_scheduler(
            kind, optimizer, num_warmup_steps=2, num_training_steps=9, scheduler_specific_kwargs=more.get(kind)
        )
        return optimizer, made_

    def rates(optimizer: Any, scheduler: Any, steps: int) -> list[list[float]]:
        found = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            found.append([group["lr"] for group in optimizer.param_groups])
            assert found[-1] == scheduler.get_last_lr()
        return found

    optimizer, scheduler = schedule(0.3)
    rates(optimizer, scheduler, 4)
    state = json.loads(json.dumps(scheduler.state_dict()))
    for new, groups in ((0.3, 2), (0.003, 2), (0.003, 1)):
        whole, there = schedule(new, groups), schedule(new, groups)
        before = rates(*whole, 4)[-1]
        checkpoints.set_schedule(there[1], state)
        assert [group["lr"] for group in there[0].param_groups] == before
        assert there[1].get_last_lr() == before
        assert rates(*there, 4) == rates(*whole, 4)
