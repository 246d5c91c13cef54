from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import polars as pl
import pytest

from genrec.batch import estimate, job_of, load, output, run, run_batch, runners
from genrec.batch.output import Record, open_output
from genrec.batch.previous import Previous
from genrec.batch.runners import RUNNERS, Work, Worker
from genrec.batch.shards import Loaded
from genrec.batch.users import Users
from genrec.engines.batches import OutOfMemory
from genrec.errors import ConfigError
from genrec.recommender import Recommender


def users(folder: Path, n: int = 30, bad: int | None = None) -> Path:
    """A file of users; row ``bad`` names an unknown item."""
    histories = [["nix" if row == bad else f"i{row % 24}"] for row in range(n)]
    pl.DataFrame({"user_id": [f"u{row}" for row in range(n)], "history": histories}).write_parquet(
        folder / "users.parquet"
    )
    return folder / "users.parquet"


def work(workspace: Path, folder: Path, **keys: Any) -> Work:
    job = job_of(
        {
            "adapter": workspace / "adapters" / "lora", "users": users(folder), "out": folder / "out",
            "engine": "dummy", "k": 3, "shard_size": 8, **keys,
        }
    )  # fmt: skip
    source = Users.open(job.users)
    return Work(job, load(job, model=False).identity, source, source.survey(), Path(job.out))


def test_runners_are_those_of_a_job() -> None:
    from typing import get_args, get_type_hints

    from genrec.config import Job

    assert set(RUNNERS) == set(get_args(get_type_hints(Job)["runner"]))


def test_ray_does_not_run_vllm(workspace: Path, tmp_path: Path, vllm: list[Any]) -> None:
    keys: dict[str, Any] = {"users": users(tmp_path), "engine": "vllm", "runner": "ray"}
    with pytest.raises(ConfigError, match=r'runner is "ray", and vLLM has worker processes of its own\. Leave runner'):
        run_batch(workspace / "adapters" / "lora", out=tmp_path / "out", **keys)
    assert not vllm


def test_worker_makes_the_shards_that_a_local_run_makes(workspace: Path, tmp_path: Path) -> None:
    sent = cloudpickle.loads(cloudpickle.dumps(work(workspace, tmp_path)))
    worker = Worker(sent)
    with open_output(sent.folder, {**sent.identity, "input": "x", "rows": 30, "previous": None}, 4) as opened:
        for batch in ([2], [0, 3], [1]):
            done = worker({"shard": batch})
            assert done["error"] == [""] * len(batch)
            for told in done["told"]:
                opened.commit(Record(**json.loads(told)))
        opened.finish()
    whole = run_batch(sent.job.adapter, sent.job.users, tmp_path / "whole", k=3, shard_size=8, engine="dummy")
    assert output.verify(sent.folder).digest == whole.digest


def test_worker_carries_over_from_the_previous_output(workspace: Path, tmp_path: Path) -> None:
    first = work(workspace, tmp_path)
    run(first.job)
    again = work(workspace, tmp_path, previous=tmp_path / "out", out=tmp_path / "again")
    again.folder.mkdir()
    told = Worker(again)({"shard": [1]})["told"]
    assert json.loads(told[0])["carried"] == 8


def test_worker_that_sees_another_adapter_says_so(workspace: Path, tmp_path: Path) -> None:
    sent = work(workspace, tmp_path)
    other = dataclasses.replace(sent, identity={**sent.identity, "adapter_hash": "another"})
    done = Worker(other)({"shard": [0]})
    assert done["error"] == ["AdapterError"]
    assert "adapter_hash is" in done["told"][0]
    assert "'another' here" in done["told"][0]


def test_errors_of_a_worker_are_data(workspace: Path, tmp_path: Path) -> None:
    sent = work(workspace, tmp_path)
    users(tmp_path).unlink()
    done = Worker(sent)({"shard": [0, 1]})
    assert done["error"] == ["DataError", "DataError"]
    assert all("users.parquet" in told for told in done["told"])


def test_error_of_an_engine_comes_back_as_the_nearest_class_that_has_an_exit_code(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Worker, shard: int) -> Record:
        raise OutOfMemory("no room for one sequence")

    monkeypatch.setattr(Worker, "_write", refuse)
    done = Worker(work(workspace, tmp_path))({"shard": [0]})
    assert done == {"told": ["no room for one sequence"], "error": ["DecodingError"]}


