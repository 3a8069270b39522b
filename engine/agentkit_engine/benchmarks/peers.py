"""Peer libraries in the same process, on the same weights: both sides read one folder in the official layout.

Dimension key: B batch, T tokens, R compared rows, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agentkit_engine.benchmarks.errors import OutputsDifferError, PeerMissingError
from agentkit_engine.benchmarks.timing import seconds, threads
from agentkit_engine.chat import Tokenizer
from agentkit_engine.sampler import SampledToken
from agentkit_engine.spec import ModelSpec

TYPICAL_TOLERANCE = 1e-4
"""Maximum difference between the two sides' log-probabilities in the median row; float32 sums in another order differ
by less."""
RARE_TOLERANCE, RARE = 2e-2, 0.02
"""Maximum difference in all rows except this share. In a long sequence some index scores tie to the last bit; if the
two sides then choose different entries, the rows that read them move a little."""
WORST_TOLERANCE = 0.5
"""Maximum difference in any row."""


def random_ids(spec: ModelSpec, count: int, seed: int = 1) -> list[int]:
    """Return `count` token ids."""
    return torch.randint(spec.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def long_text(tokens: int, tokenizer: Tokenizer) -> str:
    """Return a text of about `tokens` tokens in which no two lines are alike."""
    lines: list[str] = []
    while tokens > 0:
        lines.append(f"Rule {len(lines)}: what is told about case {7919 * len(lines) % 9973} holds for this one too.\n")
        tokens -= len(tokenizer.encode_text(lines[-1]))
    return "".join(lines)


def import_transformers() -> Any:
    """Import a transformers that has DeepSeek-V4, with its logging silenced.

    Raises:
        PeerMissingError: it is not installed, or too old.
    """
    try:
        import transformers
        from transformers import DeepseekV4ForCausalLM  # noqa: F401
    except ImportError as exc:
        raise PeerMissingError(
            "these benchmarks compare with transformers' DeepSeek-V4 and found none; "
            "install it: pip install transformers==5.23.0"
        ) from exc
    library: Any = transformers
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


class Transformers:
    """transformers' DeepSeek-V4 in float32 with its own cache.

    Attributes:
        prefill_experts: The expert implementation that `prefill` uses.
        decode_experts: The expert implementation that `decode` uses.
        chunk: Tokens per forward in `prefill`.
    """

    def __init__(self, folder: Path) -> None:
        self._library = import_transformers()
        self._model, loading = self._library.DeepseekV4ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not loading["missing_keys"], f"transformers found no weights for {loading['missing_keys']}"
        self._model.eval()
        self.prefill_experts = self.decode_experts = "grouped_mm"
        self.chunk = 2048

    def __str__(self) -> str:
        return f"transformers {self._library.__version__}"

    def new_cache(self) -> Any:
        """Return an empty cache, for one sequence or several of the same length."""
        return self._library.DynamicCache(config=self._model.config)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Return float32 [T, V] from one forward without a cache."""
        logits_BTV: Tensor = self._model(torch.tensor([token_ids]), use_cache=False).logits
        return logits_BTV[0]

    @torch.inference_mode()
    def prefill(self, token_ids: Sequence[int], cache: Any) -> Tensor:
        """Append all ids to the cache, in chunks, and return the logits after the last one, float32 [V]."""
        self._model.set_experts_implementation(self.prefill_experts)
        for start in range(0, len(token_ids), self.chunk):
            logits_V = self._step(token_ids[start : start + self.chunk], cache)
        return logits_V

    @torch.inference_mode()
    def decode(self, token_ids: Sequence[int], cache: Any) -> list[Tensor]:
        """Run a forward and a greedy choice per id, as if these ids were being generated."""
        self._model.set_experts_implementation(self.decode_experts)
        logits = []
        for token_id in token_ids:
            logits.append(self._step([token_id], cache))
            int(logits[-1].argmax())
        return logits

    @torch.inference_mode()
    def prefill_together(self, ids_BT: Sequence[Sequence[int]], cache: Any) -> Tensor:
        """Run `prefill` for B sequences of the same length: float32 [B, V]."""
        self._model.set_experts_implementation(self.prefill_experts)
        for start in range(0, len(ids_BT[0]), self.chunk):
            logits_BV = self._forward([ids[start : start + self.chunk] for ids in ids_BT], cache)
        return logits_BV

    @torch.inference_mode()
    def decode_together(self, ids_TB: Sequence[Sequence[int]], cache: Any) -> list[Tensor]:
        """Run `decode` for B sequences over T steps; each result is [B, V]."""
        self._model.set_experts_implementation(self.decode_experts)
        logits = []
        for ids_B in ids_TB:
            logits.append(self._forward([[token_id] for token_id in ids_B], cache))
            logits[-1].argmax(-1).tolist()
        return logits

    def _step(self, token_ids: Sequence[int], cache: Any) -> Tensor:
        return self._forward([token_ids], cache)[0]

    def _forward(self, ids_BT: Sequence[Sequence[int]], cache: Any) -> Tensor:
        output = self._model(torch.tensor(ids_BT), past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits_BTV: Tensor = output.logits
        return logits_BTV[:, -1]

    def tune_prefill(self, token_ids: Sequence[int]) -> None:
        """Set `prefill_experts` to the implementation that takes the least CPU time for these ids.

        `batched_mm` is not tried: it copies the weights of every token's experts, gigabytes per chunk.
        """
        taken: dict[tuple[str, int], float] = {}
        for setting in itertools.product(("eager", "grouped_mm"), (512, 2048)):
            self.prefill_experts, self.chunk = setting
            taken[setting] = self._fastest(lambda: self.prefill(token_ids, self.new_cache()))
        self.prefill_experts, self.chunk = min(taken, key=taken.__getitem__)

    def tune_decode(self, token_ids: Sequence[int], *, together: int = 1) -> None:
        """Set `decode_experts` to the one that takes the least CPU time for these ids in `together` sequences."""
        count = len(token_ids)
        ids_TB = [[token_ids[(at + row) % count] for row in range(together)] for at in range(count)]
        taken: dict[str, float] = {}
        for experts in ("eager", "grouped_mm", "batched_mm"):
            self.decode_experts = experts
            taken[experts] = self._fastest(lambda: self.decode_together(ids_TB, self.new_cache()))
        self.decode_experts = min(taken, key=taken.__getitem__)

    def _fastest(self, work: Callable[[], object]) -> float:
        with threads(1):
            return min(seconds("CPU-s", work) for _ in range(2))


def compare_tokens(ours: Sequence[SampledToken], theirs: Sequence[Tensor]) -> str:
    """Check greedy tokens against the peer's logits [V] at the same positions, and describe the difference.

    The peer must give each token the same log-probability as the engine, and no other token a higher one.

    Raises:
        OutputsDifferError: they differ by more than rounding explains.
    """
    logprobs_RV = torch.stack(list(theirs)).log_softmax(-1)
    ids_R1 = torch.tensor([token.id for token in ours]).unsqueeze(1)
    own_R = logprobs_RV.gather(1, ids_R1).squeeze(1)
    away_R = (torch.tensor([token.logprob for token in ours]) - own_R).abs()
    behind_R = logprobs_RV.amax(-1) - own_R
    away_R = torch.maximum(away_R, behind_R)
    typical, rare, worst = float(away_R.median()), float(away_R.quantile(1 - RARE)), float(away_R.max())
    found = (
        f"log-probabilities of {len(ours)} tokens: median difference {typical:.1e}, {1 - RARE:.0%} within {rare:.1e}, "
        f"largest {worst:.1e}"
    )
    if typical > TYPICAL_TOLERANCE or rare > RARE_TOLERANCE or worst > WORST_TOLERANCE:
        raise OutputsDifferError(
            f"{found}; expected at most {TYPICAL_TOLERANCE:.0e}, {RARE_TOLERANCE:.0e} and {WORST_TOLERANCE:.0e}: one "
            "side is wrong, so nothing was timed; tests/engine/test_parity.py narrows it down"
        )
    return found
