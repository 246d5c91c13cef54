"""Runs that are killed at any moment and go on: the adapter is that of an uninterrupted run, bit for bit."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from genrec import checkpoints, files, progress, training
from genrec.errors import ConfigError, GenrecError, StorageError
from genrec.trainer import Trainer

CHANGES = (
    "dropout=0.2",
    "training.gradient_accumulation_steps=2",
    "training.per_device_train_batch_size=4",
    "training.max_steps=10",
    "training.save_steps=2",
    "training.logging_steps=3",
    "validation.per_epoch=3",
    "validation.users=10",
)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["genrec.training", "matplotlib.backends.backend_agg", "torch.utils.tensorboard"])


@pytest.fixture
def shop(workspace: Path, tmp_path: Path) -> Path:
    shutil.copytree(workspace, tmp_path / "shop")
    return tmp_path / "shop"


def train(root: Path, recipe: str, *changes: str, name: str = "killed", **options: Any) -> Path:
    path = root / "adapters" / f"{recipe}.toml"
    return training.train(path, assignments=[*CHANGES, *changes], name=name, **options)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_to_be_killed(root: Path, recipe: str, when: tuple[str, float], told: Any) -> None:
    """A run that goes on where the one before stopped, and kills itself: at the n-th time that ``when`` happens, or
    after a part of the seconds that a run takes."""
    progress.quiet = True
    what, number = when
    count = 0

    def deadly(function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                die()
            return function(*arguments, **options)

        return wrapped

    if what == "time":
        timer = threading.Timer(number, die)
        timer.daemon = True
        timer.start()
    elif what == "write":  # Of a file of a checkpoint or of the adapter, or flushing it.
        checkpoints.save_file = deadly(checkpoints.save_file)  # type: ignore[assignment]
        files._sync = deadly(files._sync)  # type: ignore[assignment]
    elif what == "rename":
        Path.replace = deadly(Path.replace)  # type: ignore[method-assign]
    else:
        checkpoints.shutil.rmtree = deadly(shutil.rmtree)  # type: ignore[assignment, attr-defined]
    train(root, recipe, resume=True)
    told.set()


def moments(seed: int) -> Iterator[tuple[str, float]]:
    """Random moments within a run, of every kind in turn."""
    rng = random.Random(seed)
    while True:
        found = [
            ("time", rng.uniform(0.2, 2)),
            ("write", rng.randint(1, 40)),
            ("rename", rng.randint(1, 6)),
            ("remove", rng.randint(1, 4)),
        ]
        rng.shuffle(found)
        yield from found


def kill(root: Path, recipe: str, when: tuple[str, float]) -> bool:
    """Whether a run was killed before it was done."""
    told = CONTEXT.Event()
    process = CONTEXT.Process(target=run_to_be_killed, args=(root, recipe, when, told))
    process.start()
    process.join(60)
    assert process.exitcode == (0 if told.is_set() else -signal.SIGKILL), when
    return not told.is_set()


def content(folder: Path) -> dict[str, Any]:
    """Everything in an adapter's folder but seconds and what follows from them or from its name."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    curve, manifest = json.loads(found["learning_curve.json"]), json.loads(found["genrec.json"])
    for entry in [*curve["validation"], manifest["kept"]]:
        del entry["seconds"]
    del manifest["name"]
    return {**found, "learning_curve.json": curve, "genrec.json": manifest}


def check_kills(root: Path, recipe: str, moments: Iterable[tuple[str, float]], count: int) -> None:
    """Kill runs until ``count`` were killed. One that was done before its moment came is compared and begun anew."""
    whole = content(train(root, recipe, name="whole"))
    out, run, killed = root / "adapters" / "killed", root / "runs" / "killed", 0
    for when in moments:
        if kill(root, recipe, when):
            killed += 1
        there = checkpoints.newest(run)
        if there is not None:
            checkpoints.load(there)
        if out.exists():
            assert content(out) == whole
            shutil.rmtree(out)
            shutil.rmtree(run)
        if killed == count:
            break
    assert killed == count
    assert content(train(root, recipe, resume=True)) == whole
    assert [path.name for path in run.iterdir()] == ["tensorboard"]


