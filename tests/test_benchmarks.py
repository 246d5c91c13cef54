from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import transformers as hf
from conftest import tiny_data
from typer.testing import CliRunner

from genrec import base, checkpoints, watch
from genrec import benchmarks as common
from genrec.adapter import Adapter
from genrec.benchmarks import accuracy as accuracy_benchmark
from genrec.benchmarks import batch as batch_benchmark
from genrec.benchmarks import decode as benchmarks
from genrec.benchmarks import materials, peers, timed
from genrec.benchmarks import prompts as prompt_benchmark
from genrec.benchmarks import rows as row_shapes
from genrec.benchmarks import startup as startup_benchmark
from genrec.benchmarks import train as train_benchmark
from genrec.benchmarks import trie as trie_benchmark
from genrec.cli import app
from genrec.dataset import Dataset
from genrec.decoding import Beams, Trie
from genrec.engines.local import LocalEngine
from genrec.errors import AdapterError, ConfigError, GenrecError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    return str(base.create(["a film", "another film"], folder, vocabulary=300, width=16, context=512))


def model(layers: int = 2, tied: bool = True) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).eval()


@pytest.mark.slow
def test_every_part_runs_and_is_written(tiny: str, tmp_path: Path) -> None:
    options = ["--quick", "--users", "2", "--repeats", "1", "--threads", "1", "--json", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["bench", "decode", "--model", tiny, *options], catch_exceptions=False)
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert {row["part"] for row in report["rows"]} == set(benchmarks.PARTS)
    assert report["conditions"]["threads"] == 1
    assert report["conditions"]["versions"]["torch"] == metadata.version("torch")
    assert {"quick", "load", "parts", "data"} <= set(report["conditions"])
    assert all(row["met"] is None for row in report["rows"] if row["unit"])  # A quick run has no goals of time.
    assert all(
        row["n"] == "1" for row in report["rows"] if row["what"] == "engine, per user" and row["part"] == "floor"
    )
    # Times mean nothing here; what both sides of a comparison answer does.
    same = [row for row in report["rows"] if "places" in row["what"] or "difference of scores" in row["what"]]
    assert len(same) == 10
    assert all(row["met"] for row in same)
    assert json.loads((tmp_path / "out" / "decode.json").read_text()) == report
    assert (tmp_path / "out" / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_one_part_as_a_table(tiny: str) -> None:
    options = ["--quick", "--users", "1", "--repeats", "1", "--part", "floor"]
    done = CliRunner().invoke(app, ["bench", "decode", "--model", tiny, *options], catch_exceptions=False)
    assert "reached / floor" in done.stdout
    assert "atomic" not in done.stdout


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match=r"no part 'flor'. Did you mean 'floor'\?"):
        benchmarks.decode(parts=["flor"])
    with pytest.raises(ConfigError, match="users is 0; it is at least 1"):
        benchmarks.decode(users=0)
    with pytest.raises(ConfigError, match="threads is 0; it is at least 1"):
        benchmarks.decode(threads=0)
    with pytest.raises(ConfigError, match="device is 'foo'"):
        benchmarks.decode(device="foo")
    with pytest.raises(ConfigError, match="give both"):
        benchmarks.decode(tokens=7)
    with pytest.raises(AdapterError, match="no folder"):
        benchmarks.decode("adapters/none", parts=["floor"])


def test_calls_are_taken_in_turn() -> None:
    order: list[str] = []
    seconds = common.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4
    assert [len(taken) for taken in seconds.values()] == [3, 3]  # The first round is not counted.


def test_slow_calls_are_not_repeated_beyond_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setitem(common.CLOCKS, "wall", lambda: now[0])

    def slow() -> None:
        now[0] += 50

    assert common.interleaved({"slow": slow}, 9) == {"slow": [50, 50]}


def test_random_model_has_the_sizes_of_smollm2() -> None:
    with torch.device("meta"):
        made = materials.load_model("random-135m", device="meta")
    assert sum(parameter.numel() for parameter in made.parameters()) == 134_515_008


