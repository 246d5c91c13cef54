"""Progress bars with a remaining time, on standard error, so that standard output stays for results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

quiet = False  # `--quiet` on the command line sets this.


@contextmanager
def bar(description: str, total: float) -> Iterator[Callable[..., None]]:
    """A bar over ``total`` steps. Yields ``advance(steps=1, note="")``. Silent when ``quiet``.

    Where standard error is no terminal, a line every 15 seconds stands in the place of the bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    disable = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        task = progress.add_task(description, total=total, note="")
        done, told = 0.0, time.monotonic()
        begun: tuple[float, float] | None = None  # Steps and time once the first was done, which may have waited.

        def advance(steps: float = 1, note: str = "") -> None:
            nonlocal done, told, begun
            done += steps
            progress.update(task, advance=steps, note=note)
            now = time.monotonic()
            if not console.is_terminal and now - told >= 15:
                told = now
                left: timedelta | str = "some time"
                if begun is not None and done > begun[0]:
                    rate = (told - begun[1]) / (done - begun[0])
                    left = timedelta(seconds=round(rate * max(total - done, 0)))
                say(f"{description}: {done:.0f} of {total:.0f}, {left} left {note}".rstrip())
            if begun is None and done:
                begun = done, now

        yield advance


def say(message: str) -> None:
    """One line on standard error, unless ``quiet``."""
    if not quiet:
        from rich.console import Console

        Console(stderr=True, highlight=False).print(message, markup=False, soft_wrap=True)
