"""Decoding steps replayed from a recording, against the same steps launched from Python: bit for bit.

A recording keeps what a CUDA graph keeps: every launch with its grid, its arguments and their addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from agentkit_engine import Engine
from agentkit_engine.model.decoder import Decoder
from agentkit_engine.model.forward import Computed
from agentkit_engine.runtime.runner import Runner, plan_of
from agentkit_engine.runtime.scheduled import ScheduledTokens
from agentkit_engine.runtime.state import KVCacheDtype, Pools
from agentkit_engine.runtime.state import Sequence as State
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.weights.export import export_checkpoint

MakeDecoder = Callable[..., Decoder]


class Recording(TorchDispatchMode):
    """Repeats launches and torch's operations, which write to the tensors to which they wrote when they were recorded.

    Attributes:
        rows: Rows of each forward that was recorded.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: list[int] = []
        self.replays = 0
        self._steps: list[Callable[[], None]] = []

    def __call__(self, function: Callable[[], Computed]) -> tuple[Callable[[], None], Computed]:
        self._steps = steps = []
        call = GridExecutor.__call__

        def launch(executor: Any, *args: Any, **options: Any) -> None:
            steps.append(lambda: call(executor, *args, **options))
            with _disable_current_modes():
                call(executor, *args, **options)

        def replay() -> None:
            self.replays += 1
            for step in steps:
                step()  # type: ignore[no-untyped-call]

        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(GridExecutor, "__call__", launch)
            computed = function()
        self.rows.append(len(computed.logits))
        return replay, computed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {_address(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]

        def again() -> None:
            fresh = [each for each in tree_leaves(func(*args, **(kwargs or {}))) if isinstance(each, Tensor)]
            for old, new in zip(outputs, fresh, strict=True):
                if _address(old) not in inputs:  # not a view, nor written in place
                    old.copy_(new)

        self._steps.append(again)
        return result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Served:
    """A small model whose state is random, as if sequences of any length had been computed."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        least_spans: int,
        buckets: Sequence[int] = (1, 2, 4),
        kv_cache_dtype: KVCacheDtype = "auto",
    ) -> None:
        self.recording, self.generator = Recording(), torch.Generator().manual_seed(0)
        self.pools = Pools(decoder.spec, slots=6, spans=12, device=torch.device("cpu"), kv_cache_dtype=kv_cache_dtype)
        self.runner = Runner(decoder, self.pools, backend="triton")
        assert self.runner.graphs is None  # a CPU has none
        self.graphs = self.runner.capture_with(self.recording, buckets=buckets, least_spans=least_spans)

    def open(self, length: int) -> State:
        sequence = self.pools.open()
        self.pools.reserve(sequence, length + 8)
        sequence.length = sequence.written = length
        for tail in self.pools.tails:
            tail[sequence.slot] = self.random(tail[0])
        for entries in self.pools.entries:
            for span in sequence.spans:
                entries[span] = self.random(entries[0])
        return sequence

    def random(self, like: Tensor) -> Tensor:
        """Return random values; bytes that are finite as codes, scales and bfloat16."""
        if like.dtype == torch.uint8:
            return torch.randint(0x30, 0x48, like.shape, generator=self.generator, dtype=torch.uint8)
        return torch.randn(like.shape, generator=self.generator)

    def at(self, sequence: State, length: int) -> None:
        """Move a sequence to another length, within the spans that it has."""
        sequence.length = sequence.written = length

    def step(self, *parts: ScheduledTokens) -> Tensor:
        """Compute a step from Python and from a recording, and compare all results and the state of all sequences."""
        before = [pool.clone() for pool in (*self.pools.tails, *self.pools.entries)]
        eager = self.runner.step(parts)
        after = [pool.clone() for pool in (*self.pools.tails, *self.pools.entries)]
        for pool, rows in zip((*self.pools.tails, *self.pools.entries), before, strict=True):
            pool.copy_(rows)
        for part in parts:
            part.sequence.length -= len(part.ids)
        replays, self.runner.graphs = self.recording.replays, self.graphs
        replayed = self.runner.step(parts)
        self.runner.graphs = None
        assert self.recording.replays == replays + 1
        assert torch.equal(replayed.logits_RV, eager.logits_RV)
        assert torch.equal(replayed.streams_RMD, eager.streams_RMD)
        for pool, rows in zip((*self.pools.tails, *self.pools.entries), after, strict=True):
            assert torch.equal(pool, rows)
        return replayed.logits_RV


@pytest.fixture(scope="module")
def decoder(small_decoder: MakeDecoder) -> Decoder:
    return small_decoder(4, 128)


def test_a_graph_captured_at_the_start_serves_every_length_of_its_capacity(decoder: Decoder) -> None:
    """Positions at which entries of CSA and HCA are complete, and those after them, through one recording."""
    served = Served(decoder, least_spans=4)
    sequence = served.open(1000)
    for length in (0, 3, 127, 255, 256, 999):
        served.at(sequence, length)
        served.step(ScheduledTokens(sequence, [5]))
    assert served.recording.rows == [1]


def test_rows_in_fp8_are_stored_and_read_by_replays(small_decoder: MakeDecoder) -> None:
    served = Served(small_decoder(4, head_dim=72), least_spans=1, buckets=(2,), kv_cache_dtype="fp8")
    sequence = served.open(199)
    for length in (7, 198):
        served.at(sequence, length)
        served.step(ScheduledTokens(sequence, [5]))
    assert served.recording.rows == [2]


def test_batches_change_between_replays(decoder: Decoder) -> None:
    """Padding, an evicted sequence whose slot and spans another one takes, other orders, drafts, and longer tables."""
    served = Served(decoder, least_spans=1)
    first, second, third = served.open(3), served.open(127), served.open(200)
    three = served.step(*(ScheduledTokens(each, [7]) for each in (first, second, third)))
    kept = three.clone()
    served.step(ScheduledTokens(second, [8]))
    served.pools.close(first)
    fourth = served.open(61)
    assert (fourth.slot, fourth.spans) == (first.slot, [1])
    served.step(*(ScheduledTokens(each, [9]) for each in (third, fourth, second)))
    served.step(ScheduledTokens(fourth, [3], [4, 5]), ScheduledTokens(second, [6]))
    assert served.recording.rows == [4, 1]  # the fourth step's rows fill a graph without padding
    longer = served.open(300)
    served.step(ScheduledTokens(longer, [1]), ScheduledTokens(third, [2]), ScheduledTokens(fourth, [3]))
    served.at(third, 255)
    served.step(ScheduledTokens(third, [2]))
    assert served.recording.rows == [4, 1, 4]  # the second one for four rows has a larger capacity
    assert torch.equal(three, kept)  # later replays leave the results of earlier ones alone


def test_sequences_with_the_same_ids_have_the_same_rows(decoder: Decoder) -> None:
    served = Served(decoder, least_spans=4)
    sequence = served.open(259)
    fork = served.pools.fork(sequence)
    served.pools.reserve(fork, 260)
    alone = served.step(ScheduledTokens(sequence, [7]))
    served.at(sequence, 259)
    both = served.step(ScheduledTokens(sequence, [7]), ScheduledTokens(fork, [7]))
    assert torch.equal(both, alone.expand(2, -1))


def test_steps_that_no_graph_holds_are_launched(decoder: Decoder) -> None:
    served = Served(decoder, least_spans=1, buckets=(1, 2))
    served.runner.graphs = served.graphs
    some = [served.open(3) for _ in range(3)]
    served.runner.step([ScheduledTokens(each, [7]) for each in some])  # too many rows
    served.runner.step([ScheduledTokens(some[0], [7, 8])])  # a prompt
    assert (served.recording.rows, served.recording.replays) == ([], 0)
    sequence, outgrown = served.open(0), served.runner.capture_with(served.recording, spans=1)
    sequence.spans += [1, 2]
    assert outgrown(plan_of([ScheduledTokens(sequence, [7])], all_rows=True)[0]) is None


@pytest.mark.parametrize("buckets", [(), (0, 1), (2, 1), (1, 1)])
def test_buckets_must_increase(decoder: Decoder, buckets: Sequence[int]) -> None:
    with pytest.raises(ValueError, match="buckets of rows must increase"):
        Served(decoder, least_spans=1, buckets=buckets)


def test_generations_draft_and_continue_with_the_same_tokens(small_decoder: MakeDecoder, tmp_path: Path) -> None:
    """Greedy and drawn ids, log-probabilities, drafts of the MTP block, and a prompt that joins a decoding session."""
    export_checkpoint(small_decoder(4, mtp=True), tmp_path, format="bf16")

    def tokens(recording: Recording | None) -> list[Any]:
        engine = Engine.load(tmp_path, backend="triton")
        runner = engine.scheduler.runner
        if recording is not None:
            runner.graphs = runner.capture_with(recording)
        with engine.session() as one, engine.session() as other:
            one.append([5, 6, 7, 5, 6])
            found = list(one.generate(SamplingParams(temperature=0, max_tokens=3, top_logprobs=2)))
            other.append([9, 8])
            found += other.generate(SamplingParams(max_tokens=2, seed=1))
            return found + list(one.generate(SamplingParams(temperature=0, max_tokens=2)))

    recording = Recording()
    assert tokens(recording) == tokens(None)
    assert recording.replays > len(recording.rows) > 1
