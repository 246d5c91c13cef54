"""`genrec bench`: what decoding and tries cost on this machine, beside their peers and their limits.

Both sides of every comparison run in one process, in turn, and medians are compared. Lists and scores of both sides
are compared too: a peer that is faster and answers something else is none.
"""

from __future__ import annotations

import io
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from genrec import files, progress
from genrec.errors import ConfigError, suggestion

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu`` is the processor time of this process, for a machine that does other things too."""


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        part: Of the benchmark.
        setting: Under which conditions.
        what: Was measured.
        value, unit: The median, or the ratio of two medians.
        goal: What it should be, as text; empty where it is told only.
        met: Whether the goal is met, where there is one.
        n: How many times it was measured, on each side of a ratio; empty where no time was taken.
    """

    part: str
    setting: str
    what: str
    value: float
    unit: str
    goal: str = ""
    met: bool | None = None
    n: str = ""


@dataclass(frozen=True)
class Report:
    """What a benchmark found, and the machine, versions and options that it found it with."""

    conditions: dict[str, Any]
    rows: list[Row]
    name: str = ""

    def save(self, folder: Path, name: str) -> list[Path]:
        """Write ``NAME.json`` and the picture ``NAME.png``; gives both paths."""
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / f"{name}.json", folder / f"{name}.png"]
        files.write_text(written[0], json.dumps(asdict(self), indent=1) + "\n")
        with files.new_file(written[1]) as temporary:
            temporary.write_bytes(picture(self.rows, self.note))
        return written

    @property
    def note(self) -> str:
        return "quick settings: the times mean nothing" if self.conditions.get("quick") else ""

    def told(self) -> str:
        """The conditions as text, but for the versions."""
        told = [f"{key} {value}" for key, value in self.conditions.items() if key != "versions"]
        return ", ".join([*([self.note] if self.note else []), *told])

    @property
    def agrees(self) -> bool:
        """Whether both sides of all comparisons give the same items: the rows whose goal is that nothing differs.

        A difference of scores is told, met or missed; rounding alone makes one that no item shows.
        """
        return all(row.met is not False for row in self.rows if row.goal == "<= 0")

    def table(self) -> list[list[str]]:
        """The rows as text."""
        marks = {True: "met", False: "MISSED", None: ""}
        return [[r.part, r.setting, r.what, f"{r.value:,.4g}", r.unit, r.n, r.goal, marks[r.met]] for r in self.rows]


def begin(
    command: str,
    parts: Sequence[str] = (),
    known: Sequence[str] = (),
    threads: int | None = None,
    **numbers: int | None,
) -> None:
    """Refuse parts that are not ``known`` and numbers that are too small, and set the threads of PyTorch.

    Raises:
        ConfigError: As told.
    """
    if unknown := [part for part in parts if part not in known]:
        raise ConfigError(f"bench {command}: no part {unknown[0]!r}. {suggestion(unknown[0], known)}")
    for name, number in {"threads": threads, **numbers}.items():
        if number is not None and number < 1:
            raise ConfigError(f"bench {command}: {name} is {number}; it is at least 1.")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def without_goals(rows: Sequence[Row]) -> list[Row]:
    """Rows of quick settings, whose times mean nothing; what both sides answer (without a unit) must still agree."""
    return [replace(row, goal="", met=None) if row.unit else row for row in rows]


def figure(
    part: str,
    setting: str,
    what: str,
    value: float,
    unit: str,
    *,
    least: float | None = None,
    most: float | None = None,
    samples: Sequence[Sequence[float]] = (),
) -> Row:
    """A row, with its goal: at least ``least``, or at most ``most``; ``samples`` are the times behind it."""
    row = Row(part, setting, what, value, unit, n="/".join(str(len(one)) for one in samples))
    if least is not None:
        return replace(row, goal=f">= {least:g}", met=bool(value >= least))
    if most is not None:
        return replace(row, goal=f"<= {most:g}", met=bool(value <= most))
    return row


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    clock: Clock = "wall",
    patience: float = 60.0,
    warm: Mapping[str, Callable[[], Any]] | None = None,
    rest: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of every call, taken in turn so that what else the machine does falls on all sides.

    A round of ``warm`` (unless given, of the calls themselves) goes before and is not counted, for any side. A call is
    not repeated once it has taken ``patience`` seconds in all. ``rest`` seconds of quiet go before each that counts.
    """
    import torch

    read, warm = CLOCKS[clock], calls if warm is None else warm
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with progress.bar("measuring", len(warm) + repeats * len(calls)) as advance:
        for name, call in warm.items():
            call()
            advance(note=name)
        for _ in range(repeats):
            for name, call in calls.items():
                if sum(seconds[name]) <= patience:
                    time.sleep(rest)
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    began = read()
                    call()
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    seconds[name].append(read() - began)
                advance(note=name)
    return seconds


def peak(usage: Any) -> float:
    """MiB: the peak memory in what ``resource.getrusage`` or ``os.wait4`` told."""
    scale = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes.
    return float(usage.ru_maxrss * scale / 2**20)


def median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


def catalogue(items: int, levels: int, codes: int, first: int, seed: int = 0) -> NDArray[np.int64]:
    """int64 [items, levels]: distinct random identifiers; the codes of each level are tokens from ``first`` on."""
    import numpy as np

    rng = np.random.default_rng(seed)
    if items > codes**levels:
        raise ConfigError(f"{items} items need more than {levels} levels of {codes} codes.")
    chosen = rng.choice(codes**levels, size=items, replace=False)
    digits = chosen[:, None] // codes ** np.arange(levels)[::-1] % codes
    return first + codes * np.arange(levels) + digits


def conditions(**given: Any) -> dict[str, Any]:
    """The machine, the versions and the options of a run."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: metadata.version(name) for name in ("genrec", "torch", "transformers", "numpy")}
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    found = {"processor": platform.processor() or platform.machine(), "cores": cores, "gpu": gpu, "versions": versions}
    return {**found, "threads": torch.get_num_threads(), **given}


def picture(rows: Sequence[Row], title: str = "") -> bytes:
    """A PNG with the figures of every part and unit as bars, but for the profile and rows without a unit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.unit and row.part != "profile":
            groups.setdefault((row.part, row.unit), []).append(row)
    heights = [0.8 + 0.3 * len(group) for group in groups.values()] or [1.0]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, ((part, unit), group) in zip(axes, groups.items(), strict=False):
        colours = ["#2a7f62" if row.met is not False else "#b04a3a" for row in group]
        bars = axis.barh([f"{row.what}\n{row.setting}" for row in group], [row.value for row in group], color=colours)
        axis.bar_label(
            bars, labels=[f"{row.value:.3g} {row.goal and f'(goal {row.goal})'}" for row in group], padding=3
        )
        axis.set_title(f"{part}, {unit}", loc="left", fontsize=9)
        axis.tick_params(labelsize=6)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110, metadata={"Software": None})
    return target.getvalue()
