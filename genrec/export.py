"""Exports: what training made, in the forms that other programs load as they are.

``merged`` is one plain Hugging Face checkpoint. ``vllm`` is an *extended base* (the base with the identifier rows in a
longer vocabulary) and the pure LoRA beside it, because vLLM loads no adapter that carries vocabulary; PEFT loads both
the same way. ``check_vllm`` says of any PEFT adapter what vLLM would refuse, or load wrongly without a word.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from genrec import adapter as adapters
from genrec import base as bases
from genrec import files
from genrec.adapter import Adapter
from genrec.config import Recipe, from_table, suggestion, workspace_of
from genrec.dataset import Dataset
from genrec.engines import Engine
from genrec.engines.local import LocalEngine
from genrec.errors import AdapterError, ConfigError, DataError
from genrec.identifiers import Identifiers
from genrec.prompts import Prompt
from genrec.tokenization import Tokenization
from genrec.validation import ValidationSet

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # What vLLM takes as --max-lora-rank.
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

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
_FOREIGN = (  # Parts of a tensor's name, each with what it is.
    ("trainable_tokens", "rows of the vocabulary, which vLLM does not load"),
    ("lora_embedding_", "LoRA on an embedding, which vLLM does not load"),
    (".base_layer.", "a weight of the base, which vLLM passes over in silence"),
    ("modules_to_save", "a whole module, which vLLM does not load"),
    ("lora_magnitude_vector", "DoRA, which vLLM does not have"),
    (".bias", "a bias, which vLLM does not load"),
)


def max_lora_rank(rank: int) -> int:
    """The value of vLLM's ``--max-lora-rank`` that holds LoRA of this rank, 1 .. 512."""
    return next(allowed for allowed in RANKS if allowed >= rank)


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
    problems, config, shapes = _check_files(folder)
    if (folder / "rows.safetensors").exists():
        problems.append(
            f"{folder / 'rows.safetensors'} holds identifier rows, which vLLM does not read. "
            "Write them into the base: `genrec export --to vllm`."
        )
    told = config.get("base_model_name_or_path")
    if base is None and isinstance(told, str) and told and (folder / told).is_dir():
        base = folder / told
    return problems if base is None else problems + _check_base(folder, Path(base), shapes)


def _check_files(folder: Path) -> tuple[list[str], dict[str, Any], dict[str, list[int]]]:
    """Problems of an adapter's two files by themselves, its configuration, and the shapes of its tensors."""
    path = folder / _CONFIG
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
    path = folder / _WEIGHTS
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
                f"{folder / _WEIGHTS}: {key} has the shape {shape}, and the layer in {base} {weight}: another base. "
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


# The figures of what is exported


def validation_set(adapter: Adapter, tokenization: Tokenization, data: str | Path | None = None) -> ValidationSet:
    """The validation cases that an adapter's training used. Arguments and errors as in ``validation_sets``."""
    return validation_sets(adapter, tokenization, [adapter.prompt], data)[0]


def validation_sets(
    adapter: Adapter, tokenization: Tokenization, prompts: Sequence[Prompt], data: str | Path | None = None
) -> list[ValidationSet]:
    """The same cases rendered with each of ``prompts``.

    Args:
        adapter, tokenization: The adapter, and its own tokenization.
        prompts: Sequence prompts.
        data: Its data set's folder, where that is not where the recipe said.

    Raises:
        DataError: The data set is not there, or is another one.
    """
    told = adapter.manifest["data"]
    folder = Path(data) if data is not None else workspace_of(adapter.path) / told["path"]
    measure = "NDCG@10 is measured again on its validation cases. Pass --data FOLDER, or --no-measure."
    if not folder.is_dir():
        raise DataError(f"{folder}: the data set of {adapter.path} is not here, and {measure}")
    loaded = Dataset.load(folder)
    if loaded.hash != told["hash"] or loaded.item_ids != list(adapter.identifiers.item_ids):
        raise DataError(
            f"{folder} is not the data set that {adapter.path} was trained on: trained {told['hash']}, "
            f"found {loaded.hash}{' in another order' if loaded.hash == told['hash'] else ''}; {measure}"
        )
    recipe = from_table(Recipe, adapter.manifest["recipe"], str(adapter.path / "genrec.json"))
    split = loaded.split(recipe.split, ties=recipe.ties, seed=recipe.split_seed)
    split = split.without_validation(adapter.not_validated)
    seen = bool(told["manifest"]["exclude_seen"])
    return [
        ValidationSet.draw(recipe, split, tokenization, prompt, loaded.user_rows, exclude_seen=seen)
        for prompt in prompts
    ]


