"""Micro-batches: which sequences go through a model together, by their length and by the memory at hand.

Nothing here changes a result. What does not fit the memory after all is split and done again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from genrec.decoding import Ints
from genrec.errors import DecodingError

_CGROUP, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# A container's limit, what it uses, and the part of it that is pages of files, which the kernel gives back: for
# cgroup 2, and for cgroup 1, whose folders lie below one for each controller.
_NAMES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
_UNKNOWN = 4 * 2**30  # Where a system does not tell.


def memory_at_hand(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``: free ones of CUDA and of its allocator, available ones of the
    machine or its container."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return max(min([_available(), *_containers()]), 0)


def _containers() -> Iterator[int]:
    """What the cgroups of this process leave, its own one and those around it."""
    try:
        lines = [line.split(":", 2) for line in _OWN_CGROUP.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in lines:
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind not in _NAMES:
            continue
        limit, used, files = _NAMES[kind]
        own = Path(path.lstrip("/"))
        for folder in (_CGROUP / kind / part for part in (own, *own.parents)):
            try:
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield left + int(stat.get(files, 0))
            except (OSError, ValueError):  # No such file, or "max".
                continue


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return _UNKNOWN


class OutOfMemory(DecodingError, MemoryError):
    """The memory refuses a single sequence. Within a larger batch it is split like any that is refused."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed; the CPU's allocator and cuBLAS say it in words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def micro_batches(
    lengths: NDArray[np.int64],
    max_tokens: int,
    sizes: NDArray[np.int64] | None = None,
    max_bytes: int = 0,
    equal: bool = False,
) -> Iterator[Ints]:
    """Indices in batches, longest first, each at least one.

    Args:
        lengths: Positions of each sequence. A batch holds at most ``max_tokens`` of them, padding included.
        sizes: Bytes that each sequence takes, growing with its length; a batch takes at most ``max_bytes``.
        equal: Only sequences of one length share a batch.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        count = max_tokens // int(longest)
        if sizes is not None:
            count = min(count, max_bytes // int(sizes[order[start]]))
        stop = min(start + max(1, count), len(order))
        if equal:
            stop = min(stop, int(np.searchsorted(-lengths[order], -longest, side="right")))
        yield order[start:stop]
        start = stop


def run(batches: Iterable[Ints], lengths: NDArray[np.int64], work: Callable[[Ints], None]) -> None:
    """Do ``work`` on every batch. One that the memory refuses is split in two, and so are those after it that have as
    many positions.

    Raises:
        OutOfMemory: The memory refuses a single sequence.
    """
    waiting, most = deque(batches), np.inf
    while waiting:
        batch = waiting.popleft()
        positions = len(batch) * int(lengths[batch].max())
        if positions <= most or len(batch) == 1:
            try:
                work(batch)
                continue
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise OutOfMemory(
                        f"prompt {batch[0]}: out of memory, though it is alone in its batch. Use fewer beams, "
                        "a shorter prompt, or a smaller model or dtype."
                    ) from error
            # Here, outside of the handler, the failed batch's tensors are free.
            most = (len(batch) + 1) // 2 * (positions // len(batch))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        half = (len(batch) + 1) // 2
        waiting.extendleft([batch[half:], batch[:half]])
