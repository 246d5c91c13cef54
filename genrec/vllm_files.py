"""The files that vLLM loads: an *extended base* (the base with the identifier rows in a longer vocabulary) and the pure
LoRA beside it, because vLLM loads no adapter that carries vocabulary; or one whole model. PEFT loads them the same way.

``check_vllm`` says of any PEFT adapter what vLLM would refuse, or load wrongly without a word.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from genrec import base as bases
from genrec import files
from genrec.adapter import Adapter
from genrec.engines.vllm import RANKS
from genrec.errors import AdapterError, StorageError
from genrec.identifiers import Identifiers
from genrec.tokenization import Tokenization

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# The check for vLLM

_MERGE = "Merge the adapter into its base (`genrec export --to merged`), or train without it."
_REFUSED = {  # Keys of an adapter_config.json that must be unset, each with what vLLM makes of it.
    "use_dora": "vLLM has no DoRA",
    "modules_to_save": "vLLM loads no whole modules",
    "trainable_token_indices": "vLLM loads no vocabulary; write the rows into the base (`genrec export --to vllm`)",
    "rank_pattern": "vLLM scales every layer by the one r",
    "alpha_pattern": "vLLM scales every layer by the one lora_alpha",
    "loftq_config": "it changes the base's weights, and vLLM loads them unchanged",
    "eva_config": "it gives layers ranks of their own, and vLLM scales every layer by the one r",
    "corda_config": "it changes the base's weights, and vLLM loads them unchanged",
    "lora_ga_config": "it changes the base's weights, and vLLM loads them unchanged",
    "fan_in_fan_out": "the base keeps its weights transposed, and vLLM has no LoRA for such layers",
    "target_parameters": "vLLM has LoRA on linear layers alone",
    "layer_replication": "it makes another base than the one that vLLM loads",
    "lora_bias": "vLLM loads no biases",
}
_HARMLESS = {  # Keys that vLLM reads rightly, or need not read because the tensors say the same.
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "bias", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
_STARTS = (True, False, "gaussian", "orthogonal", "mica")  # Values of init_lora_weights that leave the base as it is.
_VOCABULARY_LAYERS = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings"}
_PROBED, _PROBED_TOKENS = (5, 11, 14), 64  # Lengths of the prompts that an engine is checked on; tokens after each.
_FOREIGN = (  # Parts of a tensor's name, each with what it is.
    ("trainable_tokens", "rows of the vocabulary, which vLLM does not load"),
    ("lora_embedding_", "LoRA on an embedding, which vLLM does not load"),
    (".base_layer.", "a weight of the base, which vLLM passes over in silence"),
    ("modules_to_save", "a whole module, which vLLM does not load"),
    ("lora_magnitude_vector", "DoRA, which vLLM does not have"),
    (".bias", "a bias, which vLLM does not load"),
)


def check_vllm(folder: str | Path, base: str | Path | None = None) -> list[str]:
    """What would keep vLLM from loading a PEFT adapter as it was trained; nothing for a good one.

    Args:
        folder: The adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: The folder of the base that vLLM will run; unset: the one that the adapter names, where it is a folder
            (relative to the adapter's). Without one, layers and vocabulary are not compared.

    Returns:
        Problems, each with the file, the key or tensor, and what to do.
    """
    folder = Path(folder)
    problems, config, shapes = check_files(folder)
    if (folder / "rows.safetensors").exists():
        problems.append(
            f"{folder / 'rows.safetensors'} holds identifier rows, which vLLM does not read. "
            "Write them into the base: `genrec export --to vllm`."
        )
    told = config.get("base_model_name_or_path")
    if base is None and isinstance(told, str) and told and (folder / told).is_dir():
        base = folder / told
    return problems if base is None else problems + _check_base(folder, Path(base), shapes)


def check_files(folder: Path) -> tuple[list[str], dict[str, Any], dict[str, list[int]]]:
    """Problems of an adapter's two files by themselves, its configuration, and the shapes of its tensors."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return [f"{path} cannot be read. Name a folder that PEFT wrote."], {}, {}
    except ValueError as error:
        return [f"{path} is not valid JSON: {error}. Save the adapter again."], {}, {}
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        return [f"{path}: peft_type is {kind!r}, and vLLM loads LORA alone. Train LoRA, or merge the adapter."], {}, {}
    problems, shapes = _check_tensors(folder, config.get("r"))
    return [f"{path}: {problem}" for problem in _check_config(config)] + problems, config, shapes


def _check_config(config: Mapping[str, Any]) -> Iterator[str]:
    rank, alpha, start = config.get("r"), config.get("lora_alpha"), config.get("init_lora_weights", True)
    if not _is_rank(rank):
        yield f"r is {rank!r}; vLLM takes ranks of 1 to {RANKS[-1]}. Train with a lower one, or merge the adapter."
    if type(alpha) not in (int, float):
        yield f"lora_alpha is {alpha!r}, no number. Save the adapter again with the value that it was trained with."
    if config.get("bias", "none") != "none":
        yield f"bias is {config['bias']!r}, and vLLM loads no biases. {_MERGE}"
    if start not in _STARTS:
        yield (
            f"init_lora_weights is {start!r}, which changes the base's weights or the layers' ranks, and vLLM loads "
            f"the unchanged base. {_MERGE}"
        )
    for key, value in config.items():
        if value and key not in _HARMLESS:
            yield f"{key} is {value!r}: {_REFUSED.get(key, 'vLLM does not read it')}. {_MERGE}"


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= RANKS[-1]


def _check_tensors(folder: Path, rank: Any) -> tuple[list[str], dict[str, list[int]]]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = sorted(name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).is_file())
        found = f"; {pickled[0]} is a pickle, which can run code when it is loaded" if pickled else ""
        return [f"{path} is missing{found}. Save the adapter as safetensors (PEFT's default)."], {}
    problems: list[str] = []
    shapes: dict[str, list[int]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                tensor = file.get_tensor(key)
                shapes[key] = list(tensor.shape)
                problems += [f"{path}: {key} {problem}" for problem in _check_tensor(key, tensor, rank)]
    except SafetensorError as error:
        return [f"{path} cannot be read: {error}. Copy or save the adapter again."], {}
    lora = {key for key in shapes if key.endswith((".lora_A.weight", ".lora_B.weight"))}
    if not lora:
        problems.append(f"{path} holds no LoRA matrices. Save the adapter again.")
    for key in sorted(lora):
        other = key.replace(".lora_A.", ".lora_B.") if ".lora_A." in key else key.replace(".lora_B.", ".lora_A.")
        if other not in shapes:
            problems.append(f"{path}: {key} stands without {other}. Save the adapter again.")
    return problems, shapes


def _check_tensor(key: str, tensor: torch.Tensor, rank: Any) -> Iterator[str]:
    foreign = next((what for part, what in _FOREIGN if part in key), None)
    match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
    if foreign is not None:
        yield f"is {foreign}. {_MERGE}"
    elif match is None:
        yield (
            "is neither base_model.model.LAYER.lora_A.weight nor lora_B.weight, and vLLM loads nothing else. "
            "Save the adapter with PEFT, LoRA matrices alone."
        )
    elif match[1].rsplit(".", 1)[-1] in _VOCABULARY_LAYERS:
        yield f"is LoRA on the vocabulary, which vLLM does not load. {_MERGE}"
    else:
        side = 0 if match[2] == "A" else 1
        if tensor.ndim != 2 or (_is_rank(rank) and tensor.shape[side] != rank):
            wanted = "[r, in]" if match[2] == "A" else "[out, r]"
            yield (
                f"has the shape {list(tensor.shape)}; with r = {rank} it must be {wanted}, since vLLM scales every "
                f"layer by the one r. {_MERGE}"
            )
        if not bool(torch.isfinite(tensor).all()):
            yield "holds values that are not finite. Train again with a lower learning rate."


def _check_base(folder: Path, base: Path, shapes: Mapping[str, list[int]]) -> list[str]:
    """Problems of an adapter with the base below it: layers of other shapes, identifiers without rows."""
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        vocabulary = int(config["vocab_size"] if "vocab_size" in config else config["text_config"]["vocab_size"])
        weights = _shapes(base)
        source = folder if (folder / "tokenizer.json").is_file() else base
        tokenizer = bases.Base(str(source), source).tokenizer()
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, AdapterError) as error:
        return [f"{base} cannot be read as a base: {error!r}. Name a Hugging Face checkpoint, or export again."]
    problems = []
    for key, shape in shapes.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        weight = weights.get(f"{match[1]}.weight") if match else None
        if match and weight and len(weight) == 2 and shape[-1 if match[2] == "A" else 0] != weight[match[2] == "A"]:
            problems.append(
                f"{folder / WEIGHTS}: {key} has the shape {shape}, and the layer in {base} {weight}: another base. "
                "Name the base that the adapter was trained on."
            )
    ids = tokenizer.get_vocab()
    if (folder / "identifiers.parquet").is_file():
        tokens = Identifiers.load(folder / "identifiers.parquet").vocabulary
        unknown = [token for token in tokens if token not in ids]
        if unknown:
            problems.append(
                f"{source}: its tokenizer lacks {len(unknown)} of the adapter's {len(tokens)} identifier tokens, "
                f"{unknown[0]!r} for one. Serve the extended base that `genrec export --to vllm` writes."
            )
    last = max(ids.values())
    if last >= vocabulary:
        problems.append(
            f"{base}: its vocabulary has {vocabulary} rows, and the tokenizer of {source} goes up to token {last}, "
            f"{tokenizer.convert_ids_to_tokens(last)!r}. Serve the extended base that `genrec export --to vllm` writes."
        )
    return problems


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of the tensors of a checkpoint; only headers are read."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return found