def measure(adapter: Adapter, validation: ValidationSet, engine: Engine) -> dict[str, float]:
    """NDCG@10 on validation cases: ``trained`` as training kept it, ``exported`` as ``engine`` has it, ``change``."""
    trained, exported = float(adapter.manifest["kept"]["ndcg@10"]), validation.evaluate(engine)["ndcg@10"]
    return {"trained": trained, "exported": exported, "change": exported - trained}


@bases.quiet()
def _load(model: Path, lora: Path | None = None) -> LocalEngine:
    """An engine with an export as it lies on the disk, loaded as anybody would."""
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", trust_remote_code=False, local_files_only=True, use_safetensors=True
    )
    if lora is not None:
        loaded = PeftModel.from_pretrained(loaded, lora, local_files_only=True).get_base_model()
    return LocalEngine(loaded.eval())


# The exports


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        model: The folder of the checkpoint: merged, or the extended base.
        lora: The folder of the LoRA beside an extended base.
        reused: Whether the extended base was there already.
        table: ``export.json``.
    """

    model: Path
    lora: Path | None
    reused: bool
    table: dict[str, Any]


def export(
    adapter: str | Path,
    out: str | Path,
    *,
    to: Literal["vllm", "merged"],
    name: str = "adapter",
    dtype: Literal["float32", "bfloat16"] | None = None,
    data: str | Path | None = None,
    measured: bool | None = None,
    overwrite: bool = False,
) -> Export:
    """Write an adapter in a form that other programs load.

    Args:
        adapter: The folder that training wrote.
        out: ``merged``: the folder to write. ``vllm``: the folder to write two in, ``base-HASH`` and ``NAME``; an
            extended base that is there already and whole is used again. Of the product of a "full" recipe there is
            ``base-HASH`` alone.
        to: ``vllm`` or ``merged``.
        name: What the folder of the LoRA is called, so that several can share one extended base.
        dtype: Of the model's weights; unset: that of the recipe. LoRA matrices beside a base stay as trained.
        data: The data set, for measuring; unset: the one of the recipe.
        measured: Whether NDCG@10 on the validation cases is measured again, with what was written; unset: only where
            the adapter was trained on a quantised base.
        overwrite: Replace what is there.

    Raises:
        AdapterError: The adapter cannot be loaded, or vLLM could not load it right: all reasons are named.
        ConfigError: An unknown form or dtype, or a name that is none.
        DataError: The data set for measuring is not there, or is another one.
        StorageError: A folder exists, or the disk refused. Nothing is left half-written.
    """
    loaded, out = Adapter.load(adapter), Path(out)
    dtype = dtype or loaded.manifest["recipe"].get("dtype", "float32")
    for key, value, known in (("to", to, ("vllm", "merged")), ("dtype", dtype, ("float32", "bfloat16"))):
        if value not in known:
            raise ConfigError(f"export: {key} is {value!r}. {suggestion(str(value), known)}")
    if not re.fullmatch(r"\w[\w.-]*", name) or name.startswith("base-"):
        raise ConfigError(f"export: name is {name!r}. It is one folder's name, and does not begin with base-.")
    split_up = to == "vllm" and loaded.tuning != "full"
    if split_up:
        _refuse(loaded.path, _check_files(loaded.path)[0])
    tokenization = loaded.tokenization()
    validation = None
    if measured or (measured is None and loaded.tuning == "qlora"):
        validation = validation_set(loaded, tokenization, data)
    table: dict[str, Any] = {
        "to": to,
        "adapter": {"name": loaded.path.absolute().name, "hash": loaded.hash, "tuning": loaded.tuning},
        "base": {key: loaded.manifest["base"].get(key) for key in ("name", "revision", "hash")},
        "identifiers": loaded.identifiers.hash,
        "fitted_on": loaded.manifest["fitted_on"],
        "exclude_seen": loaded.manifest["data"]["manifest"]["exclude_seen"],
        "prompts": list(loaded.prompts),
        "max_length": loaded.manifest["max_length"],
        "dtype": dtype,
        "ndcg@10": None,
        "versions": adapters.versions(),
    }
    if split_up:
        return _split_up(loaded, tokenization, out, name, table, validation, overwrite)
    path = out if to == "merged" else out / f"base-{files.text_hash(loaded.hash, dtype)[:16]}"
    with _new_folder(path, overwrite) as folder:
        model = loaded.model(tokenization, dtype=getattr(torch, dtype), quantised=False)
        _write_model(model, tokenization, folder)
        del model
        _write_beside(loaded, folder)
        if validation is not None:
            table["ndcg@10"] = measure(loaded, validation, _load(folder))
        _write_json(folder / "export.json", table)
    return Export(path, None, False, table)


def _split_up(
    adapter: Adapter,
    tokenization: Tokenization,
    out: Path,
    name: str,
    table: dict[str, Any],
    validation: ValidationSet | None,
    overwrite: bool,
) -> Export:
    """An extended base, unless it is there, and a pure LoRA."""
    dtype = table["dtype"]
    told = {key: value for key, value in adapter.manifest["files"].items() if key.startswith("tokenizer/")}
    parts = {"base": adapter.base.hash, "rows": adapter.manifest["files"]["rows.safetensors"], "tokenizer": told}
    hash_ = files.text_hash(json.dumps(parts, sort_keys=True), dtype)
    path = out / f"base-{hash_[:16]}"
    reused = path.exists() and _is_whole(path, hash_, overwrite)
    with _new_folder(out / name, overwrite) as lora:
        config = json.loads((adapter.path / _CONFIG).read_text(encoding="utf-8"))
        rank = config["r"]
        _write_json(lora / _CONFIG, {**config, "base_model_name_or_path": f"../{path.name}", "inference_mode": True})
        shutil.copyfile(adapter.path / _WEIGHTS, lora / _WEIGHTS)
        _write_beside(adapter, lora)
        with nullcontext(path) if reused else _new_folder(path, overwrite) as base:
            if not reused:
                model = adapter.extended_base(tokenization, dtype=getattr(torch, dtype))
                _write_model(model, tokenization, base)
                del model
                written = {entry.name: files.file_hash(entry) for entry in sorted(base.iterdir())}
                _write_json(base / "export.json", {"hash": hash_, "dtype": dtype, **parts, "files": written})
            _refuse(adapter.path, check_vllm(lora, base))
            if validation is not None:
                table["ndcg@10"] = measure(adapter, validation, _load(base, lora))
        table |= {"extended_base": path.name, "max_lora_rank": max_lora_rank(rank)}
        _write_json(lora / "export.json", table)
    return Export(path, out / name, reused, table)


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        told = "".join(f"\n- {problem}" for problem in problems)
        raise AdapterError(f"{path}: vLLM could not load this LoRA as it was trained:{told}")


def _is_whole(path: Path, hash_: str, overwrite: bool) -> bool:
    """Whether ``path`` holds the extended base of this hash, every file as it was written.

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
    raise AdapterError(f"{path} is not the extended base that its name says: {problem}. Replace it: --overwrite.")


@contextmanager
def _new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    with files.new_folder(path, overwrite=overwrite) as folder, bases.quiet():
        try:
            yield folder
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _write_model(model: PreTrainedModel, tokenization: Tokenization, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenization.tokenizer.save_pretrained(folder)


def _write_beside(adapter: Adapter, folder: Path) -> None:
    """What one needs beside the weights: which tokens an item is, and how a request is written."""
    for name in ("identifiers.parquet", "items.parquet", "frames.json"):
        shutil.copyfile(adapter.path / name, folder / name)
    (folder / "prompts").mkdir()
    for prompt in adapter.prompts:
        shutil.copyfile(adapter.path / "prompts" / f"{prompt}.jinja", folder / "prompts" / f"{prompt}.jinja")


def _write_json(path: Path, table: Mapping[str, Any]) -> None:
    files.write_text(path, json.dumps(table, indent=1, ensure_ascii=False))
