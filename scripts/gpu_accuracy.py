"""A pretrained language model beside the small base made here, on one GPU, in stages: `make gpu-accuracy`.

A call runs the first stage that is not done, a `genrec` command, which is printed. A stage that trains is ended after
eight minutes; whatever ends it, the next call goes on from its last checkpoint. Other stages begin anew when they were
cut short, so nothing here ends them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT = 480  # Seconds of a stage that goes on.


@dataclass(frozen=True)
class Stage:
    """One command of genrec.

    Attributes:
        what: It does, in words.
        made: The file that is there once it is done; never in part, for genrec writes whole folders.
        command: Its arguments.
        minutes: On one H100, computed and not measured: see docs/benchmarks.md.
        goes_on: Cut short, the next call goes on with it.
    """

    what: str
    made: Path
    command: list[str]
    minutes: float
    goes_on: bool = False


def stages(data: str, base: str, device: str, changes: Sequence[str]) -> list[Stage]:
    """All stages, in their order.

    Args:
        data: A data set folder.
        base: The pretrained one, as a recipe names it.
        device: Of the evaluation, as PyTorch names it. Training takes the GPU where there is one.
        changes: ``key=value`` changes to the recipes.
    """

    def training(what: str, name: str, minutes: float, *own: str) -> Stage:
        command = ["train", f"adapters/{name}.toml", "--resume", f"data={data}", *own, *changes]
        return Stage(what, Path(f"adapters/{name}/genrec.json"), command, minutes, goes_on=True)

    small = Path("adapters/default-random")
    model = [f"base={base}", *(["training.bf16=true"] if device.startswith("cuda") else [])]
    return [
        Stage(
            "make a small base", small / "config.json",
            ["base", "create", data, "--out", str(small), "--width", "128", "--heads", "4"], 0.2,
        ),
        training("train the small base", "default", 4),
        training(f"train {base} with LoRA", "smollm2", 4, *model),
        training(f"train all of {base}", "smollm2-full", 5, *model),
        Stage(
            "evaluate", Path("eval/results/smollm2.json"),
            ["eval", "eval/smollm2.toml", f"data={data}", "--device", device], 4,
        ),
    ]  # fmt: skip


def main() -> None:
    """Say what is done and what is left, and become the command of the next stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="a data set folder, such as data/beauty")
    parser.add_argument("changes", nargs="*", help="changes to the recipes: key=value; the same in every call")
    parser.add_argument("--base", default="smollm2", help="the pretrained base, by name or folder")
    parser.add_argument("--device", default="cuda", help="cpu: to try it; nothing is computed in bfloat16 then")
    parser.add_argument("--dry-run", action="store_true", help="say what is left, and run nothing")
    given = parser.parse_intermixed_args()  # Changes may stand behind options.

    left = []
    for stage in stages(given.data, given.base, given.device, given.changes):
        if stage.made.exists():
            print(f"done: {stage.what} ({stage.made})")
        else:
            left.append(stage)
    for number, stage in enumerate(left):
        print(f"{'later' if number else 'next'}: {stage.what}, {stage.minutes:g} minutes or so on one H100")
        if given.dry_run or not number:
            print(f"      genrec {shlex.join(stage.command)}")
    if not left:
        print(Path("eval/results/smollm2.md").read_text(encoding="utf-8"))
        print("all stages are done. To begin again, remove what they made.")
    elif not given.dry_run:
        after = sum(stage.minutes for stage in left[1:])
        print(
            f"left after it: {after:g} minutes or so. Run this again until it says that all stages are done.",
            flush=True,
        )
        # The alarm stays when the process becomes another, which so has no parent that could die and leave it running.
        signal.alarm(LIMIT if left[0].goes_on else 0)
        os.execv(sys.executable, [sys.executable, "-m", "genrec.cli", *left[0].command])


if __name__ == "__main__":
    main()
