"""Training in two processes: gloo on the CPU stands for several GPUs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import content

from genrec import checkpoints, training

CHANGES = ["training.use_cpu=true", "training.logging_steps=1", "validation.users=7", "base=adapters/random"]
# A factor of all gradients hardly shows under Adam and clipping; under plain descent it does.
PLAIN = ["training.optim=sgd", "training.max_grad_norm=0", "training.learning_rate=0.5", "training.warmup_steps=0"]
# 80 rows: of the last step of 12, one process gets two batches of 3 rows, the other one of 2 rows and one of none.
TWO = ["training.per_device_train_batch_size=3", "training.gradient_accumulation_steps=2"]
INTERRUPTED = """
import sys
from genrec import training, watch
recipe, *changes = sys.argv[1:]
save = watch.Watch.save

def stopping(self, step):
    save(self, step)
    if step == 3:
        raise KeyboardInterrupt

training.train(recipe, assignments=changes, name="whole")
watch.Watch.save = stopping
try:
    training.train(recipe, assignments=changes, name="resumed")
except KeyboardInterrupt:
    watch.Watch.save = save
training.train(recipe, assignments=changes, name="resumed", resume=True)
"""


@pytest.fixture
def shop(workspace: Path, tmp_path: Path) -> Path:
    shutil.copytree(workspace, tmp_path / "shop")
    shutil.copy(tmp_path / "shop" / "adapters" / "lora.toml", tmp_path / "shop" / "adapters" / "two.toml")
    return tmp_path / "shop"


def launch(root: Path, *command: str) -> tuple[str, str]:
    """What two processes say on standard output and error."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *launcher, *command],
        capture_output=True, text=True, timeout=120, check=False, cwd=root,
        env={**os.environ, "PYTHONPATH": str(Path(training.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def test_two_processes_train_as_one_does_and_speak_with_one_voice(shop: Path) -> None:
    out, err = launch(shop, "-m", "genrec.cli", "train", "adapters/two.toml", *CHANGES, *PLAIN, *TWO)
    assert [line for line in out.splitlines() if line.startswith("adapters/")] == ["adapters/two"]
    assert err.count("80 rows, 7 steps, ") == 1
    assert "Warning" not in err
    recipe, changes = shop / "adapters" / "lora.toml", [*CHANGES, *PLAIN, "training.per_device_train_batch_size=12"]
    alone = training.train(recipe, assignments=changes, name="alone")
    one, two = (json.loads((path / "learning_curve.json").read_text()) for path in (alone, shop / "adapters" / "two"))
    assert len(one["loss"]) == len(two["loss"]) == 7
    for here, there in zip(one["loss"], two["loss"], strict=True):
        assert here["loss"] == pytest.approx(there["loss"], abs=1e-4)
        assert here["tasks"] == pytest.approx(there["tasks"], abs=1e-4)
    for here, there in zip(one["validation"], two["validation"], strict=True):
        assert here["ndcg@10"] == pytest.approx(there["ndcg@10"], abs=1e-4)
    assert [path.name for path in (shop / "runs" / "two").iterdir()] == ["tensorboard"]
    assert len(list((shop / "runs" / "two" / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_two_processes_go_on_each_with_its_own_random_numbers(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(INTERRUPTED)
    changes = [*CHANGES, *TWO, "dropout=0.2", "training.save_steps=3"]
    launch(shop, str(tmp_path / "script.py"), str(shop / "adapters" / "lora.toml"), *changes)
    assert content(shop / "adapters" / "resumed") == content(shop / "adapters" / "whole")
    assert checkpoints.newest(shop / "runs" / "resumed") is None
