"""The public names of `agentkit`, imported on first use of any of them."""

from agentkit.agent import DEFAULT_SYSTEM, Agent
from agentkit.errors import (
    AgentkitError,
    ApiError,
    ApiKeyError,
    ContextFullError,
    MissingDependencyError,
    ModelError,
    ModelOptionError,
    TrajectoryCorruptError,
    TrajectoryError,
    TrajectoryFormatError,
    TrajectoryWriteError,
    UnknownModelError,
)
from agentkit.events import (
    CallFinished,
    CallStarted,
    Event,
    LimitReached,
    MessageAdded,
    Outcome,
    RunFinished,
    TurnFinished,
    TurnStarted,
)
from agentkit.limits import ConcurrencyLimits, Limits
from agentkit.messages import AssistantMessage, Message, SystemMessage, ToolMessage, UserMessage
from agentkit.model import (
    CallMalformed,
    CallReady,
    CallsWithdrawn,
    Model,
    ModelSession,
    ReasoningDelta,
    Retried,
    TextDelta,
    ThoughtCut,
    TokenSegment,
    Usage,
)
from agentkit.models.embedded import EmbeddedModel
from agentkit.models.remote.session import RemoteModel
from agentkit.models.scripted import AssistantTurn, ScriptedModel
from agentkit.result import RunResult
from agentkit.trajectory import Header, Trajectory
from agentkit_engine.sampling_params import SamplingParams
from agentkit_tools import ImagePart, TextPart, Tool, ToolCall, ToolContext, ToolResult, tool

__all__ = [
    "DEFAULT_SYSTEM",
    "Agent",
    "AgentkitError",
    "ApiError",
    "ApiKeyError",
    "AssistantMessage",
    "AssistantTurn",
    "CallFinished",
    "CallMalformed",
    "CallReady",
    "CallStarted",
    "CallsWithdrawn",
    "ConcurrencyLimits",
    "ContextFullError",
    "EmbeddedModel",
    "Event",
    "Header",
    "ImagePart",
    "LimitReached",
    "Limits",
    "Message",
    "MessageAdded",
    "MissingDependencyError",
    "Model",
    "ModelError",
    "ModelOptionError",
    "ModelSession",
    "Outcome",
    "ReasoningDelta",
    "RemoteModel",
    "Retried",
    "RunFinished",
    "RunResult",
    "SamplingParams",
    "ScriptedModel",
    "SystemMessage",
    "TextDelta",
    "TextPart",
    "ThoughtCut",
    "TokenSegment",
    "Tool",
    "ToolCall",
    "ToolContext",
    "ToolMessage",
    "ToolResult",
    "Trajectory",
    "TrajectoryCorruptError",
    "TrajectoryError",
    "TrajectoryFormatError",
    "TrajectoryWriteError",
    "TurnFinished",
    "TurnStarted",
    "UnknownModelError",
    "Usage",
    "UserMessage",
    "tool",
]
