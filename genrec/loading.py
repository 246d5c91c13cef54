"""From an adapter folder's weights to the engine that runs them, here or in vLLM's own processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from genrec import progress
from genrec.adapter import Adapter
from genrec.config import VllmOptions, check_vllm_device, workspace_of
from genrec.decoding import Trie
from genrec.engines import Engine
from genrec.engines.batches import memory_at_hand
from genrec.errors import ConfigError, suggestion
from genrec.memory import memory, size
from genrec.tokenization import Tokenization

if TYPE_CHECKING:
    import torch

EngineName = Literal["local", "vllm", "dummy"]
ENGINES = ("local", "vllm", "dummy")


def check_engine(engine: str, device: object) -> None:
    """Refuse an engine that there is not or that is not installed, or a device that it does not take.

    Raises:
        ConfigError: As told.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine is {engine!r}. {suggestion(engine, ENGINES)}")
    if engine == "vllm":
        check_vllm_device(device)
        vllm_version()


def vllm_version() -> str:
    """The version of vLLM.

    Raises:
        ConfigError: It is not installed, or not one that genrec supports.
    """
    from genrec.engines.vllm import version

    return version()


def model_engine(
    engine: Literal["local", "vllm"],
    adapter: Adapter,
    tokenization: Tokenization,
    trie: Trie,
    device: str | torch.device,
    dtype: torch.dtype,
    vllm: VllmOptions | None = None,
) -> Engine:
    """An engine with the adapter's model; how much memory that takes is said first.

    Args:
        engine: ``local`` has it in this process, on ``device``. ``vllm`` has vLLM load what is written once to
            ``exports/vllm`` of the adapter's workspace.
        adapter, tokenization, trie: What was read without the weights.
        device: Where the model of ``local`` runs.
        dtype: Of the weights.
        vllm: How vLLM runs.

    Raises:
        ConfigError: PyTorch refuses the device, or a CPU has less memory than the weights take; or vLLM is not
            installed, is of a version that genrec does not support, or takes no such dtype or option.
        AdapterError: The weights cannot be read, or vLLM could not load them as they were trained.
        EngineError: vLLM did not start.
    """
    needed = memory(adapter, tokenization, trie, dtype)
    progress.say(f"{adapter.path}: {needed}")
    if engine == "vllm":
        from genrec.engines.pooled import VllmEngine, check_dtype
        from genrec.vllm_files import write_for_engine

        name = str(dtype).removeprefix("torch.")
        check_dtype(name)
        options, longest = vllm or VllmOptions(), tokenization.max_length
        if options.max_model_len is not None and options.max_model_len < longest:
            raise ConfigError(
                f"vllm.max_model_len is {options.max_model_len}, and prompts of {adapter.path} with an identifier have "
                f"up to {longest} tokens. Leave it out, or set {longest} or more."
            )
        folder = workspace_of(adapter.path) / "exports" / "vllm"
        checkpoint, lora = write_for_engine(adapter, tokenization, folder, dtype=name)
        return VllmEngine(checkpoint, lora, dtype=name, options=options)
    import torch

    from genrec.engines.local import LocalEngine

    if str(device).partition(":")[0] == "cpu" and needed.weights > (free := memory_at_hand(torch.device("cpu"))):
        raise ConfigError(
            f"{adapter.path} takes {needed}, and {size(free)} are available. Free some, choose a "
            "smaller dtype (bfloat16), or another device."
        )
    model: Any = adapter.model(tokenization, dtype=dtype)
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device is {str(device)!r}, and PyTorch refused it: {error}") from error
    return LocalEngine(model)