def test_catalogue_is_distinct() -> None:
    table = common.catalogue(60, 2, 8, 100)
    assert len(np.unique(table, axis=0)) == 60
    assert table[:, 0].min() >= 100
    assert table[:, 1].min() >= 108
    assert table.max() < 116
    with pytest.raises(ConfigError, match="65 items need more than 2 levels of 8 codes"):
        common.catalogue(65, 2, 8, 100)


@pytest.mark.parametrize("tied", [True, False])
def test_floor_in_closed_form(tied: bool) -> None:
    made = model(tied=tied)
    body = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32)
    assert benchmarks.operations(made) == (body, 40 * 16)
    table = common.catalogue(30, 3, 5, 3)
    first, second = len(np.unique(table[:, :1], axis=0)), len(np.unique(table[:, :2], axis=0))
    fed = min(4, first) + min(4, second)
    expected = 1 + fed * (body + 640) / (10 * body + 640)
    assert benchmarks.floor(made, 10, Trie.build(table), 4) == pytest.approx(expected)
    assert benchmarks.floor(made, 10, Trie.build(np.arange(9)[:, None]), 4) == 1


def test_floor_of_the_settings() -> None:
    """What the figures are held against: SmolLM2-135M, 12,000 items of 4 codes."""
    with torch.device("meta"):
        made = materials.load_model("random-135m", device="meta")
    trie = Trie.build(common.catalogue(12_000, 4, 256, 0))
    floors = [benchmarks.floor(made, length, trie, beams) for length, beams in benchmarks.SETTINGS]
    assert floors == pytest.approx([1.75, 1.95], abs=0.02)


def test_both_peers_answer_like_the_engine() -> None:
    made, table = model(), common.catalogue(80, 3, 6, 3)
    trie, rng = Trie.build(table), np.random.default_rng(0)
    prompts = [rng.integers(3, 40, size=7) for _ in range(3)]
    found = LocalEngine(made).beam_search(prompts, trie, 6)
    mask = hf.LogitsProcessorList([peers.TrieMask(trie, 7)])
    masked = peers.generate(made, prompts, table, 6, logits_processor=mask)
    after = peers.prefix_function(table, 7)
    function = peers.generate(made, prompts, table, 6, prefix_allowed_tokens_fn=after)
    for peer in (masked, function):
        assert peers.disagreement(found, peer, 1e-4)[0] == 0
        np.testing.assert_allclose(found.scores, peer.scores, atol=1e-4)


def test_disagreement_forgives_ties_only() -> None:
    one = Beams(np.array([[1, 2, 3]], dtype=np.int32), np.array([[-1.0, -1.00001, -3.0]], dtype=np.float32), [None])
    swapped = Beams(np.array([[2, 1, 3]], dtype=np.int32), one.scores[:, [0, 1, 2]], [None])
    other = Beams(np.array([[1, 2, 4]], dtype=np.int32), np.array([[-1.0, -1.0, -2.5]], dtype=np.float32), [None])
    assert peers.disagreement(one, swapped, 1e-3) == (0, 0.0)
    assert peers.disagreement(one, other, 1e-3) == (1, pytest.approx(0.5))


