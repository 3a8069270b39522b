"""Loading a packed checkpoint takes little more memory than it keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agentkit_engine.benchmarks.random_checkpoint import flash, tiny_v4, write_random_checkpoint

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Makes glibc return buffers when they are freed, as it otherwise does only for larger ones, so they do not add up."""
LOAD = """
import json, sys
from pathlib import Path
from agentkit_engine import Engine

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

Engine.load(sys.argv[1])  # imports everything, and compiles what lays weights out
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
before = status("VmRSS")
engine = Engine.load(sys.argv[2])
peak, resident = status("VmHWM") - before, status("VmRSS") - before
packed, plain = engine.decoder.packed.values(), engine.decoder.state_dict().values()
print(json.dumps([peak, resident, sum(rows.nbytes for rows in packed) + sum(tensor.nbytes for tensor in plain)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_the_peak_is_at_most_a_twentieth_above_what_stays(tmp_path: Path) -> None:
    spec = replace(flash(4, n_routed_experts=6), vocab_size=1024)
    small = write_random_checkpoint(tmp_path / "small", tiny_v4())
    large = write_random_checkpoint(tmp_path / "large", spec)
    assert small < 20e6 and 200e6 < large < 400e6
    command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large")]
    process = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | ALLOCATOR)
    peak, resident, weights = json.loads(process.stdout.splitlines()[-1])
    print(f"{peak / 1e6:.0f} MB at the peak, {resident / 1e6:.0f} MB resident, {weights / 1e6:.0f} MB of weights")
    assert 0.95 * large < weights < 1.05 * large
    assert peak <= 1.05 * resident
    assert 0.8 * weights < resident <= 1.1 * weights  # the weights and no second copy of them