def test_worker_that_fails_is_told_from_one_that_died() -> None:
    from ray.exceptions import ActorDiedError, RayTaskError

    traceback = """Traceback (most recent call last):
  File "shards.py", line 7, in write
    raise ValueError("nix")
ValueError: nix

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "map.py", line 9, in apply
ray.exceptions.UserCodeException: UDF failed to process a data block.
"""
    failed = RayTaskError("map", traceback, ValueError("nix"), proctitle="ray::map", pid=1, ip="127.0.0.1")
    told = str(runners._told(failed))
    assert told.startswith("a worker of Ray failed: ValueError: nix. The shards that were committed stay")
    told = str(runners._told(ActorDiedError()))
    assert told.startswith("Ray lost a worker (ActorDiedError: The actor died unexpectedly")
    assert "The shards that were committed stay" in told


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"device": "cuda:1"}, r'device is "cuda:1", and Ray gives every worker a GPU of its own.* device = "cuda"\.'),
        (
            {"recommender": True},
            r'runner is "ray", whose workers load the adapter.* a recommender was given\. Give the',
        ),
    ],
)
def test_what_ray_cannot_do_is_refused_at_once(
    workspace: Path, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    adapter: Any = workspace / "adapters" / "lora"
    if keys.pop("recommender", False):
        adapter = Recommender.load(adapter, engine="dummy")
    with pytest.raises(ConfigError, match=message):
        run_batch(adapter, users(tmp_path), tmp_path / "out", runner="ray", workers=2, **keys)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match='device is "cuda:1", and Ray'):
        estimate(work(workspace, tmp_path, runner="ray", device="cuda:1").job)
    runners.check(work(workspace, tmp_path, device="cuda:1").job, None)
    runners.check(work(workspace, tmp_path, runner="ray", device="cuda").job, None)


def test_ray_that_is_not_installed_is_named(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'not installed. Install it: pip install "genrec\[ray\]"'):
        run(work(workspace, tmp_path, runner="ray").job)
    assert not list((tmp_path / "out").glob("part-*"))


def test_workers_are_given_absolute_paths(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = work(workspace, tmp_path, runner="ray", workers=2).job
    monkeypatch.chdir(tmp_path)

    def elsewhere(work: Work, loaded: Loaded, previous: Previous | None, missing: Sequence[int]) -> Iterator[Record]:
        monkeypatch.chdir(workspace)
        worker = Worker(cloudpickle.loads(cloudpickle.dumps(work)))
        for told in worker({"shard": missing})["told"]:
            yield Record(**json.loads(told))

    monkeypatch.setitem(RUNNERS, "ray", elsewhere)
    done = run(dataclasses.replace(job, users="users.parquet", out="out"))
    assert done.out == str(tmp_path / "out")
    assert output.verify(tmp_path / "out").digest == done.digest


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"CPU": 4.0}, "workers is 4, and Ray's cluster has 4 CPUs"),
        ({"CPU": 64.0, "GPU": 3.0}, "workers is 4, each with a GPU, and Ray's cluster has 3"),
    ],
)
def test_cluster_that_is_too_small_is_refused_before_it_waits_for_ever(there: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        runners._check_resources(there, 4, 1)
    runners._check_resources({"CPU": 5.0}, 4, 0)
    runners._check_resources({"CPU": 5.0, "GPU": 4.0}, 4, 1)


# A cluster in a process of its own: Ray opens sockets, warns, and takes over signals. One start serves all checks.
CLUSTER = """
import json, os, sys
import ray
from genrec.batch import job_of, output, run, runners

job = json.loads(sys.argv[1])
runners._start(2)
report = {"digest": run(job_of(job)).digest}

class Mortal(runners.Worker):
    def _write(self, shard):
        if shard == 2:
            os._exit(1)
        return super()._write(shard)

def attempt(**keys):
    try:
        return run(job_of({**job, **keys})).digest
    except GenrecError as error:
        return [type(error).__name__, str(error)]

class Wrong(runners.Worker):
    def _write(self, shard):
        if shard == 2:
            raise ValueError("nix")
        return super()._write(shard)

whole, runners.Worker = runners.Worker, Wrong
report["failed"] = attempt(out=job["out"] + "-died")
runners.Worker = Mortal
report["died"] = attempt(out=job["out"] + "-died")
runners.Worker = whole
report["after"] = attempt(out=job["out"] + "-died")
report["bad"] = attempt(out=job["out"] + "-bad", users=job["users"] + ".gone")
print(json.dumps(report))
ray.shutdown()
"""


@pytest.mark.slow  # Ray takes half a minute to start two workers and stop.
def test_two_workers_give_the_same_output(workspace: Path, tmp_path: Path) -> None:
    sent = work(workspace, tmp_path, runner="ray", workers=2)
    job = {key: value for key, value in dataclasses.asdict(sent.job).items() if value is not None}
    whole = run_batch(sent.job.adapter, sent.job.users, tmp_path / "whole", k=3, shard_size=8, engine="dummy")
    # Ray's sockets take a short path.
    environment = {**os.environ, "RAY_TMPDIR": "/tmp", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, json.dumps(job)],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["digest"] == whole.digest
    assert output.verify(tmp_path / "out").users == 30
    name, told = report["failed"]
    assert name == "GenrecError"
    assert told.startswith("a worker of Ray failed: ValueError: nix. The shards")
    name, told = report["died"]
    assert name == "GenrecError"
    assert "Ray lost a worker" in told
    assert report["after"] == whole.digest
    assert output.verify(tmp_path / "out-died").digest == whole.digest
    assert report["bad"][0] == "ConfigError"
    shutil.rmtree(tmp_path / "out")