def test_trie_benchmark_runs_and_is_written(tmp_path: Path) -> None:
    options = ["--items", "3000", "--users", "2", "--repeats", "1", "--json", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["bench", "trie", *options], catch_exceptions=False)
    report = json.loads(done.stdout)
    assert {row["part"] for row in report["rows"]} == {"build", "size", "children", "file", "mask"}
    assert json.loads((tmp_path / "out" / "trie.json").read_text()) == report
    assert (tmp_path / "out" / "trie.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="--items is 0"):
        trie_benchmark.trie(0)


# Training


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> train_benchmark._Setup:
    log = materials.random_log(12, 30, 4, 20)
    size = train_benchmark.Size("tiny", width=16, layers=1, max_length=24, batch=4, steps=2)
    return train_benchmark._setup(size, log, tmp_path_factory.mktemp("train"))


def test_training_is_measured_and_both_sides_compute_the_same(tmp_path: Path) -> None:
    options = ["--quick", "--model", "", "--repeats", "1", "--json", "--out", str(tmp_path)]
    parts = [option for part in ("step", "rows") for option in ("--part", part)]
    done = CliRunner().invoke(app, ["bench", "train", *options, *parts], catch_exceptions=False)
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert [row["part"] for row in report["rows"]] == sorted(
        (row["part"] for row in report["rows"]), key=train_benchmark.PARTS.index
    )
    assert {row["part"] for row in report["rows"]} == {"step", "rows"}
    # The trainer, TRL's loss, two plain loops and two kinds of identifier rows: the same losses, step for step.
    same = [row for row in report["rows"] if "difference of the losses" in row["what"]]
    assert len(same) == 3
    assert all(row["met"] for row in same)
    assert all(row["met"] is None for row in report["rows"] if row["unit"])
    assert json.loads((tmp_path / "train.json").read_text()) == report


def test_items_padding_and_accuracy_are_measured() -> None:
    parts = ["accuracy", "padding", "items"]
    report = train_benchmark.train("", parts=parts, repeats=1, minutes=0.005, quick=True)
    assert list(dict.fromkeys(row.part for row in report.rows)) == ["items", "padding", "accuracy"]
    found = {row.what: row for row in report.rows}
    assert found["relative difference of the losses"].met
    assert found["padding in the trainer's order"].value < found["padding in a random order"].value
    assert found["the same, per token of a batch"].value > 1


def test_training_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match=r"no part 'stp'. Did you mean 'step'\?"):
        train_benchmark.train(parts=["stp"])
    for wrong in ({"repeats": 0}, {"threads": 0}, {"minutes": 0.0}):
        with pytest.raises(ConfigError, match=r"at least 1|above 0"):
            train_benchmark.train("", **wrong)  # type: ignore[arg-type]


def test_a_row_per_target_trains_the_same_items_one_by_one(small: train_benchmark._Setup) -> None:
    made = small.whole()
    whole, single = small.rows(made), small.rows(type(made)(row_shapes.per_target(made, small), []))
    targets = [whole.row(number).labels for number in range(len(whole))]
    labels = [single.row(number).labels for number in range(len(single))]
    assert [int(row[row >= 0][0]) for row in labels] == [int(label) for row in targets for label in row[row >= 0]]
    assert all((row >= 0).sum() == 1 and row[-1] >= 0 for row in labels)  # Atomic: one token, the last of its row.
    # With the longest history that fits: all of it, or so much that one event more would not fit.
    head = len(small.tokenization.head_ids(small.prompts[0]))
    for number, (_, _, _, _, start, stop, _) in enumerate(single.plan.table.tolist()):
        assert len(single.row(number).ids) == head + stop - start <= 24
        assert start == 0 or head + stop - start == 24


def test_batches_by_budget_hold_rows_of_one_length_and_no_row_twice() -> None:
    lengths = np.random.default_rng(1).integers(3, 40, size=200)
    batches = row_shapes.by_budget(lengths, 100, 10_000)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert all(len(batch) * lengths[batch].max() <= 100 for batch in batches)
    assert row_shapes.padding(np.concatenate([lengths[batch] for batch in batches]), 1) == 0
    assert [len(batch) for batch in row_shapes.by_budget(np.array([200, 300]), 100, 9)] == [1, 1]


def test_padding_in_closed_form() -> None:
    assert row_shapes.padding(np.array([2, 4, 1, 1, 6]), 2) == pytest.approx(1 - 14 / (8 + 2 + 6))


def test_packs_hold_every_row_once_and_no_more_than_their_room() -> None:
    lengths = np.array([5, 9, 3, 3, 1, 10])
    packs = row_shapes.packed(lengths, 10)
    assert packs == [[5], [1, 4], [0, 2], [3]]


