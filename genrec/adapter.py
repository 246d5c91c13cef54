"""Adapters: the folders that training produces and inference needs, written whole and cross-checked when they load.

An adapter holds all that stands beside its base: LoRA matrices (or the whole model), the trained embedding rows of the
identifier tokens, tokenizer, identifiers, items, the very prompt files, and their frames. ``genrec.json`` ties them
together by hashes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from genrec import base as bases
from genrec import files
from genrec.config import Tuning, workspace_of
from genrec.errors import AdapterError
from genrec.identifiers import Identifiers
from genrec.prompts import Prompt
from genrec.rows import is_rows
from genrec.tokenization import Frame, Tokenization

if TYPE_CHECKING:  # PEFT is loaded where there is LoRA: it takes seconds.
    from peft import PeftModel

FORMAT_VERSION = 1
# Titles, stock and other item columns may change without retraining; the curves decide nothing.
_UNCHECKED = ("genrec.json", "items.parquet", "learning_curve.json", "learning_curve.png")
_MANIFEST: dict[str, type] = {  # What an adapter is loaded and hashed by, and of which type.
    "tuning": str,
    "base.name": str,
    "base.hash": str,
    "prompts": list,
    "max_length": int,
    "data.path": str,
    "data.hash": str,
    "data.manifest.exclude_seen": bool,
    "fitted_on": str,
    "protocol": dict,
    "identifiers.scheme": str,
    "recipe.seed": int,
    "kept": dict,
    "user_columns": dict,
    "contracts": dict,
    "files": dict,
}
# Types of users' columns that a prompt can print and any format can hold.
_COLUMN_TYPES: dict[str, pl.DataType] = {
    str(kind): kind
    for one in (pl.String, pl.Boolean, pl.Float32, pl.Float64, pl.Int8, pl.Int16, pl.Int32, pl.Int64,
                pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64)
    for kind in (one(), pl.List(one()))
}  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of genrec and of the libraries that decide what a model computes."""
    names = ("genrec", "torch", "transformers", "tokenizers", "peft", "trl")
    return {name: metadata.version(name) for name in names}


def _content_hashes(folder: Path) -> dict[str, str]:
    return {name: files.file_hash(folder / name) for name in _checked_files(folder)}


def _checked_files(folder: Path) -> list[str]:
    """Names below ``folder`` of the files that a manifest must list."""
    return [name for name in files.content_names(folder) if name not in _UNCHECKED]


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest without what loading reads, and a folder whose files are not those of the manifest.

    A file is opened only if it was found in the folder, so no name in the manifest leads out of it.
    """
    for key, kind in _MANIFEST.items():
        value: Any = manifest
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind) or value == []:
            raise AdapterError(
                f"{path / 'genrec.json'}: {key} is {value!r}; it takes a value of type {kind.__name__}. "
                "Train the adapter again, or copy it again."
            )
    found, told = set(_checked_files(path)), manifest["files"]
    needed = {*told, *(f"prompts/{name}.jinja" for name in manifest["prompts"]), "frames.json", "identifiers.parquet"}
    if manifest["tuning"] != "full":
        needed |= {"rows.safetensors", "adapter_config.json", "adapter_model.safetensors"}
    missing = sorted(needed - found)
    if not (path / "items.parquet").is_file():
        missing.append("items.parquet")
    if missing:
        raise AdapterError(
            f"{path / missing[0]} is missing; the adapter is incomplete. Train it again, or copy it again."
        )
    added = sorted(found - set(told))
    if added:
        raise AdapterError(
            f"{path / added[0]} is none of the files that the adapter was trained with. Remove it, or train it again."
        )
    for name, trained in told.items():
        hash_ = files.file_hash(path / name)
        if hash_ != trained:
            raise AdapterError(
                f"{path / name} is not what the adapter was trained with: trained {str(trained)[:16]}, "
                f"found {hash_[:16]}. Restore the file, or train again with the changed one."
            )


def user_columns(users: pl.DataFrame | None, prompts: Iterable[Prompt]) -> dict[str, str]:
    """Types of the users' columns that prompts read, by name; other inputs of users are read by them."""
    if users is None:
        return {}
    read = sorted({column for prompt in prompts for column in prompt.reads["user"]} & {*users.columns})
    texts = (pl.Categorical, pl.Enum)
    kinds = {name: "String" if isinstance(users.schema[name], texts) else str(users.schema[name]) for name in read}
    return {name: kind for name, kind in kinds.items() if kind in _COLUMN_TYPES}


