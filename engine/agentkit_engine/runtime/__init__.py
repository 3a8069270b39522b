"""The engine's fast path: one forward for many sequences, with their state in pools.

`model/` is the readable twin, which trains and is compared with transformers. This folder computes the same logits for
a ragged batch of live sequences. A token's logits have the same bits whatever shares the forward, and however its
prompt was cut into chunks. `runner.py` chooses between the layers of `compiled.py` and those of `eager.py`.

Dimension key, besides that of `model/__init__.py`: B sequences of a group, T tokens of each in this forward, N rows of
the forward (all tokens of all groups, padded), R rows of a window ring, S keys, U tokens of a query block.
"""

from agentkit_engine.runtime.request import PromptUsage, Request
from agentkit_engine.runtime.runner import Runner
from agentkit_engine.runtime.scheduled import Computed, ScheduledTokens
from agentkit_engine.runtime.scheduler import Scheduler
from agentkit_engine.runtime.state import Pools, Sequence

__all__ = ["Computed", "Pools", "PromptUsage", "Request", "Runner", "ScheduledTokens", "Scheduler", "Sequence"]