@pytest.mark.parametrize(
    ("recipe", "kills"),
    [
        ("lora", [("write", 9), ("rename", 3), ("time", 0.7)]),
        pytest.param("pretrained", [("remove", 1), ("write", 21)], marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_adapter(shop: Path, recipe: str, kills: list[tuple[str, float]]) -> None:
    check_kills(shop, recipe, kills, len(kills))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_twenty_kills_at_random_moments(shop: Path, seed: int) -> None:
    """Four for each seed."""
    check_kills(shop, ("lora", "pretrained")[seed % 2], moments(seed), 4)


class Stop(Exception):
    pass


def interrupt(
    root: Path, monkeypatch: pytest.MonkeyPatch, step: int, *changes: str, recipe: str = "lora", **options: Any
) -> None:
    """A run that ends right after the checkpoint of ``step``."""
    save = checkpoints.save

    def stopping(run: Path, made: checkpoints.Checkpoint) -> None:
        save(run, made)
        if made.step == step:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", stopping)
        with pytest.raises(Stop):
            train(root, recipe, *changes, **options)


@pytest.mark.parametrize("step", [4, 10])
def test_a_run_goes_on_from_its_newest_checkpoint(shop: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Of step 10 all steps are done, and the adapter alone is to be written."""
    interrupt(shop, monkeypatch, step)
    asked: list[int] = []
    make = training.Rows.batch

    def recording(self: training.Rows, numbers: list[int], pad: int) -> Any:
        asked.extend(numbers)
        return make(self, numbers, pad)

    monkeypatch.setattr(training.Rows, "batch", recording)
    out = train(shop, "lora", resume=True)
    assert asked == list(range(8 * step, 80))
    assert content(out) == content(train(shop, "lora", name="whole"))


def test_patience_is_kept_and_a_stopped_run_trains_no_more(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ("validation.patience=2", "training.learning_rate=0.5", "training.max_grad_norm=0", "validation.steps=1")
    whole = train(shop, "lora", *changes, name="whole")
    curve = json.loads((whole / "learning_curve.json").read_text())["validation"]
    assert [entry["step"] for entry in curve] == [0, 1, 2]
    interrupt(shop, monkeypatch, 1, *changes)
    assert content(train(shop, "lora", *changes, resume=True)) == content(whole)
    (shop / "adapters" / "killed").rename(shop / "adapters" / "moved")
    interrupt(shop, monkeypatch, 2, *changes)
    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("it had stopped"))
    assert content(train(shop, "lora", *changes, resume=True)) == content(whole)


def test_an_interrupted_run_is_neither_overlooked_nor_mixed_up(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(shop, monkeypatch, 4)
    capsys.readouterr()
    message = r"runs/killed holds an interrupted run at step 4 of 10\. Pass --resume to go on, or --overwrite to begin"
    with pytest.raises(StorageError, match=message):
        train(shop, "lora")
    for change, key in (
        ("training.weight_decay=0.5", r"recipe\.training\.weight_decay = 0\.01, and this run has 0\.5"),
        ("seed=3", r"recipe\.seed = 0, and this run has 3"),
        ("base=adapters/random", r"recipe\.base = "),
    ):
        with pytest.raises(ConfigError, match=key):
            train(shop, "lora", change, resume=True)
    prompt = shop / "prompts" / "title_to_item.jinja"
    before = prompt.read_text()
    prompt.write_text(before.replace("item.title", "item.title | upper"))
    with pytest.raises(ConfigError, match=r"prompts\.title_to_item = "):
        train(shop, "lora", resume=True)
    prompt.write_text(before)
    capsys.readouterr()
    train(shop, "lora", overwrite=True)
    said = capsys.readouterr().err
    assert "nothing to resume" not in said
    assert f"--overwrite: the interrupted run in {shop / 'runs' / 'killed'} is thrown away at step-00000004" in said
    train(shop, "lora", "training.max_steps=1", resume=True, name="new")
    assert "nothing to resume in" in (told := capsys.readouterr().err)
    assert "starting from the beginning" in told
    assert content(shop / "adapters" / "killed") == content(train(shop, "lora", name="whole"))


@pytest.mark.parametrize("resume", [False, True])
def test_an_adapter_that_is_there_costs_no_interrupted_run(
    shop: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """Advice to pass --overwrite alone would have thrown the run away."""
    whole = content(train(shop, "lora"))
    interrupt(shop, monkeypatch, 4, overwrite=True)
    message = (
        r"exists already\. .*runs/killed holds an interrupted run at step-00000004\. Pass --resume --overwrite to go"
    )
    with pytest.raises(StorageError, match=message):
        train(shop, "lora", resume=resume)
    asked: list[int] = []
    monkeypatch.setattr(checkpoints, "load", lambda path, load=checkpoints.load: asked.append(1) or load(path))
    assert content(train(shop, "lora", resume=True, overwrite=True)) == whole
    assert asked
    with pytest.raises(StorageError, match=r"exists already\. Pass --resume --overwrite to go on"):
        train(shop, "lora", resume=True)


def told(out: Path) -> tuple[dict[int, float], Any]:
    """The learning rate by step, and what was changed on resume."""
    losses = json.loads((out / "learning_curve.json").read_text())["loss"]
    manifest = json.loads((out / "genrec.json").read_text())
    return {entry["step"]: entry["learning_rate"] for entry in losses}, manifest.get("changed_on_resume")


def test_the_rest_of_a_run_may_learn_slower(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slower = ["training.learning_rate=1e-4", "training.lr_scheduler_type=linear", "rows_learning_rate=1e-3"]
    interrupt(shop, monkeypatch, 4, "training.logging_steps=1")
    capsys.readouterr()
    out = train(shop, "lora", "training.logging_steps=1", *slower, resume=True)
    said = capsys.readouterr().err
    assert "going on with training.learning_rate 0.0001, was 0.01" in said
    assert "going on with rows_learning_rate 0.001, was None" in said
    rates, changed = told(out)
    before, none = told(train(shop, "lora", "training.logging_steps=1", name="before"))
    after, _ = told(train(shop, "lora", "training.logging_steps=1", *slower, name="after"))
    assert rates == {step: (before if step <= 4 else after)[step] for step in range(1, 11)}
    assert changed == [
        {
            "step": 4,
            "recipe.rows_learning_rate": [None, 1e-3],
            "recipe.training.learning_rate": [1e-2, 1e-4],
            "recipe.training.lr_scheduler_type": [before_schedule(shop), "linear"],
        }
    ]
    assert none is None
    assert content(out)["genrec.json"]["recipe"]["training"]["learning_rate"] == 1e-4


def before_schedule(root: Path) -> str:
    manifest = json.loads((root / "adapters" / "before" / "genrec.json").read_text())
    return str(manifest["recipe"]["training"].get("lr_scheduler_type", "cosine"))


def test_float32_of_an_optimizer_of_bfloat16_weights_is_kept(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ("dtype=bfloat16", "training.optim=adafactor")
    interrupt(shop, monkeypatch, 4, *changes, recipe="pretrained")
    resumed = content(train(shop, "pretrained", *changes, resume=True))
    assert resumed == content(train(shop, "pretrained", *changes, name="whole"))


def test_a_changed_data_set_is_refused(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(shop, monkeypatch, 4, "base=adapters/random")
    import genrec

    data = genrec.Dataset.load(shop / "data" / "tiny")
    seen = bool(data.manifest["exclude_seen"])
    other = genrec.Dataset.load(shop / "data" / "tiny")
    other.manifest["exclude_seen"] = not seen  # What validation counts follows from it.
    with pytest.raises(ConfigError, match=f"made with exclude_seen = {str(seen).lower()}, and this run has"):
        train(shop, "lora", "base=adapters/random", resume=True, data=other)
    items = data.items.with_columns(brand=data.items["title"])
    with pytest.raises(ConfigError, match=r"made with data = \"\w+\", and this run has \"\w+\""):
        train(
            shop, "lora", "base=adapters/random", resume=True,
            data=genrec.Dataset.from_frames(data.interactions, items, data.users, name="tiny"),
        )  # fmt: skip


def test_a_loss_that_is_no_number_leaves_the_newest_good_checkpoint(
    shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Trainer.training_step

    def poisoned(self: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 5:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return steps(self, model, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    with pytest.raises(
        GenrecError, match=r"after 5 steps.*step-00000004 holds the last .*--resume training\.learning_rate=0\.001,"
    ):
        train(shop, "lora")
    there = checkpoints.load(shop / "runs" / "killed" / "step-00000004")
    assert all(bool(value.isfinite().all()) for value in there.weights.values())
    assert checkpoints.newest(shop / "runs" / "killed") == shop / "runs" / "killed" / "step-00000004"
    monkeypatch.setattr(Trainer, "training_step", steps)
    train(shop, "lora", "training.learning_rate=0.001", resume=True)


def test_weights_that_are_no_numbers_are_not_saved(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Trainer.training_step

    def poisoned(self: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        loss = steps(self, model, *arguments, **options)
        if self.state.global_step == 5:  # Step 6 is saved without validation.
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    with pytest.raises(GenrecError, match=r"no finite number any more after 6 steps"):
        train(shop, "lora", "training.gradient_accumulation_steps=1", "validation.steps=4")
    assert checkpoints.newest(shop / "runs" / "killed") == shop / "runs" / "killed" / "step-00000004"


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file, written = checkpoints.save_file, []

    def filling(tensors: Any, path: Path) -> None:
        written.append(path)
        if len(written) > 6:
            raise SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", filling)
        with pytest.raises(StorageError, match="No space left on device") as error:
            train(shop, "lora")
    assert error.value.exit_code == 9
    run = shop / "runs" / "killed"
    assert sorted(path.name for path in run.iterdir()) == ["step-00000002", "tensorboard"]
    assert content(train(shop, "lora", resume=True)) == content(train(shop, "lora", name="whole"))
