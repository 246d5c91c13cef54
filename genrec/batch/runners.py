"""What goes through the shards of a job: this process, or Ray. Both run ``shards.write``, and neither commits."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genrec import errors
from genrec.batch import shards
from genrec.batch.output import Record
from genrec.batch.previous import Previous
from genrec.batch.shards import Loaded
from genrec.batch.users import Survey, Users
from genrec.config import Job
from genrec.errors import AdapterError, ConfigError, GenrecError

if TYPE_CHECKING:
    from genrec.recommender import Recommender

_CHAINED = re.compile(r"^(?:The above exception was|During handling of) .*$", re.MULTILINE)  # Between two tracebacks.


@dataclass(frozen=True, eq=False)
class Work:
    """What any process needs to make any shard; it can be sent to one.

    Attributes:
        job: The job.
        identity: What the lists are decided by, as the process that commits sees it: ``Loaded.identity``.
        users: The input.
        survey: What one pass over it found.
        folder: The output folder.
    """

    job: Job
    identity: dict[str, Any]
    users: Users
    survey: Survey
    folder: Path


def check(job: Job, recommender: Recommender | None) -> None:
    """Refuse what a job's runner cannot do, before anything costly is done.

    Raises:
        ConfigError: Workers of Ray would have to take a recommender that lives here, one GPU by its number, or
            vLLM, which has workers of its own.
    """
    if job.runner == "local":
        return
    if recommender is not None:
        raise ConfigError(
            f'runner is "{job.runner}", whose workers load the adapter themselves, and a recommender was given. Give '
            'the adapter folder in its place, or leave runner at "local".'
        )
    if job.engine == "vllm":
        raise ConfigError(
            f'runner is "{job.runner}", and vLLM has worker processes of its own. Leave runner at "local", and set '
            "vllm.data_parallel_size, or cut the users into one job per machine."
        )
    if job.device.startswith("cuda:"):
        raise ConfigError(
            f'device is "{job.device}", and Ray gives every worker a GPU of its own, which is "cuda" there. Set '
            'device = "cuda".'
        )


def local(work: Work, loaded: Loaded, previous: Previous | None, missing: Sequence[int]) -> Iterator[Record]:
    """Write the shards one after another, in this process."""
    for shard in missing:
        yield shards.write(loaded, work.users, work.survey, shard, work.folder, previous)


def ray(work: Work, loaded: Loaded, previous: Previous | None, missing: Sequence[int]) -> Iterator[Record]:
    """Write the shards with the ``workers`` of the job, as actors of Ray Data; records come as shards are done.

    Every worker has an engine of its own, and reads the input and writes its shards itself: adapter, input and output
    lie where all of them see them under the same paths. Where Ray does not run, it is started on this machine.

    Raises:
        ConfigError: Ray is not installed, or the cluster has too few CPUs or GPUs.
        GenrecError: What a worker raised; or it failed otherwise, or died.
    """
    if find_spec("ray") is None:
        raise ConfigError('runner is "ray", which is not installed. Install it: pip install "genrec[ray]"')
    import ray as cluster
    import ray.data

    workers = min(work.job.workers, len(missing))
    gpus = 1 if work.job.device.startswith("cuda") else 0
    started = not cluster.is_initialized()
    if started:
        _start(workers)
    _check_resources(cluster.cluster_resources(), workers, gpus)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    asked = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
    # A worker that dies takes its shard with it, and is not started again: whatever killed it would do so once more.
    done = asked.map_batches(
        Worker, batch_size=1, compute=ray.data.ActorPoolStrategy(size=workers), fn_constructor_args=(work,),
        num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0,
    )  # fmt: skip
    try:
        for row in done.iter_rows():
            if row["error"]:
                raise getattr(errors, row["error"])(row["told"])
            yield Record(**json.loads(row["told"]))
    except cluster.exceptions.RayError as error:
        raise _told(error) from error
    finally:
        if started:
            cluster.shutdown()


def _told(error: Exception) -> GenrecError:
    """What an error of Ray means for a job."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        # Tracebacks one after the other, each of which ends with what was raised; Ray's wrapper may be the last.
        tracebacks = [part.strip() for part in _CHAINED.split(str(error)) if part.strip()]
        raised = [part.splitlines()[-1].strip()[:300] for part in tracebacks]
        last = next((line for line in reversed(raised) if "UserCodeException" not in line), type(error).__name__)
        return GenrecError(
            f"a worker of Ray failed: {last.rstrip('.')}. The shards that were committed stay; see Ray's logs for the "
            "traceback, and run the same command again once it is mended: it goes on."
        )
    lines = [line.strip()[:300] for line in str(error).splitlines() if line.strip()]
    first = ": ".join([type(error).__name__, *lines[:1]])
    return GenrecError(
        f"Ray lost a worker ({first}). The shards that were committed stay; see Ray's logs for why it died (memory, "
        "often), and run the same command again: it goes on."
    )


def _start(workers: int) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine that is as small as will do."""
    import ray as cluster

    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    if "RAY_ADDRESS" not in os.environ:
        # Tasks beside the actors need a CPU of their own, or all wait for one another.
        options |= {"num_cpus": max(os.cpu_count() or 1, workers + 1), "object_store_memory": 100 * 2**20}
    cluster.init(**options)


def _check_resources(there: dict[str, float], workers: int, gpus: int) -> None:
    if there.get("CPU", 0) < workers + 1:
        raise ConfigError(
            f"workers is {workers}, and Ray's cluster has {there.get('CPU', 0):.0f} CPUs: every worker takes one, and "
            "one must be left. Lower workers, or add machines."
        )
    if gpus * workers > there.get("GPU", 0):
        raise ConfigError(
            f"workers is {workers}, each with a GPU, and Ray's cluster has {there.get('GPU', 0):.0f}. Lower workers, "
            "or add machines."
        )


class Worker:
    """A process of Ray that makes shards: the adapter is loaded once, when it starts."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._loaded: tuple[Loaded, Previous | None] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Write the shards ``batch["shard"]``; of each the record as JSON, or the text of the error and its class.

        The class is one of ``genrec.errors``.
        """
        told, wrong = [], []
        for shard in batch["shard"]:
            try:
                told.append(json.dumps(dataclasses.asdict(self._write(int(shard)))))
                wrong.append("")
            except GenrecError as error:  # As data: Ray would wrap it in a traceback of its own.
                told.append(str(error))
                # The driver may have no name for a class of an engine; it has one for what that is derived from.
                wrong.append(next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__))
        return {"told": told, "error": wrong}

    def _write(self, shard: int) -> Record:
        if self._loaded is None:
            self._loaded = self._load()
        loaded, previous = self._loaded
        return shards.write(loaded, self.work.users, self.work.survey, shard, self.work.folder, previous)

    def _load(self) -> tuple[Loaded, Previous | None]:
        work = self.work
        loaded, path = shards.load(work.job), work.job.previous
        for key, value in work.identity.items():
            if loaded.identity[key] != value:
                raise AdapterError(
                    f"a worker sees another job than the process that started it: {key} is {loaded.identity[key]!r} "
                    f"there and {value!r} here. Put adapter, items and data where every machine reads the same."
                )
        return loaded, None if path is None else Previous(path, work.identity, work.survey.hashes)


RUNNERS: dict[str, Callable[[Work, Loaded, Previous | None, Sequence[int]], Iterator[Record]]] = {
    "local": local,
    "ray": ray,
}