def resize(model: PreTrainedModel, vocabulary: int) -> None:
    """Give the model embedding rows for ``vocabulary`` tokens, if it has fewer. New rows are set by the caller.

    No row is added beyond that, since every row takes part in the softmax; rows that the base brought stay.
    """
    if vocabulary > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)


def rows(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The embedding rows of token ``ids``: ``input``, and ``output`` where the head is not tied to the embedding."""
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    result = {"input": embedding.weight[ids].detach().clone().contiguous()}
    if not inner.config.get_text_config().tie_word_embeddings:
        result["output"] = head.weight[ids].detach().clone().contiguous()
    return result


def set_rows(model: PreTrainedModel, ids: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
    """Write embedding rows, as ``rows`` gives them, into a model whose vocabulary holds ``ids``."""
    with torch.no_grad():
        for key, layer in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
            if key in values:
                layer.weight[ids] = values[key].to(layer.weight)


def identifier_ids(tokenization: Tokenization) -> torch.Tensor:
    """int64 token ids of the identifiers' new tokens, in the order of their vocabulary; these rows are trained."""
    return torch.tensor(tokenization.tokenizer.convert_tokens_to_ids(list(tokenization.identifiers.vocabulary)))


def _check_trained(model: PeftModel) -> None:
    """Refuse trained weights that are neither LoRA's nor identifier rows: they would be lost in silence."""
    for name, value in model.named_parameters():
        if value.requires_grad and ".lora_" not in name and not is_rows(name):
            raise AdapterError(
                f"{name} was trained, and an adapter holds LoRA matrices and identifier rows alone. "
                'Change [lora], or train everything with tuning = "full".'
            )


def save(
    path: Path,
    *,
    model: PreTrainedModel | PeftModel,
    tuning: Tuning,
    base: bases.Base,
    tokenization: Tokenization,
    prompts: Mapping[str, Prompt],
    manifest: Mapping[str, Any],
    extra: Mapping[str, bytes],
    overwrite: bool = False,
    before: Callable[[], None] | None = None,
) -> None:
    """Write an adapter folder, whole or not at all.

    Args:
        path: The folder.
        model: A ``PeftModel`` (LoRA and identifier rows are written) or a whole model (everything is).
        tuning: How it was trained; ``full`` goes with a whole model.
        base: What it was trained from.
        tokenization: Tokenizer, identifiers, items and frames.
        prompts: Name -> prompt, the default one first.
        manifest: What ``genrec.json`` says besides: recipe, data, protocol, metrics, ...
        extra: Further files, such as the learning curve: name -> content.
        overwrite: Replace a folder that is there.
        before: Called when everything is written and before the folder takes its name; what it raises undoes all.

    Raises:
        AdapterError: Something was trained that the folder would not hold.
        StorageError: The folder exists, or the disk refused.
    """
    path = Path(path)
    with files.new_folder(path, overwrite=overwrite) as folder, bases.quiet():
        try:
            if tuning != "full":
                from peft import PeftModel, get_peft_model_state_dict

                assert isinstance(model, PeftModel)
                _check_trained(model)
                # Embedding rows are written by themselves; "auto" would warn and look for the base's configuration.
                state = get_peft_model_state_dict(model, save_embedding_layers=False)
                lora = {key: value.contiguous() for key, value in state.items() if ".lora_" in key}
                config = model.peft_config["default"]
                for key, value in list(vars(config).items()):
                    if isinstance(value, set):  # Its order is another one in every process.
                        setattr(config, key, sorted(value))
                config.inference_mode, mode = True, config.inference_mode
                # PEFT notes where the base lay on this machine; genrec.json says where it lies from here.
                config.base_model_name_or_path, source = base.name, config.base_model_name_or_path
                config.save_pretrained(folder)
                config.inference_mode, config.base_model_name_or_path = mode, source
                save_file(lora, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            else:
                model.save_pretrained(folder)
            save_file(rows(model, identifier_ids(tokenization)), folder / "rows.safetensors")
        except SafetensorError as error:
            raise OSError(str(error)) from error
        tokenization.tokenizer.save_pretrained(folder / "tokenizer")
        tokenization.identifiers.save(folder / "identifiers.parquet")
        with files.new_file(folder / "items.parquet") as temporary:
            tokenization.items.write_parquet(temporary)
        (folder / "prompts").mkdir()
        for name, prompt in prompts.items():
            (folder / "prompts" / f"{name}.jinja").write_text(prompt.source, encoding="utf-8")
        files.write_text(folder / "frames.json", json.dumps(tokenization.frames_table(), indent=1))
        for name, content in extra.items():
            (folder / name).write_bytes(content)
        table = {
            "format_version": FORMAT_VERSION,
            "name": path.name,
            "tuning": tuning,
            "base": {
                "name": base.name,
                "folder": os.path.relpath(base.folder, path) if base.revision is None else None,
                "revision": base.revision,
                "hash": base.hash,
            },
            "prompts": list(prompts),
            "contracts": {name: prompt.contract for name, prompt in prompts.items()},
            "max_length": tokenization.max_length,
            "identifiers": {"scheme": tokenization.identifiers.scheme, "hash": tokenization.identifiers.hash},
            **manifest,
            "versions": versions(),
            "files": _content_hashes(folder),
        }
        files.write_text(folder / "genrec.json", json.dumps(table, indent=1, ensure_ascii=False))
        if before is not None:
            before()


@dataclass(frozen=True)
class Adapter:
    """An adapter that was loaded and cross-checked; its weights are read by ``model``.

    Attributes:
        path: The folder.
        manifest: ``genrec.json``.
        identifiers, items: Of the catalogue, in the same order.
        prompts: Name -> prompt; the first is the default one.
    """

    path: Path
    manifest: dict[str, Any]
    identifiers: Identifiers
    items: pl.DataFrame
    prompts: dict[str, Prompt]

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Read an adapter folder and check that every file is the one that training wrote.

        Raises:
            AdapterError: No adapter there, of another format, with a file changed (both hashes are named), or whose
                base is missing.
        """
        path = Path(path)
        try:
            manifest = json.loads((path / "genrec.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            recipe = path.parent / f"{path.name}.toml"
            hint = f"Train it: genrec train {recipe}" if recipe.exists() else "Name a folder that `genrec train` wrote."
            raise AdapterError(f"{path}: no adapter here (no genrec.json). {hint}") from None
        except json.JSONDecodeError as error:
            raise AdapterError(f"{path / 'genrec.json'}:{error.lineno}: not valid JSON: {error.msg}") from None
        if not isinstance(manifest, dict):
            raise AdapterError(f"{path / 'genrec.json'} holds no table. Name a folder that `genrec train` wrote.")
        if manifest.get("format_version") != FORMAT_VERSION:
            raise AdapterError(
                f"{path}: format_version is {manifest.get('format_version')!r}, this genrec reads {FORMAT_VERSION}. "
                f"Train it again, or install genrec {manifest.get('versions', {}).get('genrec', 'of then')}."
            )
        _check_manifest(path, manifest)
        try:
            items = pl.read_parquet(path / "items.parquet")
        except (pl.exceptions.PolarsError, OSError) as error:
            raise AdapterError(f"{path / 'items.parquet'} cannot be read as Parquet: {error}") from error
        for column in ("item_id", "title"):
            if column not in items.columns:
                raise AdapterError(
                    f"{path / 'items.parquet'} has no column {column!r}; it has {items.columns}. Add it."
                )
        adapter = cls(
            path=path,
            manifest=manifest,
            identifiers=Identifiers.load(path / "identifiers.parquet"),
            items=items,
            prompts={name: Prompt.load(path / "prompts" / f"{name}.jinja") for name in manifest["prompts"]},
        )
        _ = adapter.user_columns
        adapter._check_contracts()
        if adapter.tuning != "full":
            _ = adapter.base  # Found and compared now, not when the weights are read.
        return adapter

    @property
    def data_folder(self) -> Path:
        """Where the data set lay that it was trained on: in its workspace, as its recipe says."""
        return workspace_of(self.path) / self.manifest["data"]["path"]

    @property
    def exclude_seen(self) -> bool:
        """Whether its lists leave out what a user has had, as its data set says."""
        return bool(self.manifest["data"]["manifest"]["exclude_seen"])

    @property
    def hash(self) -> str:
        """SHA-256 over what training decided of its lists: its files, its base, and how prompts are made."""
        told = self.manifest
        decisive = (
            told["base"]["hash"], told["files"], told["prompts"], told["max_length"], self.exclude_seen,
        )  # fmt: skip
        return files.text_hash(json.dumps(decisive, sort_keys=True))

    @property
    def user_columns(self) -> dict[str, pl.DataType]:
        """Types of the users' columns that its prompts read, as in training.

        Raises:
            AdapterError: ``genrec.json`` has other types than training writes.
        """
        told = self.manifest["user_columns"]
        try:
            return {name: _COLUMN_TYPES[kind] for name, kind in told.items()}
        except (KeyError, TypeError):
            raise AdapterError(
                f"{self.path / 'genrec.json'}: user_columns is {told!r}; it takes the types of columns by name, such "
                "as Int64 or List(String). Train the adapter again, or copy it again."
            ) from None

    def _check_contracts(self) -> None:
        """Refuse prompts of which this genrec makes other tokens than the one that trained them.

        The files themselves have been compared by their hashes.
        """
        for name, prompt in self.prompts.items():
            trained = self.manifest["contracts"].get(name)
            if trained != prompt.contract:
                raise AdapterError(
                    f"{self.path / 'prompts' / name}.jinja: this genrec makes other tokens of it than the one that "
                    f"trained the adapter: contract {str(trained)[:16]} in genrec.json, {prompt.contract[:16]} here. "
                    f"Train it again, or install genrec {self.manifest.get('versions', {}).get('genrec', 'of then')}."
                )

    @property
    def tuning(self) -> str:
        """``lora``, ``qlora`` or ``full``."""
        return str(self.manifest["tuning"])

    @property
    def not_validated(self) -> list[str]:
        """Ids of the users whose validation case was left out, since its target was trained on before an update."""
        return list(self.manifest.get("update", {}).get("not_validated", []))

    @property
    def prompt(self) -> Prompt:
        """The prompt that it recommends with."""
        return next(iter(self.prompts.values()))

    @cached_property
    def base(self) -> bases.Base:
        """The base below a LoRA adapter.

        Raises:
            AdapterError: It is not where it was, or it was changed since training (both hashes are named).
        """
        found = self._find_base()
        trained = self.manifest["base"]["hash"]
        if found.hash != trained:
            raise AdapterError(
                f"{self.path}: its base {found.name} at {found.folder} was changed: trained on {trained[:16]}, "
                f"found {found.hash[:16]}. Restore the base, or train this adapter again."
            )
        return found

    def _find_base(self) -> bases.Base:
        told = self.manifest["base"]
        if told.get("folder") is None:
            return bases.find(told["name"], revision=told.get("revision"))
        folder = (self.path / told["folder"]).resolve()
        if not folder.is_dir():
            raise AdapterError(
                f"{self.path}: its base {told['name']} (hash {told['hash'][:16]}) is not at {folder}. "
                "Put it back there, or train the base and then this adapter again."
            )
        return bases.find(str(folder))

    def tokenization(self) -> Tokenization:
        """Its tokenizer, identifiers, items and frames, ready to encode prompts."""
        tokenizer = bases.Base(self.path.name, self.path).tokenizer()
        frames = json.loads((self.path / "frames.json").read_text(encoding="utf-8"))
        return Tokenization(
            tokenizer,
            self.identifiers,
            self.items,
            max_length=self.manifest["max_length"],
            frames={name: Frame(**frame) for name, frame in frames.items()},
        )

    @bases.quiet()
    def model(
        self, tokenization: Tokenization, *, dtype: torch.dtype = torch.float32, quantised: bool | None = None
    ) -> PreTrainedModel:
        """The whole model, on the CPU, in eval mode: LoRA merged and identifier rows put in.

        ``quantised`` says whether the base is held in 4 bits, which stand beside LoRA unmerged, for merging would round
        it to them; unset, that is as the adapter was trained.

        Raises:
            AdapterError: The base cannot be loaded, or 4 bits are asked for, and bitsandbytes is not installed, or the
                adapter is a whole model.
        """
        quantised = self.tuning == "qlora" if quantised is None else quantised
        if quantised and not bases.can_quantise():
            raise AdapterError(f"{self.path}: {bases.NO_QUANTISER}")
        if self.tuning == "full":
            if quantised:
                raise AdapterError(f"{self.path} is a whole model, which is not held in 4 bits. Leave out quantised.")
            model = AutoModelForCausalLM.from_pretrained(
                self.path, dtype=dtype, trust_remote_code=False, local_files_only=True, use_safetensors=True
            )
            return model.eval()
        from peft import PeftModel

        model = self.extended_base(tokenization, dtype=dtype, quantised=quantised)
        lora = PeftModel.from_pretrained(model, self.path, local_files_only=True)
        return (lora.get_base_model() if quantised else lora.merge_and_unload()).eval()

    def extended_base(
        self, tokenization: Tokenization, *, dtype: torch.dtype, quantised: bool = False
    ) -> PreTrainedModel:
        """The base below a LoRA adapter, on the CPU, with the adapter's identifier rows put in and no LoRA."""
        model = self.base.model(dtype, quantised=quantised)
        resize(model, len(tokenization.tokenizer))
        set_rows(model, identifier_ids(tokenization), load_file(self.path / "rows.safetensors"))
        return model