def test_a_pack_has_the_loss_and_gradient_of_its_rows(small: train_benchmark._Setup) -> None:
    rows = small.rows(small.whole())
    lengths = [len(rows.row(number).ids) for number in range(6)]
    packs = row_shapes.packed(np.array(lengths), 48)
    assert len(packs) < 6
    gradients = []
    for batch in (
        [train_benchmark._tensors(rows, range(6), small.pad)],
        [row_shapes.pack(rows, packs, small.pad)],
    ):
        small.model.zero_grad()
        loss = train_benchmark.knowing_loss(small.model, batch[0])
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in small.model.parameters() if p.grad is not None)])
    small.model.zero_grad()
    assert len(gradients[0]) > 5
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_both_plain_losses_are_one(small: train_benchmark._Setup) -> None:
    batch = train_benchmark._tensors(small.rows(small.whole()), range(4), small.pad)
    plain, knowing = train_benchmark.plain_loss(small.model, batch), train_benchmark.knowing_loss(small.model, batch)
    torch.testing.assert_close(plain, knowing)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    assert timed.rate_at(0.0) == 0.01
    assert timed.rate_at(0.025) == pytest.approx(0.5)
    assert timed.rate_at(0.05) == pytest.approx(1.0)
    assert timed.rate_at(0.525) == pytest.approx(0.5)
    assert timed.rate_at(1.0) == pytest.approx(0.0)
    assert timed.rate_at(1.3) == pytest.approx(0.0)


def test_time_is_over_when_it_is_over_and_validation_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setitem(common.CLOCKS, "wall", lambda: now[0])

    def evaluate() -> dict[str, float]:
        now[0] += 100
        return {"ndcg@10": now[0]}

    watch, control = timed.Timed(10.0, evaluate, "wall"), hf.TrainerControl()
    watch.on_train_begin(None, None, control)
    stops = []
    for step in range(1, 5):
        now[0] += 3
        watch.on_step_end(None, hf.TrainerState(global_step=step), control)
        stops.append(control.should_training_stop)
    assert stops == [False, False, False, True]
    assert watch.found == [106.0, 212.0]  # After 6 and 12 seconds of training.


def test_padding_is_measured_with_questions_of_every_kind(tmp_path: Path) -> None:
    log = materials.random_log(40, 30, 4, 30)
    rated = log.interactions.with_columns(rating=(pl.int_range(pl.len()) % 5 + 1).cast(pl.Float32))
    size = train_benchmark.Size("tiny", width=16, layers=1, max_length=64, batch=4, steps=2)
    asked = []
    for number, interactions in enumerate((log.interactions, rated)):
        data = Dataset.from_frames(interactions, log.items, name="some")
        setup = train_benchmark._setup(size, data, tmp_path / str(number), questions=True)
        asked.append([prompt.name for prompt in setup.prompts])
        found = {row.what: row for row in train_benchmark._padding(setup, 1, "wall", 3)}
        assert found["relative difference of the losses"].met
        assert found["padding in the trainer's order"].goal
        assert all(name in found["padding in the trainer's order"].setting for name in asked[-1])
    assert asked[0] == ["next_item", "title_to_item", "item_to_title", "titles_to_item"]
    assert asked[1] == [*asked[0], "click"]


def test_all_sides_of_a_lora_step_train_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = materials.random_log(24, 30, 4, 20)
    size = train_benchmark.Size("tiny", width=16, layers=1, max_length=24, batch=2, steps=2)
    setup = train_benchmark._setup(size, log, tmp_path, "lora")
    built = []
    own = train_benchmark.with_own_rows
    monkeypatch.setattr(train_benchmark, "with_own_rows", lambda setup: built.append(own(setup)) or built[-1])
    monkeypatch.setattr(train_benchmark, "with_peft_rows", None)  # Of the part `rows` alone.
    rows = train_benchmark._step(setup, 1, "wall")
    assert len(built) == 4
    names = [[name for name, value in one.named_parameters() if value.requires_grad] for one in built]
    assert names == [names[0]] * 4
    assert next(row for row in rows if "difference of the losses" in row.what).met