# What is written


def refuse(path: Path, problems: list[str]) -> None:
    if problems:
        told = "".join(f"\n- {problem}" for problem in problems)
        raise AdapterError(f"{path}: vLLM could not load this LoRA as it was trained:{told}")


def is_whole(path: Path, hash_: str, overwrite: bool = False) -> bool:
    """Whether ``path`` holds what was written under this hash, every file as it was.

    Raises:
        AdapterError: It does not, and may not be replaced.
    """
    try:
        told = json.loads((path / "export.json").read_text(encoding="utf-8"))
        changed = [name for name, value in told["files"].items() if files.file_hash(path / name) != value]
        problem = f"{changed[0]} was changed" if changed else "it is another one" if told["hash"] != hash_ else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"it cannot be read ({error!r})"
    if problem is None or overwrite:
        return problem is None
    raise AdapterError(
        f"{path} is not the extended base (or model, or LoRA) that its name says: {problem}. "
        "Remove the folder; it is written anew."
    )


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    with files.new_folder(path, overwrite=overwrite) as folder, bases.quiet():
        try:
            yield folder
        except SafetensorError as error:
            raise OSError(str(error)) from error


def write_model(model: PreTrainedModel, tokenization: Tokenization, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenization.tokenizer.save_pretrained(folder)


def base_parts(adapter: Adapter, dtype: str) -> tuple[str, dict[str, Any]]:
    """The hash of the extended base below a LoRA adapter in a dtype, and what it is made from."""
    told = {key: value for key, value in adapter.manifest["files"].items() if key.startswith("tokenizer/")}
    parts = {"base": adapter.base.hash, "rows": adapter.manifest["files"]["rows.safetensors"], "tokenizer": told}
    return files.text_hash(json.dumps(parts, sort_keys=True), dtype), parts


def write_base(adapter: Adapter, tokenization: Tokenization, folder: Path, dtype: str) -> None:
    """Write the extended base below a LoRA adapter, with what ``is_whole`` and engines compare."""
    hash_, parts = base_parts(adapter, dtype)
    model = adapter.extended_base(tokenization, dtype=getattr(torch, dtype))
    _write_model_and_table(model, tokenization, folder, {"hash": hash_, "dtype": dtype, **parts})


def _write_model_and_table(
    model: PreTrainedModel, tokenization: Tokenization, folder: Path, table: dict[str, Any]
) -> None:
    write_model(model, tokenization, folder)
    _write_table(folder, {**table, "probe": _probe(model)})


def _write_table(folder: Path, table: dict[str, Any]) -> None:
    """``export.json`` beside what it tells of."""
    write_json(folder / "export.json", {**table, "files": files.content_hashes(folder)})


def _probe(model: PreTrainedModel) -> dict[str, Any]:
    """Log-probabilities of plain forwards, for an engine to compare its own with: some tokens after some prompts."""
    rng, vocabulary = np.random.default_rng(0), model.config.get_text_config().vocab_size
    prompts = [rng.integers(vocabulary, size=length).tolist() for length in _PROBED]
    tokens = rng.integers(vocabulary, size=_PROBED_TOKENS).tolist()
    found = []
    model.eval()
    with torch.inference_mode():
        for prompt in prompts:
            logits = model(input_ids=torch.tensor([prompt], device=model.device)).logits[0, -1]
            found.append(logits.float().log_softmax(-1)[tokens].tolist())
    return {"prompts": prompts, "tokens": tokens, "logprobs": found}


def write_for_engine(
    adapter: Adapter, tokenization: Tokenization, folder: Path, *, dtype: str
) -> tuple[Path, Path | None]:
    """Write what the engine ``vllm`` loads, or find it again by its hash, every file compared.

    Args:
        adapter, tokenization: The adapter, and its own tokenization.
        folder: Where: ``base-HASH`` and ``lora-HASH``, or of the product of a "full" recipe ``model-HASH``. Several
            adapters share one extended base where their base, rows and tokenizer are the same.
        dtype: Of the model's weights: float32 or bfloat16. LoRA matrices beside a base stay as trained.

    Returns:
        The folder of the model, and that of the LoRA beside an extended base.

    Raises:
        AdapterError: vLLM could not load the LoRA as it was trained (all reasons are named), or a file of an earlier
            writing was changed.
        StorageError: The disk refused. Nothing is left half-written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {error.strerror}. Free its name, or allow it.") from error
    with FileLock(folder / ".lock"):  # Two processes may want the same base.
        if adapter.tuning == "full":
            hash_ = files.text_hash(adapter.hash, dtype)
            path = folder / f"model-{hash_[:16]}"
            if not (path.exists() and is_whole(path, hash_)):
                with new_folder(path) as new:
                    model = adapter.model(tokenization, dtype=getattr(torch, dtype))
                    _write_model_and_table(model, tokenization, new, {"hash": hash_, "dtype": dtype})
            return path, None
        refuse(adapter.path, check_files(adapter.path)[0])
        if adapter.tuning == "qlora":
            warnings.warn(
                f"{adapter.path} was trained on a base held in 4 bits, and vLLM runs it on the weights that the base "
                "was written with: scores are others. Measure it: genrec eval --engine vllm",
                stacklevel=3,
            )
        hash_ = base_parts(adapter, dtype)[0]
        base = folder / f"base-{hash_[:16]}"
        if not (base.exists() and is_whole(base, hash_)):
            with new_folder(base) as new:
                write_base(adapter, tokenization, new, dtype)
        lora = folder / f"lora-{adapter.hash[:16]}"
        if not (lora.exists() and is_whole(lora, adapter.hash)):
            with new_folder(lora) as new:
                config = json.loads((adapter.path / CONFIG).read_text(encoding="utf-8"))
                write_json(new / CONFIG, {**config, "base_model_name_or_path": f"../{base.name}"})
                shutil.copyfile(adapter.path / WEIGHTS, new / WEIGHTS)
                _write_table(new, {"hash": adapter.hash})
        refuse(adapter.path, check_vllm(lora, base))
        return base, lora


def write_beside(adapter: Adapter, folder: Path) -> None:
    """What one needs beside the weights: which tokens an item is, and how a request is written."""
    for name in ("identifiers.parquet", "items.parquet", "frames.json"):
        shutil.copyfile(adapter.path / name, folder / name)
    (folder / "prompts").mkdir()
    for prompt in adapter.prompts:
        shutil.copyfile(adapter.path / "prompts" / f"{prompt}.jinja", folder / "prompts" / f"{prompt}.jinja")


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    files.write_text(path, json.dumps(table, indent=1, ensure_ascii=False))
