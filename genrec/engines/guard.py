"""No engine process outlives the process that started it, however that ends.

vLLM's workers import this module before they load a model (``worker_extension_cls``). The workers of other programs may
import it too: without the variable below nothing happens.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress

OWNER = "GENREC_ENGINE_OWNER"
"""The variable that tells an engine's processes their owner: its process id, and when it started the engine."""


class Guard:
    """What vLLM adds to its worker class; it has nothing to add."""


def _watch(owner: int, started: float) -> None:
    """Wait until ``owner`` is gone, then end this worker, and the process of the engine that has it as its child."""
    import psutil

    own = psutil.Process()
    engine = own if own.ppid() == owner else own.parent() or own
    with suppress(psutil.NoSuchProcess):
        while engine.ppid() == owner:  # An orphan gets another parent at once.
            time.sleep(0.5)
    for process in (engine, own):
        with suppress(psutil.NoSuchProcess):
            if process.create_time() >= started - 1:  # Older is whoever adopts orphans.
                process.kill()


if _told := os.environ.get(OWNER):
    _owner, _started = _told.split()
    threading.Thread(target=_watch, args=(int(_owner), float(_started)), daemon=True, name="genrec-guard").start()
