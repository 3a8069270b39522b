"""Run a DeepSeek-V4 model in this process, from weights on disk to sampled tokens.

    engine = Engine.load("tiny")
    with engine.session() as session:
        session.append(engine.tokenizer.encode("..."))
        for token in session.generate(SamplingParams(temperature=0, max_tokens=16)):
            print(token.id, token.logprob)

`AsyncEngine` is the async version; `agentkit_engine.chat` converts messages to token ids and back.

Modules that need torch are imported on first use, so `agentkit_engine.chat` works without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from agentkit_engine.errors import (
    BackendUnavailableError,
    CacheFolderError,
    CheckpointError,
    ContextLengthError,
    DeviceUnavailableError,
    EngineClosedError,
    EngineError,
    GrammarError,
    GrammarMissingError,
    ModelNotFoundError,
    ModelTooLargeError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    SamplingParamsError,
    SavedSessionError,
    SessionBusyError,
    SessionClosedError,
    SessionEmptyError,
    SessionError,
    TokenIdError,
    TokenizerMissingError,
    WorkerLostError,
)
from agentkit_engine.garbage import collection_paused

if TYPE_CHECKING:
    from agentkit_engine.async_engine import AsyncEngine, AsyncSession
    from agentkit_engine.engine import Engine
    from agentkit_engine.runtime import PromptUsage
    from agentkit_engine.runtime.capacity import KVCapacity
    from agentkit_engine.sampler import SampledToken
    from agentkit_engine.sampling_params import SamplingParams
    from agentkit_engine.session import Session
    from agentkit_engine.spec import LayerSpec, ModelSpec

_MODULE_OF = {
    "AsyncEngine": "async_engine",
    "AsyncSession": "async_engine",
    "Engine": "engine",
    "KVCapacity": "runtime.capacity",
    "LayerSpec": "spec",
    "ModelSpec": "spec",
    "PromptUsage": "runtime",
    "SampledToken": "sampler",
    "SamplingParams": "sampling_params",
    "Session": "session",
}

__all__ = [
    "AsyncEngine",
    "AsyncSession",
    "BackendUnavailableError",
    "CacheFolderError",
    "CheckpointError",
    "ContextLengthError",
    "DeviceUnavailableError",
    "Engine",
    "EngineClosedError",
    "EngineError",
    "GrammarError",
    "GrammarMissingError",
    "KVCapacity",
    "LayerSpec",
    "ModelNotFoundError",
    "ModelSpec",
    "ModelTooLargeError",
    "NonFiniteLogitsError",
    "OutOfMemoryError",
    "PromptUsage",
    "SampledToken",
    "SamplingParams",
    "SamplingParamsError",
    "SavedSessionError",
    "Session",
    "SessionBusyError",
    "SessionClosedError",
    "SessionEmptyError",
    "SessionError",
    "TokenIdError",
    "TokenizerMissingError",
    "WorkerLostError",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with collection_paused():  # these modules import torch
        module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    return getattr(module, name)
