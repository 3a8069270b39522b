"""Garbage collection around imports and loading."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from agentkit_engine.garbage import collection_paused


def test_objects_made_during_a_pause_are_old_and_can_still_be_collected() -> None:
    class Node:
        pass

    with collection_paused():
        assert not gc.isenabled()
        node = Node()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert any(each is node for each in gc.get_objects(generation=2))


def test_objects_that_the_program_froze_stay_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with collection_paused():
            pass
        assert gc.get_freeze_count() == pytest.approx(frozen, rel=0.01)
    finally:
        gc.unfreeze()


def test_the_heap_is_not_searched_while_torch_is_imported_and_a_model_loaded() -> None:
    program = """
import gc
full = []
gc.callbacks.append(lambda phase, info: full.append(info) if info["generation"] == 2 else None)
from agentkit_engine import Engine
Engine.load("tiny")
assert gc.isenabled()
gc.callbacks.clear()
print(len(full))
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout == "0\n"


def test_handlers_at_exit_run_after_loading_a_model() -> None:
    program = """
import atexit, weakref
class Node: pass
node = Node()
atexit.register(print, "handler")
weakref.finalize(node, print, "finalizer")
from agentkit_engine import Engine
Engine.load("tiny")
Engine.load("tiny")
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (said.stdout, said.stderr) == ("finalizer\nhandler\n", "")
