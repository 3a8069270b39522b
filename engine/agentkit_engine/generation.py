"""The generation loop: the next id of a sequence, for `Session` and `AsyncEngine` alike.

An id is forced by a grammar, or sampled from the logits after the ids before it, and appended to the sequence. A
generation ends with a stop id, after `max_tokens` sampled ids, or at the end of the context. Stop texts need the text
of the ids, so the consumer of the tokens looks for them (`reading.py`).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from agentkit_engine.runtime import Request, Scheduler
from agentkit_engine.sampler import Draw, SampledToken, sample
from agentkit_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from agentkit_engine.grammar import Grammar

G = TypeVar("G", bound="Generation")
TokenOrError = SampledToken | BaseException | None


class Generation:
    """One `generate` call.

    Attributes:
        left: number of ids that may still be sampled; 0 after a stop id. If it is 0 from the start, the generation only
            computes the pending ids, and its outcome is None.
        ended: no id may follow, or an error ended the generation.
    """

    def __init__(
        self,
        request: Request,
        params: SamplingParams,
        grammar: Grammar | None = None,
        *,
        seed: int | None = None,
        left: float | None = None,
    ) -> None:
        """By default `left` is `max_tokens`, and `seed` that of `params`, or one from the operating system.

        Raises:
            ValueError: `params` request a grammar, and `grammar` is None.
        """
        if grammar is None and (params.grammar is True or params.output_schema is not None):
            raise ValueError(
                "grammar=True and output_schema work only in agents, which have tools; pass a grammar to the session, "
                "for example generate(params, grammar=engine.grammars.calls(tools))"
            )
        self.request, self.params = request, params
        seed = params.seed if seed is None else seed
        self.seed = secrets.randbits(63) if seed is None else seed
        self.left = left if left is not None else params.max_tokens or math.inf
        self.matcher = None if grammar is None else grammar.matcher()
        self.ended = False

    def forced(self) -> SampledToken | None:
        """Return the token that the grammar forces next, if it does.

        Raises:
            GrammarError: the ids do not fit the grammar.
        """
        if self.matcher is None:
            return None
        self.matcher.follow(self.request.ids)
        token_id = self.matcher.forced()
        return None if token_id is None else SampledToken(token_id, math.nan, forced=True)

    def draw(self, *, packed: bool) -> Draw:
        """Return how to sample the next token, with a mask for a `DeviceSampler` if `packed`."""
        mask_V = None if self.matcher is None or packed else self.matcher.mask()
        bitmask = None if self.matcher is None or not packed else self.matcher.bitmask()
        return Draw(self.params, self.seed, self.request.length, self.request.past, mask_V, bitmask)

    def take(self, outcome: TokenOrError, scheduler: Scheduler) -> TokenOrError:
        """Append a token to the sequence, or end the generation with an error or None; return it."""
        if not isinstance(outcome, SampledToken):
            self.ended = True
            if outcome is not None:
                scheduler.preempt(self.request)  # so that no cache keeps what it computed
            return outcome
        self.request.push(outcome.id, forced=outcome.forced)
        self.left = 0 if outcome.id in self.params.stop_token_ids else self.left - (not outcome.forced)
        self.ended = not self.left or self.request.length == scheduler.pools.spec.max_position_embeddings
        return outcome


def next_tokens(generations: Sequence[G], scheduler: Scheduler) -> list[tuple[G, TokenOrError]]:
    """Append one id to each generation that needs no forward for it, and return what became of these generations.

    A generation needs a forward if its grammar forces no id and there are no logits after its last one. An error ends
    its own generation only.
    """
    on_device = scheduler.runner.sampler
    outcomes: list[tuple[G, TokenOrError]] = []
    sampling: list[tuple[G, Tensor, Draw]] = []
    for generation in generations:
        if generation.ended:
            continue
        outcome: TokenOrError
        try:
            outcome, logits_V = generation.forced(), generation.request.logits_V
            if outcome is None and (logits_V is None or generation.left):
                if logits_V is not None:
                    sampling.append((generation, logits_V, generation.draw(packed=on_device is not None)))
                continue
        except Exception as error:
            outcome = error
        outcomes.append((generation, generation.take(outcome, scheduler)))
    if sampling:
        sampled, logits, draws = zip(*sampling, strict=True)
        tokens = sample(torch.stack(logits) if len(logits) > 1 else logits[0][None], draws, on_device)
        outcomes += [(each, each.take(token, scheduler)) for each, token in zip(sampled, tokens, strict=True)]
    return outcomes
