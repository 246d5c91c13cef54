"""Recipes (how to train), specs (what to evaluate) and jobs (whom to recommend for): small dataclasses read from TOML.

Loads nothing heavy.

Relative paths in a TOML file are relative to the *workspace*: the folder above the one that the file lies in, so that
``adapters/shop.toml`` says ``data = "data/shop"`` wherever the command is started from.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from genrec.errors import ConfigError
from genrec.toml import check_choices, from_table, override, read_toml

SplitKind = Literal["leave_one_out", "temporal"]
Ties = Literal["file", "shuffled"]
Tuning = Literal["lora", "qlora", "full"]
Dtype = Literal["float32", "bfloat16"]  # of the weights of a model
JOB_PATHS = ("adapter", "users", "out", "data", "items", "previous", "compare")


@dataclass(frozen=True)
class Task:
    """One kind of training row: a prompt file, and how many rows of it there are per row of weight 1."""

    prompt: str
    weight: float = 1.0


@dataclass(frozen=True)
class IdentifierRecipe:
    """How identifiers are made: see ``genrec.identifiers``.

    Attributes:
        scheme: ``atomic``, ``semantic``, ``title`` or ``random``.
        levels, codes: Of ``semantic`` and ``random``.
        file: Identifiers that ``genrec ids build`` wrote; the other keys are not read then.
    """

    scheme: str = "atomic"
    levels: int = 3
    codes: int = 256
    file: str = ""


@dataclass(frozen=True)
class WalkRecipe:
    """Walks over textual neighbours, mixed into the rows of every sequence prompt.

    Attributes:
        share: Walks per training user and epoch, after the opening.
        alone: The share of all epochs, at the beginning, that trains on walks alone (as many as users per epoch).
        length: Items per walk.
        neighbours: How many nearest items a step may choose from.
        mean_rank: Scale of the exponential distribution that draws the rank of the chosen neighbour.
        variants: Histories per training user and epoch, after the opening, that are told again with near items in the
            place of some.
        replaced: The chance of each item of a variant to be replaced by a neighbour, drawn as for a walk.
        newcomers: How often per epoch, after the opening, each item that no training history holds is told as what came
            next in somebody's history, right after a neighbour.

    Rows of variants and newcomers are told like walks: without the user's columns and the context of an event.
    """

    share: float = 0.0
    alone: float = 0.0
    length: int = 5
    neighbours: int = 10
    mean_rank: float = 2.0
    variants: float = 0.0
    replaced: float = 0.3
    newcomers: float = 0.0

    @property
    def used(self) -> bool:
        """Whether training has any row that needs neighbours."""
        return self.share > 0 or self.alone > 0 or self.variants > 0 or self.newcomers > 0


@dataclass(frozen=True)
class Validation:
    """What decides which weights are kept: NDCG@10 on validation cases by constrained decoding.

    Attributes:
        per_epoch: Evaluations per epoch (a fraction: 0.5 is every second epoch).
        steps: Steps between two evaluations, in the place of ``per_epoch`` (0: that one counts).
        users: Validation cases used, at most (0: all), drawn by the seed.
        patience: Evaluations without a better value before training stops (0: never).
    """

    per_epoch: float = 1.0
    steps: int = 0
    users: int = 1000
    patience: int = 0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what training produces.

    Attributes:
        base: A folder (an ordinary checkpoint, or the product of a ``full`` recipe, whose tokenizer, identifiers and
            rows are then inherited) or the name of a Hugging Face model.
        data: A data set folder.
        tasks: The prompts to train on, with their weights. The first sequence prompt is the one recommended with.
        tuning: ``lora`` trains LoRA matrices and the identifier rows, ``qlora`` does so beside a base that is held in 4
            bits; ``full`` trains everything.
        split, ties, split_seed: See ``Dataset.split``. Only its training part is read.
        max_length: Tokens of a row, at most. Histories are cut to it by whole items.
        dropout: On embeddings, attention weights and the output of every attention and MLP block, in training only.
        rows: What new identifier rows start from: the items' ``features`` or ``random`` numbers.
        features: Dimensions of the text vectors, and as many again of the collaborative ones.
        dtype: Of the weights that are loaded: ``float32`` or ``bfloat16``.
        rows_learning_rate: Of the identifier rows; unset: that of everything else.
        loss: Which events of a sequence prompt's row are targets: ``every`` one, or the last one alone, its ``answer``;
            of a history that is an event drawn anew for every epoch, after those before it.
        negatives: Tokens, drawn anew at every step, that the softmax of training is over beside the target; 0: all.
        batch_events: About how many events of histories a step trains on, on every device: long histories then come in
            batches of fewer rows than short ones, and the same recipe does for both. 0: [training] says how many rows.
        seed: Of everything that is drawn but the split.
        training: Keys of TRL's ``SFTConfig`` (learning_rate, num_train_epochs, ...) out of ``options.TRAINING_KEYS``.
        lora: Keys of PEFT's ``LoraConfig`` (r, lora_alpha, target_modules, ...), passed through.
    """

    base: str
    data: str
    tasks: tuple[Task, ...]
    tuning: Tuning = "lora"
    split: SplitKind = "leave_one_out"
    ties: Ties = "file"
    split_seed: int = 0
    max_length: int = 256
    dropout: float = 0.0
    rows: Literal["features", "random"] = "features"
    features: int = 64
    dtype: Dtype = "float32"
    rows_learning_rate: float | None = None
    loss: Literal["every", "answer"] = "every"
    negatives: int = 0
    batch_events: int = 0
    seed: int = 0
    identifiers: IdentifierRecipe | None = None
    walks: WalkRecipe = WalkRecipe()
    validation: Validation = Validation()
    training: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choices(self, "recipe")
        if not self.tasks:
            raise ConfigError('recipe: tasks is empty. Add one: [[tasks]] prompt = "prompts/next_item.jinja"')
        if any(task.weight < 0 for task in self.tasks) or not any(task.weight > 0 for task in self.tasks):
            weights = [task.weight for task in self.tasks]
            raise ConfigError(f"recipe: tasks.weight is {weights}. Weights are at least 0, and one is above 0.")
        if self.max_length < 2:
            raise ConfigError(f"recipe: max_length is {self.max_length}. It counts tokens and is at least 2.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"recipe: dropout is {self.dropout}. It is at least 0 and below 1.")
        if self.lora and self.tuning == "full":
            raise ConfigError('recipe: tuning = "full" trains no LoRA. Remove [lora], or set tuning = "lora".')
        if self.rows_learning_rate is not None:
            if self.tuning == "full":
                raise ConfigError('recipe: rows_learning_rate is that of identifier rows, and tuning = "full" trains '
                                  'the whole embedding alike. Remove it, or set tuning = "lora".')  # fmt: skip
            if not 0 <= self.rows_learning_rate < math.inf:
                raise ConfigError(f"recipe: rows_learning_rate is {self.rows_learning_rate}. It is at least 0.")
        if self.negatives < 0 or self.negatives in range(1, 8):
            raise ConfigError(f"recipe: negatives is {self.negatives}. It is 0 (the whole vocabulary) or at least 8, "
                              "such as 2048.")  # fmt: skip
        if self.batch_events < 0:
            raise ConfigError(f"recipe: batch_events is {self.batch_events}. It is at least 0.")
        if self.batch_events and "per_device_train_batch_size" in self.training:
            raise ConfigError(f"recipe: batch_events is {self.batch_events}, and training.per_device_train_batch_size "
                              "says how large a batch is too. Remove one of the two.")  # fmt: skip
        if self.negatives and self.training.get("label_smoothing_factor"):
            raise ConfigError("recipe: training.label_smoothing_factor spreads over the whole vocabulary, and "
                              f"negatives is {self.negatives}, a part of it. Set one of the two to 0.")  # fmt: skip
        if self.walks.share < 0 or not 0 <= self.walks.alone < 1:
            raise ConfigError(f"recipe: walks.share is {self.walks.share} (at least 0), walks.alone "
                              f"{self.walks.alone} (at least 0, below 1).")  # fmt: skip
        if self.walks.variants < 0 or not 0 <= self.walks.replaced <= 1:
            raise ConfigError(f"recipe: walks.variants is {self.walks.variants} (at least 0), walks.replaced "
                              f"{self.walks.replaced} (from 0 to 1).")  # fmt: skip
        if self.walks.newcomers < 0:
            raise ConfigError(f"recipe: walks.newcomers is {self.walks.newcomers}. It is at least 0.")
        if not self.walks.mean_rank > 0:
            raise ConfigError(f"recipe: walks.mean_rank is {self.walks.mean_rank}. It is above 0.")
        if self.walks.length < 2 or self.walks.neighbours < 1:
            raise ConfigError(f"recipe: walks.length is {self.walks.length} (at least 2), walks.neighbours "
                              f"{self.walks.neighbours} (at least 1).")  # fmt: skip
        if self.validation.per_epoch <= 0:
            raise ConfigError(f"recipe: validation.per_epoch is {self.validation.per_epoch}. It is above 0.")
        if self.validation.steps < 0:
            raise ConfigError(f"recipe: validation.steps is {self.validation.steps}. It is at least 0.")
        if self.validation.users < 0 or self.validation.patience < 0:
            raise ConfigError(f"recipe: validation.users is {self.validation.users} and validation.patience "
                              f"{self.validation.patience}. Both are at least 0.")  # fmt: skip
        if self.seed < 0 or self.split_seed < 0:
            raise ConfigError(f"recipe: seed is {self.seed}, split_seed is {self.split_seed}. Both are at least 0.")


@dataclass(frozen=True)
class Question:
    """A question about events to evaluate: the name of a prompt of the adapters, and the answers to choose between.

    Of two answers the first is the positive one.
    """

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM runs, where it is the engine: vLLM's own names, passed through, and ``timeout``, which is genrec's.

    Attributes:
        tensor_parallel_size: GPUs that share one copy of the model.
        data_parallel_size: Copies of the model, each on GPUs of its own.
        gpu_memory_utilization: Share of each GPU's memory that vLLM may take; on a CPU without effect.
        max_model_len: Tokens of a prompt and its identifier, at most; unset: the context of the model.
        quantization: How vLLM quantises the weights, such as ``fp8``; unset: not at all.
        enforce_eager: Whether vLLM runs the model without compiling it and without CUDA graphs; unset: on a CPU alone.
        max_num_seqs: Requests that are in work at once; unset: as vLLM chooses.
        max_num_batched_tokens: Tokens of one step, over all requests; unset: as vLLM chooses.
        block_size: Tokens of a block of the prefix cache; unset: the smallest that the machine takes.
        timeout: Seconds without any finished request, or for the start, after which the engine is given up.
    """

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    quantization: str | None = None
    enforce_eager: bool | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "data_parallel_size", "max_model_len", "max_num_seqs",
                     "max_num_batched_tokens", "block_size"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"vllm: {name} is {value}. It is at least 1.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"vllm: gpu_memory_utilization is {self.gpu_memory_utilization}. It is a share, above 0 "
                              "and at most 1.")  # fmt: skip
        if not 0 < self.timeout < math.inf:
            raise ConfigError(f"vllm: timeout is {self.timeout}. It counts seconds and is above 0.")


@dataclass(frozen=True)
class Spec:
    """What to evaluate, and by which protocol.

    Attributes:
        data: A data set folder.
        adapters: Name of a row of the report -> adapter folder.
        baselines: Names out of ``genrec.baselines.BASELINES``.
        against: Files of lists that something else made, Parquet or CSV (see ``genrec.foreign_lists``); a row of the
            report is called by the file's name without its ending.
        split, ties, split_seed: See ``Dataset.split``.
        k: Cut-offs of the metrics.
        num_beams: Beams per user; at least the largest ``k``.
        users: Test cases, at most (0: all), drawn by the seed.
        exclude_seen: Whether items of the history are left out of every list; unset: as the data set says.
        questions: Questions to ask about the targets of the test cases.
        engine: What runs the adapters' models: ``local`` or ``vllm``.
        vllm: How vLLM runs, where it is the engine.
    """

    data: str
    adapters: dict[str, str] = field(default_factory=dict)
    baselines: tuple[str, ...] = ("popularity", "item_knn", "transitions_text")
    against: tuple[str, ...] = ()
    split: SplitKind = "leave_one_out"
    ties: Ties = "file"
    split_seed: int = 0
    k: tuple[int, ...] = (1, 5, 10, 20, 50)
    num_beams: int = 50
    users: int = 0
    exclude_seen: bool | None = None
    seed: int = 0
    questions: tuple[Question, ...] = ()
    engine: Literal["local", "vllm"] = "local"
    vllm: VllmOptions = VllmOptions()

    def __post_init__(self) -> None:
        check_choices(self, "spec")
        for question in self.questions:
            if len(set(question.answers)) < 2 or len(set(question.answers)) < len(question.answers):
                raise ConfigError(f"spec: questions: the answers of {question.prompt!r} are {list(question.answers)}. "
                                  'Name two or more, each once, such as ["yes", "no"].')  # fmt: skip
            if "" in question.answers:
                raise ConfigError(f"spec: questions: an answer of {question.prompt!r} is empty. Remove it.")
        names = [question.prompt for question in self.questions]
        if len(set(names)) < len(names):
            raise ConfigError(f"spec: questions name a prompt twice: {names}. Keep one of the two.")
        if not self.k or min(self.k) < 1 or len(set(self.k)) < len(self.k):
            raise ConfigError(
                f"spec: k is {list(self.k)}. It lists cut-offs of at least 1, each once, such as [5, 10]."
            )
        if self.num_beams < max(self.k):
            raise ConfigError(f"spec: num_beams is {self.num_beams}, below the largest k, {max(self.k)}.")
        if not self.adapters and not self.baselines and not self.against:
            raise ConfigError("spec: neither adapters nor baselines nor lists are given; there is nothing to evaluate.")
        if min(self.users, self.seed, self.split_seed) < 0:
            raise ConfigError(f"spec: users is {self.users}, seed is {self.seed}, split_seed is {self.split_seed}. "
                              "All are at least 0.")  # fmt: skip


@dataclass(frozen=True)
class Thresholds:
    """How far an output of a job may be from the one before it: see ``genrec.batch.churn``. Unset: as far as it likes.

    Attributes:
        max_churn: Share of a user's list that may be new, in the mean over the users of both outputs.
        min_coverage: Distinct items in all lists, at least.
        max_cold: Share of items without an event among all rows.
        max_drift: Mean of today's scores of the model less the mean of yesterday's, as an absolute value.
    """

    max_churn: float | None = None
    min_coverage: int | None = None
    max_cold: float | None = None
    max_drift: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_churn", "max_cold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"thresholds: {name} is {value}. It is a share, from 0 to 1.")
        for name in ("min_coverage", "max_drift"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"thresholds: {name} is {value}. It is at least 0.")


@dataclass(frozen=True)
class Job:
    """A batch job: for whom, with what and whereto. A job TOML has these keys; flags and ``key=value`` go before it.

    Attributes:
        adapter: An adapter folder.
        users: ``user_id``, ``history`` and further columns: a Parquet, CSV or JSON lines file, or a data set folder.
        out: The output folder.
        k: Items per user.
        candidates: Items per user that are decoded before ``steps`` change the list; unset: ``k``, or, where there are
            steps, ``max(50, 5 * k)``.
        num_beams: Beams of the search; unset: ``max(50, 2 * candidates)``.
        exclude_seen: Leave out the items of the history; unset: as the data set says that the adapter was trained on.
        where: A Polars SQL expression over item columns; only items for which it holds are recommended.
        titles: Write the column ``title``.
        shard_size: Rows of the input per shard.
        max_events: A row with a longer history is bad.
        max_bad_share: Share of the input's rows that may be bad; beyond it the job stops.
        data: The data set folder that ``steps`` and the share of cold items read; unset: the adapter's.
        items: A table of today's item columns in the place of the adapter's; items that are not in it are retired.
        engine: ``local`` runs the model; ``vllm`` has vLLM run it; ``dummy`` runs none and gives pseudo-random items,
            for trying a job.
        device, dtype: Where the model runs, as PyTorch names it (vLLM chooses for itself); and its weights' type.
        vllm: How vLLM runs, where it is the engine.
        runner: ``local`` is this process; ``ray`` runs the same shards on Ray.
        workers: Of ``ray``, each with an engine of its own.
        steps: What happens to the lists after decoding, in this order: ``genrec.batch.steps.STEPS``.
        previous: A finished output of this job on an earlier input; users whose row is the same are carried over.
        compare: An earlier output to compare the finished one with.
        thresholds: How far the two may differ.
        price_per_hour: Of the machine or machines that the job runs on, in any currency, for an estimate.
    """

    adapter: str
    users: str
    out: str
    k: int = 20
    candidates: int | None = None
    num_beams: int | None = None
    exclude_seen: bool | None = None
    where: str | None = None
    titles: bool = True
    shard_size: int = 4096
    max_events: int = 100_000
    max_bad_share: float = 0.05
    data: str | None = None
    items: str | None = None
    engine: Literal["local", "vllm", "dummy"] = "local"
    device: str = "cpu"
    dtype: Dtype = "float32"
    vllm: VllmOptions = VllmOptions()
    runner: Literal["local", "ray"] = "local"
    workers: int = 1
    steps: tuple[dict[str, Any], ...] = ()
    previous: str | None = None
    compare: str | None = None
    thresholds: Thresholds = Thresholds()
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        check_choices(self, "job")
        for name in ("k", "shard_size", "max_events", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"job: {name} is {getattr(self, name)}. It is at least 1.")
        if self.candidates is not None and self.candidates < self.k:
            raise ConfigError(f"job: candidates is {self.candidates}, below k, which is {self.k}. Leave it out, or "
                              "raise it.")  # fmt: skip
        if self.num_beams is not None and self.num_beams < self.decoded:
            name = "k" if self.decoded == self.k else "candidates"
            raise ConfigError(f"job: num_beams is {self.num_beams}, below {name}, which is {self.decoded}. Leave it "
                              "out, or raise it.")  # fmt: skip
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"job: max_bad_share is {self.max_bad_share}. It is a share, from 0 to 1.")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < math.inf:
            raise ConfigError(f"job: price_per_hour is {self.price_per_hour}. It is at least 0.")
        if self.engine == "vllm":
            check_vllm_device(self.device)
        if self.workers > 1 and self.runner == "local":
            raise ConfigError(f'job: workers is {self.workers}, and runner "local" is one process. Set runner = "ray".')

    @property
    def decoded(self) -> int:
        """Items per user that are decoded: ``candidates``, or what stands for it."""
        if self.candidates is not None:
            return self.candidates
        return max(50, 5 * self.k) if self.steps else self.k


def check_vllm_device(device: object) -> None:
    """Refuse a device other than the default where vLLM is the engine."""
    if str(device) != "cpu":
        raise ConfigError(
            f"device is {str(device)!r}, and vLLM takes the GPUs that it finds, or the CPU where there is none. Leave "
            "device out; CUDA_VISIBLE_DEVICES and vllm.tensor_parallel_size say which GPUs and how many."
        )


def vllm_options(engine: str, assignments: Iterable[str], where: str) -> VllmOptions:
    """How vLLM runs, from ``vllm.key=value`` assignments alone.

    Raises:
        ConfigError: Another key, a value out of range, or vLLM is not the engine.
    """
    assignments = list(assignments)
    check_vllm_assignments(engine, assignments, where)
    table = override({}, assignments, "vllm.max_num_seqs=256")
    if unknown := sorted(table.keys() - {"vllm"}):
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}. Write vllm.key=value.")
    return from_table(VllmOptions, table.get("vllm", {}), f"{where}: vllm")


def check_vllm_assignments(engine: str, assignments: Iterable[str], where: str) -> None:
    """Refuse ``vllm.key=value`` on a command line where another engine would leave it without effect."""
    told = [assignment for assignment in assignments if assignment.startswith("vllm.")]
    if told and engine != "vllm":
        raise ConfigError(f"{where}: {told[0]} says how vLLM runs, and the engine is {engine!r}. Pass --engine vllm, "
                          "or leave it out.")  # fmt: skip


def load_recipe(path: Path, assignments: Iterable[str] = ()) -> Recipe:
    """The recipe in a TOML file, with ``key=value`` assignments on top."""
    return from_table(Recipe, override(read_toml(path), assignments), str(path))


def load_spec(path: Path, assignments: Iterable[str] = ()) -> Spec:
    """The evaluation spec in a TOML file, with ``key=value`` assignments on top."""
    assignments = list(assignments)
    spec = from_table(Spec, override(read_toml(path), assignments), str(path))
    check_vllm_assignments(spec.engine, assignments, str(path))
    return spec


def load_job(path: Path | None, changes: Mapping[str, Any], assignments: Iterable[str] = ()) -> Job:
    """The job in a TOML file, if there is one, with flags (``changes``) and then ``key=value`` assignments on top.

    Paths in the file are relative to its workspace, those of ``changes`` and ``assignments`` to the working directory.
    """
    table = {} if path is None else read_toml(path)
    for key in JOB_PATHS:
        if path is not None and isinstance(table.get(key), str):
            table[key] = os.path.relpath(workspace_of(path) / table[key])
    where, assignments = "job" if path is None else str(path), list(assignments)
    job = from_table(Job, override({**table, **changes}, assignments), where)
    check_vllm_assignments(job.engine, assignments, where)
    return job


def folder_name(name: str, what: str) -> str:
    """``name``, if it can be one folder's: a workspace is found from where a folder lies, so none is nested.

    Raises:
        ConfigError: It is a path, hidden, or empty; ``what`` begins the message.
    """
    if not re.fullmatch(r"\w[\w. -]*", name):
        raise ConfigError(f"{what}: name is {name!r}. It is one folder's name: letters, digits, spaces, dots, - and _.")
    return name


def workspace_of(path: Path) -> Path:
    """The workspace of a recipe, spec or job: the folder above the one that the file lies in."""
    return Path(path).absolute().parent.parent
