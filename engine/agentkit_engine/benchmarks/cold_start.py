"""Time and peak memory from a folder of weights to the first token, in a fresh process.

Run as `python -m agentkit_engine.benchmarks.cold_start {engine,transformers} FOLDER STARTED`; prints a `ColdStart` as
JSON. Imports are done before the clock of `first_s` starts, and their memory is not counted. Needs Linux (/proc/self).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from agentkit_engine.benchmarks.errors import BenchmarkError
from agentkit_engine.benchmarks.peers import Transformers, import_transformers
from agentkit_engine.engine import Engine
from agentkit_engine.runtime.runner import choose_backend
from agentkit_engine.sampler import SampledToken
from agentkit_engine.sampling_params import SamplingParams

Side = Literal["engine", "transformers"]
PROMPT = list(range(2, 18))


@dataclass(frozen=True, slots=True)
class ColdStart:
    """Measurements of one process.

    Attributes:
        process_s: Seconds from the start of the process to the first token, imports included.
        first_s: Seconds from opening the folder to the first token.
        warm_s: Seconds for the same token again, from a new session on the loaded model.
        peak_bytes: Peak resident memory during that time, minus resident memory before it.
        token: The first token.
    """

    process_s: float
    first_s: float
    warm_s: float
    peak_bytes: int
    token: SampledToken


def run(side: Side, folder: Path) -> ColdStart:
    """Measure in a new process.

    Raises:
        BenchmarkError: the process failed; the message ends with its last output.
    """
    command = [sys.executable, "-m", __name__, side, str(folder), str(time.time())]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise BenchmarkError(f"{' '.join(command)} exited {process.returncode}: {process.stderr[-2000:]}")
    fields = json.loads(process.stdout.splitlines()[-1])
    return ColdStart(**fields | {"token": SampledToken(**fields["token"])})


def measure(side: Side, folder: Path, started: float) -> ColdStart:
    """Measure in this process, which must be fresh; `started` is its start in seconds since the epoch."""
    if side == "transformers":
        import_transformers()
    else:
        choose_backend("auto", torch.device("cpu"))  # imports the kernels
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident_bytes("VmRSS")
    start = time.perf_counter()
    first_token = _open_engine(folder) if side == "engine" else _open_transformers(folder)
    token = first_token()
    opened, process_s = time.perf_counter(), time.time() - started
    peak_bytes = _resident_bytes("VmHWM") - before
    warm = time.perf_counter()
    first_token()
    return ColdStart(process_s, opened - start, time.perf_counter() - warm, peak_bytes, token)


def _open_engine(folder: Path) -> Callable[[], SampledToken]:
    engine = Engine.load(folder)

    def first_token() -> SampledToken:
        with engine.session() as session:
            session.append(PROMPT)
            return next(session.generate(SamplingParams(temperature=0)))

    return first_token


def _open_transformers(folder: Path) -> Callable[[], SampledToken]:
    peer = Transformers(folder)

    def first_token() -> SampledToken:
        logprobs_V = peer.prefill(PROMPT, peer.new_cache()).log_softmax(-1)
        token_id = int(torch.argmax(logprobs_V))
        return SampledToken(token_id, float(logprobs_V[token_id]))

    return first_token


def _resident_bytes(field: Literal["VmRSS", "VmHWM"]) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    side: Side = "engine" if sys.argv[1] == "engine" else "transformers"
    print(json.dumps(asdict(measure(side, Path(sys.argv[2]), float(sys.argv[3])))))
