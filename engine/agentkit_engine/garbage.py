"""Keep Python's garbage collector from searching the 400,000 objects of torch and Numba, which are never garbage."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause garbage collection while the block creates many long-lived objects; searching them once takes 0.2 s.

    Afterwards, all objects are in the oldest generation, as if the collector had found them alive.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if gc.get_freeze_count() == 0:  # otherwise the program has frozen objects, and they must stay frozen
                gc.freeze()
                gc.unfreeze()  # moves the objects to the oldest generation
            gc.enable()


def skip_collection_at_exit() -> None:
    """Make the collector ignore all objects at process exit, where its last search would take 0.7 s."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
