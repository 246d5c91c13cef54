"""`genrec bench startup`: how long commands take from a cold process, beside what they import and an empty process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from genrec.benchmarks import Report, Row, begin, conditions, figure, interleaved, median
from genrec.errors import ConfigError, GenrecError
from genrec.recommender import Recommender

_EMPTY = "python -c pass"
_MODEL = "from transformers import LlamaForCausalLM"
_LORA = f"{_MODEL}; from peft import PeftModel"


def startup(adapter: Path | None = None, *, user: str | None = None, repeats: int = 5) -> Report:
    """Seconds of whole processes, taken in turn, and their ratios to an empty one.

    Args:
        adapter: The adapter folder that recommends; unset: ``import genrec`` and ``genrec --help`` alone.
        user: Of the adapter's data set; unset: a history of one item, without a data set.
        repeats: Rounds whose medians are reported.

    Raises:
        ConfigError: A number that is too small, or a user without an adapter.
        AdapterError: The folder is no adapter.
        GenrecError: A command failed.
    """
    begin("startup", repeats=repeats)
    if user is not None and adapter is None:
        raise ConfigError("bench startup: --user goes with an adapter. Name its folder.")
    commands: dict[str, list[str]] = {
        _EMPTY: ["-c", "pass"],
        "import genrec": ["-c", "import genrec"],
        "genrec --help": ["-m", "genrec.cli", "--help"],
    }
    most, imported = {"import genrec": 0.15, "genrec --help": 0.5, "genrec recommend": 4.0}, _MODEL
    if adapter is not None:
        loaded = Recommender.load(adapter, engine="dummy")
        imported = _MODEL if loaded.adapter.tuning == "full" else _LORA
        who = ["--user", user] if user is not None else ["--history", loaded.item_ids[0]]
        commands |= {
            "import torch": ["-c", "import torch"],
            imported: ["-c", imported],
            "genrec recommend": ["-m", "genrec.cli", "recommend", str(adapter), *who],
        }
    taken = interleaved({name: partial(_process, command) for name, command in commands.items()}, repeats)
    seconds = {name: median(times) for name, times in taken.items()}
    rows: list[Row] = []
    for name, times in taken.items():
        rows.append(figure("process", "cold", name, seconds[name], "s", most=most.get(name), samples=[times]))
        if name != _EMPTY:
            ratio, both = seconds[name] / seconds[_EMPTY], [times, taken[_EMPTY]]
            rows.append(figure("process", "cold", f"{name} / {_EMPTY}", ratio, "x", samples=both))
    if adapter is not None:
        ratio, both = seconds["genrec recommend"] / seconds[imported], [taken["genrec recommend"], taken[imported]]
        rows.append(figure("process", "cold", "genrec recommend / what it imports", ratio, "x", samples=both))
    return Report(conditions(adapter=None if adapter is None else Path(adapter).name), rows, name="startup")


def _process(arguments: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise GenrecError(f"python {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