# Accuracy


TINY = ["--width", "16", "--layers", "1", "--heads", "2"]
FEW = ["training.max_steps=6", "training.learning_rate=1e-2", "validation.users=20"]


@pytest.fixture
def shop(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(workspace, tmp_path / "shop")
    monkeypatch.chdir(tmp_path / "shop")
    return tmp_path / "shop"


def bench_accuracy(*options: str) -> dict[str, Any]:
    command = ["bench", "accuracy", "data/tiny", "--recipe", "adapters/pretrained.toml", *TINY, "--json"]
    done = CliRunner().invoke(app, [*command, *FEW, *options], catch_exceptions=False)
    assert done.exit_code == 0
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def figures(report: dict[str, Any], setting: str) -> dict[str, float]:
    return {row["what"]: row["value"] for row in report["rows"] if row["setting"] == setting}


def test_accuracy_is_that_of_the_adapters_that_it_leaves(shop: Path) -> None:
    report = bench_accuracy("--seeds", "2", "dropout=0.1", "--out", "out")
    assert json.loads((shop / "out" / "accuracy-tiny.json").read_text()) == report
    assert (shop / "out" / "accuracy-tiny.png").read_bytes().startswith(b"\x89PNG")
    told = report["conditions"]
    assert told["data_hash"] == Dataset.load(shop / "data" / "tiny").hash
    assert (told["base"], told["seeds"]) == ("16x1x2", [0, 1])
    assert told["changes"] == " ".join([*FEW, "dropout=0.1"])
    made = sorted(path for path in (shop / "adapters").glob("bench-*") if not path.name.endswith("-base"))
    assert [path.name.rpartition("-")[2] for path in made] == ["0", "1"]
    names = {"validation NDCG@10": "ndcg@10", "step that was kept": "step"}
    for seed, folder in enumerate(made):
        manifest, found = Adapter.load(folder).manifest, figures(report, f"seed {seed}")
        assert {what: found[what] for what in names} == {what: manifest["kept"][key] for what, key in names.items()}
        assert manifest["recipe"]["dropout"] == 0.1
        assert Adapter.load(folder).data_folder == shop / "data" / "tiny"
        assert manifest["recipe"]["seed"] == seed
        # As `genrec eval` finds them.
        spec = ["eval", "eval/tiny.toml", "k=[10]", "baselines=[]", f'adapters={{one="adapters/{folder.name}"}}']
        done = CliRunner().invoke(app, [*spec, "--json"], catch_exceptions=False)
        row = json.loads(done.stdout)["rows"]["one"]
        assert found["test recall@10"] == row["recall@10"]["mean"]
        assert found["test NDCG@10"] == row["ndcg@10"]["mean"]
    mean, each = figures(report, "mean of 2 seeds"), [figures(report, f"seed {seed}") for seed in range(2)]
    assert set(mean) == set(each[0]) - {"step that was kept"}
    for what, value in mean.items():
        assert value == pytest.approx((each[0][what] + each[1][what]) / 2)


def test_accuracy_is_made_anew_and_the_same(shop: Path) -> None:
    first = figures(bench_accuracy(), "seed 0")
    made = {path.name for path in (shop / "adapters").glob("bench-*")}
    again = figures(bench_accuracy(), "seed 0")
    assert {path.name for path in (shop / "adapters").glob("bench-*")} == made
    del first["from the data set to the test figures"], again["from the data set to the test figures"]
    assert again == first


def test_accuracy_of_a_base_that_is_named(shop: Path) -> None:
    report = bench_accuracy("tuning=lora", "--base", "adapters/pretrained")
    (made,) = (shop / "adapters").glob("bench-*")
    assert Adapter.load(made).manifest["base"]["name"] == "adapters/pretrained"
    assert report["conditions"]["base"] == "adapters/pretrained"


@pytest.mark.parametrize("key", ["seed", "base", "data"])
def test_accuracy_refuses_what_it_sets_itself(shop: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}= is set by the command itself"):
        accuracy_benchmark.accuracy(Path("data/tiny"), Path("adapters/pretrained.toml"), [f"{key}=3"])


def test_accuracy_refuses_no_seed_and_no_thread() -> None:
    for wrong in ({"seeds": ()}, {"threads": 0}):
        with pytest.raises(ConfigError, match="is 0; it is at least 1"):
            accuracy_benchmark.accuracy(Path("data/tiny"), Path("adapters/x.toml"), **wrong)  # type: ignore[arg-type]


# The script of a GPU


ON_CPU = ["--base", "adapters/random", "--device", "cpu", "features=8", "training.max_steps=4", "validation.steps=2"]


@pytest.fixture
def gpu_shop(shop: Path) -> Path:
    for name in ("adapters/default", "adapters/smollm2", "adapters/smollm2-full", "eval/smollm2"):
        shutil.copy(ROOT / f"{name}.toml", shop / f"{name}.toml")
    return shop


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_accuracy", ROOT / "scripts" / "gpu_accuracy.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["gpu_accuracy"] = made
    spec.loader.exec_module(made)
    return made


def test_stages_go_on_where_they_were_killed(
    gpu_shop: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    alarms: list[int] = []
    monkeypatch.setattr(signal, "alarm", alarms.append)
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command[3:]))
    small = ["--width", "128", "--heads", "4"]
    assert script.stages("data/tiny", "b", "cpu", [])[0].command[-4:] == small  # The sizes of the default recipe.

    def call(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["gpu_accuracy", "data/tiny", *ON_CPU, *options])
        script.main()
        if commands:
            command = commands.pop()
            app([part if part != "128" else "16" for part in command], standalone_mode=False)
        return capfd.readouterr().out

    for stage in ("make a small base", "train the small base"):
        assert f"next: {stage}, " in call()
    kept = watch.Watch.save

    def killed(self: Any, step: int) -> None:
        kept(self, step)
        raise RuntimeError("killed")

    monkeypatch.setattr(watch.Watch, "save", killed)
    with pytest.raises(RuntimeError, match="killed"):
        call()
    monkeypatch.setattr(watch.Watch, "save", kept)
    assert checkpoints.newest(gpu_shop / "runs" / "smollm2") == gpu_shop / "runs" / "smollm2" / "step-00000002"
    capfd.readouterr()
    told = call("--dry-run")
    assert told.count("done: ") == 2
    assert told.count("genrec ") == 3
    assert "next: train adapters/random with LoRA, " in told
    monkeypatch.setattr("genrec.progress.quiet", False)
    assert "left after it: 9 minutes" in call()
    assert Adapter.load(gpu_shop / "adapters" / "smollm2").manifest["tuning"] == "lora"
    assert "train all of adapters/random" in call()
    assert "evaluate, " in call()
    assert alarms == [0, *[script.LIMIT] * 4, 0]
    report = json.loads((gpu_shop / "eval" / "results" / "smollm2.json").read_text())
    assert list(report["rows"])[-3:] == ["small base", "SmolLM2, LoRA", "SmolLM2, all tuned"]
    done = call()
    assert "all stages are done" in done
    assert "| SmolLM2, LoRA |" in done


