"""Loading a packed checkpoint takes little more memory than it keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agentkit_engine.benchmarks.peers import tiny_v4
from agentkit_engine.benchmarks.random_checkpoint import flash, write_random_checkpoint

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Makes glibc return buffers when they are freed, as it otherwise does only for larger ones, so they do not add up."""
LOAD = """
import json, resource, sys
from agentkit_engine import Engine

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

Engine.load(sys.argv[1])  # imports everything, and compiles what lays weights out
before = peak()
engine = Engine.load(sys.argv[2])
taken = peak() - before
packed, plain = engine.decoder.packed.values(), engine.decoder.state_dict().values()
print(json.dumps([taken, sum(rows.nbytes for rows in packed) + sum(tensor.nbytes for tensor in plain)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_the_peak_is_at_most_a_twentieth_above_the_weights(tmp_path: Path) -> None:
    spec = replace(flash(4, n_routed_experts=6), vocab_size=1024)
    small = write_random_checkpoint(tmp_path / "small", tiny_v4())
    large = write_random_checkpoint(tmp_path / "large", spec)
    assert small < 20e6 and 200e6 < large < 400e6
    command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large")]
    process = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | ALLOCATOR)
    taken, weights = json.loads(process.stdout.splitlines()[-1])
    print(f"{taken / 1e6:.0f} MB at the peak for {weights / 1e6:.0f} MB of weights: {taken / weights:.3f}")
    assert 0.95 * large < weights < 1.05 * large
    assert 0.9 < taken / weights <= 1.05
