"""Live sequences: their forwards in batches, their state in pools, and its caches.

A token's logits have the same bits whatever shares the forward, and however its prompt was cut into chunks. The forward
itself is `model/forward.py`; `runner.py` chooses the backend that computes it.

Dimension key, besides that of `model/__init__.py`: B sequences, N rows of the forward (the tokens of all sequences), R
rows whose logits are wanted.
"""

from agentkit_engine.runtime.request import PromptUsage, Request
from agentkit_engine.runtime.runner import Runner
from agentkit_engine.runtime.scheduled import Computed, ScheduledTokens
from agentkit_engine.runtime.scheduler import Scheduler
from agentkit_engine.runtime.state import Pools, Sequence

__all__ = ["Computed", "Pools", "PromptUsage", "Request", "Runner", "ScheduledTokens", "Scheduler", "Sequence"]