def test_a_gpu_computes_in_bfloat16(script: ModuleType) -> None:
    commands = [stage.command for stage in script.stages("data/shop", "smollm2", "cuda", ["training.bf16=false"])]
    assert [command.count("training.bf16=true") for command in commands] == [0, 0, 1, 1, 0]
    for command in commands[2:4]:  # What is given by hand comes last and counts.
        assert command.index("training.bf16=true") < command.index("training.bf16=false")
    assert commands[-1][-2:] == ["--device", "cuda"]


@pytest.mark.slow
def test_a_stage_that_is_killed_leaves_no_process_and_goes_on(gpu_shop: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "gpu_accuracy.py"),
        "data/tiny",
        *ON_CPU,
        "training.max_steps=60",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        subprocess.run(command, env=environment, check=True, timeout=120)
    process = subprocess.Popen(command, env=environment)
    while checkpoints.newest(gpu_shop / "runs" / "smollm2") is None:
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    there = checkpoints.newest(gpu_shop / "runs" / "smollm2")
    time.sleep(3)
    assert checkpoints.newest(gpu_shop / "runs" / "smollm2") == there  # Nothing of it runs on.
    done = subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True, text=True)
    assert f"going on from {there}" in done.stderr
    assert (gpu_shop / "adapters" / "smollm2" / "genrec.json").is_file()


