"""Evaluations and batch jobs with the engine vllm: the lists of `local`, and what is left when it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
from conftest import tiny_data

import genrec
from genrec import base, quickstart, training
from genrec.batch import output

CLOSE = 1e-3  # Scores may differ by as much, and items whose scores are as close may swap places.
VLLM = ["--engine", "vllm", "vllm.max_model_len=128", "vllm.max_num_seqs=64"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a small base whose attention vLLM takes on a CPU, a LoRA adapter on it, and many users."""
    root = tmp_path_factory.mktemp("shop")
    quickstart.init(root)
    data = tiny_data()
    data.save(root / "data" / "tiny")
    base.create(data.items["title"].to_list(), root / "adapters" / "random", vocabulary=300, width=64, context=128)
    (root / "adapters" / "shop.toml").write_text(
        'base = "adapters/random"\ndata = "data/tiny"\nmax_length = 64\nfeatures = 8\n'
        '[[tasks]]\nprompt = "prompts/next_item.jinja"\n[lora]\nr = 4\n'
        "[training]\nnum_train_epochs = 3\nlearning_rate = 1e-2\n"
    )
    (root / "eval" / "tiny.toml").write_text(
        'data = "data/tiny"\nk = [5, 10]\nnum_beams = 24\nbaselines = []\n[adapters]\nshop = "adapters/shop"\n'
        '[vllm]\nmax_model_len = 128\n'
    )  # fmt: skip
    training.train(root / "adapters" / "shop.toml")
    rng = np.random.default_rng(0)
    histories = [[f"i{item}" for item in rng.integers(0, 24, rng.integers(1, 9))] for _ in range(3000)]
    pl.DataFrame({"user_id": [f"user {row}" for row in range(3000)], "history": histories}).write_parquet(
        root / "users.parquet"
    )
    return root


def job(shop: Path, out: str, *more: str) -> list[str]:
    """The command of a job in the workspace."""
    command = [sys.executable, "-m", "genrec.cli", "--quiet", "batch", "adapters/shop", "--users", "users.parquet"]
    return [*command, "--out", out, "-k", "10", "--shard-size", "100", *more]


def run(shop: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=shop, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def rows(folder: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted(folder.glob("part-*.parquet"))])


def check_same_lists(found: pl.DataFrame, expected: pl.DataFrame) -> None:
    """The same users, the same scores by rank, and the same items where no neighbour is as close as rounding."""
    assert found["user_id"].equals(expected["user_id"])
    assert found["rank"].equals(expected["rank"])
    scores, other = (frame["score"].to_numpy() for frame in (expected, found))
    assert np.abs(scores - other).max() <= CLOSE
    near = np.abs(np.diff(scores)) <= 2 * CLOSE
    # The last place may be as close to the first one that is not in the list.
    alone = ~(np.append(near, False) | np.append(False, near)) & (expected["rank"].to_numpy() < 10)
    assert alone.mean() > 0.5
    assert (found["item_id"] == expected["item_id"]).to_numpy()[alone].all()


def wait(what: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """Wait until something is so, while a process runs."""
    while not (found := what()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return found


def committed(folder: Path) -> int:
    manifest = folder / "manifest.jsonl"
    return manifest.read_bytes().count(b"\n") if manifest.exists() else 0


def engine_of(process: subprocess.Popen[str]) -> psutil.Process | None:
    """The process of vLLM's engine below a job."""
    children = psutil.Process(process.pid).children()
    return next((child for child in children if "EngineCore" in child.name() + " ".join(child.cmdline())), None)


def check_none_left(processes: list[psutil.Process]) -> None:
    """All of them end; a process that does not would keep the memory of a GPU."""
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_evaluation_equals_that_of_local(shop: Path) -> None:
    local = genrec.evaluate(shop / "eval" / "tiny.toml")
    found = genrec.evaluate(shop / "eval" / "tiny.toml", assignments=["engine=vllm"])
    same = (found.lists["shop"] == local.lists["shop"]).mean()
    assert same > 0.95  # Items that are as close as rounding may swap places.
    assert found.rows["shop"]["recall@10"]["mean"] == pytest.approx(local.rows["shop"]["recall@10"]["mean"], abs=0.05)
    assert found.protocol["versions"]["vllm"].startswith("0.")
    assert "vllm" not in local.protocol["versions"]


@pytest.fixture(scope="module")
def expected(shop: Path) -> pl.DataFrame:
    run(shop, *job(shop, "local"))
    return rows(shop / "local")


def test_killed_engine_ends_the_job_and_the_next_one_goes_on(shop: Path, expected: pl.DataFrame) -> None:
    out = shop / "killed"
    process = subprocess.Popen(job(shop, "killed", *VLLM), cwd=shop, stderr=subprocess.PIPE, text=True)
    wait(lambda: committed(out), process)
    engine = wait(lambda: engine_of(process), process)
    below = psutil.Process(process.pid).children(recursive=True)
    engine.send_signal(signal.SIGKILL)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 11, told
    (message,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert " died: " in message, told  # The engine, or its worker, whichever is seen first.
    assert "vllm.gpu_memory_utilization" in message  # What to change.
    check_none_left(below)
    before = committed(out)
    assert 1 <= before < 30
    assert not (out / "_SUCCESS").exists()
    run(shop, *job(shop, "killed", *VLLM))
    assert committed(out) == 30
    assert output.verify(out).users == 3000
    check_same_lists(rows(out), expected)


def test_killed_job_leaves_no_engine(shop: Path) -> None:
    process = subprocess.Popen(job(shop, "orphan", *VLLM), cwd=shop, stderr=subprocess.DEVNULL, text=True)
    wait(lambda: committed(shop / "orphan"), process)
    wait(lambda: engine_of(process), process)
    below = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    check_none_left(below)