# Batch jobs


def test_users_of_a_batch_benchmark_are_a_jobs_input(tmp_path: Path) -> None:
    batch_benchmark.write_users(tmp_path / "users.parquet", ["a", "b", "c"], 70_000)
    users = pl.read_parquet(tmp_path / "users.parquet")
    assert users["user_id"].n_unique() == len(users) == 70_000
    lengths = users["history"].list.len()
    assert (lengths.min(), lengths.max()) == (1, 50)
    assert set(users["history"].explode().unique()) == {"a", "b", "c"}


def test_batch_benchmark_compares_the_job_with_its_engine(workspace: Path, tmp_path: Path) -> None:
    options = ["--users", "40", "--shard-size", "16", "--repeats", "1", "--part", "throughput", "--json"]
    adapter = str(workspace / "adapters" / "lora")
    done = CliRunner().invoke(app, ["bench", "batch", adapter, *options], catch_exceptions=False)
    rows = {row["what"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["job / engine"]["value"] == pytest.approx(rows["whole job"]["value"] / rows["engine alone"]["value"])
    assert rows["job / engine"]["goal"] == ">= 0.95"
    with pytest.raises(ConfigError, match=r"no part 'trougput'\. Did you mean 'throughput'"):
        batch_benchmark.batch(workspace / "adapters" / "lora", parts=["trougput"])
    with pytest.raises(ConfigError, match="is 0; it is at least 1"):
        batch_benchmark.batch(workspace / "adapters" / "lora", users=0)


def test_batch_benchmark_divides_the_memory_of_jobs(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([2.0, 3.0])
    monkeypatch.setattr(batch_benchmark, "_job", lambda _: (1.0, next(peaks)))
    adapter = workspace / "adapters" / "lora"
    assert batch_benchmark.batch(adapter, parts=["memory"], sizes=(5, 9)).rows[-1].value == 1.5


@pytest.mark.slow
def test_batch_benchmark_measures_the_memory_of_jobs(workspace: Path) -> None:
    adapter = workspace / "adapters" / "lora"
    found = batch_benchmark.batch(adapter, parts=["memory"], sizes=(5,), k=3)
    assert [(row.setting, row.what) for row in found.rows] == [
        ("5 users", "peak memory of the process"),
        ("5 users", "whole process, dummy engine"),
    ]
    assert found.rows[0].value > 10


def test_batch_benchmark_tells_why_a_job_failed() -> None:
    with pytest.raises(GenrecError, match=r"genrec batch adapters/none --users ended with [1-9]"):
        batch_benchmark._job(["adapters/none", "--users"])


# Start-up


def test_startup_compares_whole_processes() -> None:
    done = CliRunner().invoke(app, ["bench", "startup", "--repeats", "1", "--json"], catch_exceptions=False)
    rows = {row["what"]: row for row in json.loads(done.stdout)["rows"]}
    ratio = rows["genrec --help"]["value"] / rows["python -c pass"]["value"]
    assert rows["genrec --help / python -c pass"]["value"] == pytest.approx(ratio)
    assert ratio > 1
    assert {row["what"]: row["goal"] for row in rows.values() if row["goal"]} == {
        "import genrec": "<= 0.15",
        "genrec --help": "<= 0.5",
    }


@pytest.mark.parametrize(
    ("adapter", "user", "who", "imports"),
    [("lora", "u1", "--user u1", True), ("pretrained", None, "--history i0", False)],
)
def test_startup_of_an_adapter_stands_beside_what_it_imports(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, adapter: str, user: str | None, who: str, imports: bool
) -> None:
    run: list[str] = []
    monkeypatch.setattr(startup_benchmark, "_process", lambda arguments: run.append(" ".join(arguments)))
    folder = workspace / "adapters" / adapter
    rows = {row.what: row for row in startup_benchmark.startup(folder, user=user, repeats=2).rows}
    assert run[5] == f"-m genrec.cli recommend {folder} {who}"
    assert run == run[:6] * 3  # One round to warm up.
    assert ("peft" in run[4]) is imports
    assert rows["genrec recommend"].goal == "<= 4"
    assert rows["genrec recommend / what it imports"].n == "2/2"


def test_startup_refuses_a_user_of_no_adapter() -> None:
    with pytest.raises(ConfigError, match="--user goes with an adapter"):
        startup_benchmark.startup(user="u1")


def test_startup_tells_why_a_command_failed() -> None:
    with pytest.raises(GenrecError, match=r"recommend adapters/none ended with [1-9]"):
        startup_benchmark._process(["-m", "genrec.cli", "recommend", "adapters/none"])


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_prompts_of_a_data_set_and_of_an_adapter_are_counted(workspace: Path, tmp_path: Path) -> None:
    data, adapter = str(workspace / "data" / "tiny"), str(workspace / "adapters" / "lora")
    options = ["--users", "50", "--processes", "1", "--repeats", "2", "--json"]
    for given, names in (
        ([data], list(prompt_benchmark.PROMPTS)),
        ([data, adapter], ["next_item", "title_to_item", "item_to_title"]),
    ):
        done = CliRunner().invoke(
            app, ["bench", "prompts", *given, *options, "--out", str(tmp_path)], catch_exceptions=False
        )
        assert done.exit_code == 0
        rows = json.loads(done.stdout)["rows"]
        rates = [row for row in rows if row["unit"] == "prompts/s"]
        assert [row["what"] for row in rates] == names
        assert all(row["value"] > 0 and row["n"] == "2" for row in rates)
        assert {row["what"] for row in rates if row["goal"]} == {name for name in names if name.startswith("next_item")}
        assert all(row["value"] >= 1 for row in rows if row["unit"] == "tokens per prompt")
    assert (tmp_path / "prompts.png").read_bytes().startswith(b"\x89PNG")


def test_prompts_of_another_catalogue_are_not_counted(workspace: Path, tmp_path: Path) -> None:
    other = tiny_data(users=5, items=7)
    other.save(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"have other items, .* Name the data set that it was trained on: data/tiny"):
        prompt_benchmark.prompts(tmp_path / "other", workspace / "adapters" / "lora", processes=1)
    with pytest.raises(ConfigError, match="is 0; it is at least 1"):
        prompt_benchmark.prompts(tmp_path / "other", users=0)


def test_of_processes_that_wait_for_each_other_none_waits_for_one_that_failed(workspace: Path) -> None:
    barrier = threading.Barrier(2)
    prompt_benchmark._share(barrier)
    good = prompt_benchmark._Load(workspace / "data" / "tiny", None, 4, 64, 1, "wall")
    with ThreadPoolExecutor(2) as pool:
        waits = pool.submit(prompt_benchmark._together, good)
        fails = pool.submit(prompt_benchmark._together, replace(good, data=workspace / "none"))
        with pytest.raises(GenrecError, match="none"):
            fails.result()
        with pytest.raises(threading.BrokenBarrierError):
            waits.result()


@pytest.mark.slow
def test_processes_measure_together(workspace: Path) -> None:
    report = prompt_benchmark.prompts(workspace / "data" / "tiny", users=20, processes=2, repeats=1)
    assert [row.setting for row in report.rows if row.part == "sequence"] == ["one process"] * 2 + ["2 processes"] * 2
    assert all((row.goal != "") == (row.setting == "2 processes") for row in report.rows if row.part == "sequence")
