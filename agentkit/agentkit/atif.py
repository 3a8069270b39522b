"""ATIF, the Agent Trajectory Interchange Format of Harbor: trajectories as ATIF 1.8, and ATIF 1.0 to 1.8 as history.

`to_atif` makes a JSON object of a trajectory; `load_atif` reads the messages of a file, for
`Agent.run(..., message_history=...)`.

A step is a message. An agent's step has the calls of its turn and, as its observation, their results. Its metrics have
the ids that the turn read (`prompt_token_ids`), the ids it added (`completion_token_ids`) and their log-probabilities.
Ids that the model did not sample have log-probability 0 and are marked by `metrics.extra.loss_mask`. Each step repeats
the ids of the steps before it, as the format requires, so a long trajectory becomes a large document.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from agentkit.errors import TrajectoryError, TrajectoryFormatError
from agentkit.events import Compacted, MessageAdded, Outcome, SubagentStarted, TurnFinished, TurnStarted
from agentkit.messages import AssistantMessage, Message, SystemMessage, ToolMessage, UserMessage
from agentkit.model import TokenSegment, Usage
from agentkit.strict import Strict
from agentkit.trajectory import Header, Trajectory
from agentkit.version import agentkit_version
from agentkit_engine.untrusted import describe, parse_json, read_regular
from agentkit_tools import ToolCall
from agentkit_tools.parts import IMAGE_TYPES, ImagePart, Part, TextPart, parts_text

Version = Literal[
    "ATIF-v1.0",
    "ATIF-v1.1",
    "ATIF-v1.2",
    "ATIF-v1.3",
    "ATIF-v1.4",
    "ATIF-v1.5",
    "ATIF-v1.6",
    "ATIF-v1.7",
    "ATIF-v1.8",
]
VERSIONS: Final[tuple[Version, ...]] = get_args(Version)
MAX_FILE_BYTES: Final = 256 << 20
MAX_VALUES: Final = 5_000_000
NO_RESULT: Final = "outcome unknown: the record has no result of this call"


class ImageSource(Strict):
    """The place of an image: a file's path or a URL, which may be a `data:` URL."""

    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    path: str


class ContentPart(Strict):
    """A text or an image."""

    type: Literal["text", "image"]
    text: str | None = None
    source: ImageSource | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.text is not None, self.source is not None) != (self.type == "text", self.type == "image"):
            raise ValueError(f'a part of type "{self.type}" has {"text" if self.type == "text" else "source"} only')
        return self


Content = str | list[ContentPart]


class AtifToolCall(Strict):
    """A call; `arguments` is an object."""

    tool_call_id: str
    function_name: str
    arguments: dict[str, Any]
    extra: dict[str, Any] | None = None


class SubagentRef(Strict):
    """A reference to the record of a sub-agent: the id of an embedded one, or the path of a file."""

    trajectory_id: str | None = None
    trajectory_path: str | None = None
    session_id: str | None = None
    extra: dict[str, Any] | None = None


class ObservationResult(Strict):
    """The result of a call of the same step, or of an action without a call."""

    source_call_id: str | None = None
    content: Content | None = None
    subagent_trajectory_ref: list[SubagentRef] | None = None
    extra: dict[str, Any] | None = None


class Observation(Strict):
    """The results of a step."""

    results: list[ObservationResult]


class Metrics(Strict):
    """Tokens and cost of a step. `prompt_tokens` include those found in a cache."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    cost_usd: float | None = None
    prompt_token_ids: list[int] | None = None
    completion_token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    extra: dict[str, Any] | None = None


AGENT_FIELDS: Final = ("model_name", "reasoning_effort", "reasoning_content", "tool_calls", "metrics")
"""Fields that only an agent's step may have."""


class Step(Strict):
    """A message, with the calls and results of an agent's turn."""

    step_id: int = Field(ge=1)
    timestamp: str | None = None
    source: Literal["system", "user", "agent"]
    model_name: str | None = None
    reasoning_effort: str | float | None = None
    message: Content
    reasoning_content: str | None = None
    tool_calls: list[AtifToolCall] | None = None
    observation: Observation | None = None
    metrics: Metrics | None = None
    is_copied_context: bool | None = None
    llm_call_count: int | None = Field(default=None, ge=0)
    extra: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.source != "agent" and (given := [name for name in AGENT_FIELDS if getattr(self, name) is not None]):
            raise ValueError(f"a {self.source} step has no {', '.join(given)}; only an agent's step may have it")
        calls = {call.tool_call_id for call in self.tool_calls or ()}
        for result in self.observation.results if self.observation else ():
            if result.source_call_id is not None and result.source_call_id not in calls:
                raise ValueError(f"source_call_id {result.source_call_id!r} is not a call of step {self.step_id}")
        return self


class AtifAgent(Strict):
    """The agent that made a trajectory."""

    name: str
    version: str
    model_name: str | None = None
    tool_definitions: list[dict[str, Any]] | None = None
    extra: dict[str, Any] | None = None


class FinalMetrics(Strict):
    """Totals over all steps."""

    total_prompt_tokens: int | None = None
    total_completion_tokens: int | None = None
    total_cached_tokens: int | None = None
    total_cost_usd: float | None = None
    total_steps: int | None = None
    extra: dict[str, Any] | None = None


class AtifTrajectory(Strict):
    """A whole document."""

    schema_version: Version
    session_id: str | None = None
    trajectory_id: str | None = None
    agent: AtifAgent
    steps: list[Step] = Field(min_length=1)
    notes: str | None = None
    final_metrics: FinalMetrics | None = None
    continued_trajectory_ref: str | None = None
    extra: dict[str, Any] | None = None
    subagent_trajectories: list[AtifTrajectory] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for number, step in enumerate(self.steps, start=1):
            if step.step_id != number:
                raise ValueError(f"steps.{number - 1}.step_id is {step.step_id}, expected {number}")
        ids = [each.trajectory_id for each in self.subagent_trajectories or ()]
        if None in ids or len({*ids}) < len(ids):
            raise ValueError("each of subagent_trajectories needs a trajectory_id of its own")
        return self


def to_atif(trajectory: Trajectory) -> dict[str, Any]:
    """Return a trajectory, with those of its sub-agents, as a JSON object of ATIF 1.8.

    Images become `data:` URLs. `extra` has the outcome and the metadata of the header.

    Raises:
        TrajectoryFormatError: it has no message, or sub-agents are nested too deeply.
        TrajectoryError: the record of a sub-agent cannot be read.
    """
    try:
        document: dict[str, Any] = _document(trajectory, {trajectory.header.id}).model_dump(exclude_none=True)
    except RecursionError:
        raise TrajectoryFormatError(f"sub-agents of {trajectory.header.id} are nested too deeply") from None
    return document


def atif_bytes(trajectory: Trajectory) -> bytes:
    """Return `to_atif` as JSON text in UTF-8. Raises as `to_atif`."""
    text = json.dumps(to_atif(trajectory), ensure_ascii=False)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def load_atif(path: str | Path) -> list[Message]:
    """Read an ATIF file as the messages of a conversation, for `message_history`. Raises as `parse_atif`.

    Raises:
        TrajectoryError: the file cannot be read.
        TrajectoryFormatError: it is not ATIF of a known version, or has an image that is not a `data:` URL.
    """
    try:
        return parse_atif(read_regular(path, max_bytes=MAX_FILE_BYTES))
    except OSError as exc:
        raise TrajectoryError(f"Cannot read {path}: {exc.strerror}.") from exc
    except TrajectoryFormatError as exc:
        raise TrajectoryFormatError(f"{path}: {exc}") from exc


def parse_atif(data: bytes) -> list[Message]:
    """Return the messages of an ATIF document.

    A system step becomes the system prompt if it comes first, else a user message. Consecutive turns of the agent
    become one. A call without a result gets an error result; a result without a call becomes a user message.

    Raises:
        TrajectoryFormatError: the data is not ATIF of a known version, or has an image that is not a `data:` URL.
    """
    try:
        value = parse_json(data, max_values=MAX_VALUES)
        if isinstance(value, dict) and value.get("schema_version") not in VERSIONS:
            raise ValueError(
                f"schema_version is {value.get('schema_version')!r:.60}, expected {VERSIONS[0]} to {VERSIONS[-1]}"
            )
        document = AtifTrajectory.model_validate(value)
        return list(_merged(_messages(document.steps)))
    except ValidationError as exc:
        raise TrajectoryFormatError(f"not an ATIF trajectory: {describe(exc)}") from exc
    except (ValueError, RecursionError) as exc:
        raise TrajectoryFormatError(f"not an ATIF trajectory: {exc}") from exc


def _document(trajectory: Trajectory, seen: set[str]) -> AtifTrajectory:
    """Return the document of a trajectory. `seen` has the ids of all trajectories in it so far."""
    header = trajectory.header
    below = [each for each in _subagents(trajectory) if each.header.id not in seen]
    seen |= {each.header.id for each in below}
    steps = _Steps(trajectory, {each.header.id for each in below})
    if not steps.steps:
        raise TrajectoryFormatError(f"trajectory {header.id} has no message, and ATIF needs one")
    extra: dict[str, Any] = {"metadata": header.metadata or None}
    if (outcome := trajectory.outcome) is not None:
        extra |= {"status": outcome.status, "answer": outcome.answer, "limit": outcome.limit, "error": outcome.error}
    return AtifTrajectory(
        schema_version="ATIF-v1.8",
        session_id=header.id,
        trajectory_id=header.id,
        agent=_agent(header),
        steps=[Step.model_validate(step) for step in steps.steps],
        final_metrics=steps.totals(),
        extra=_known(extra),
        subagent_trajectories=[_document(each, seen) for each in below] or None,
    )


def _agent(header: Header) -> AtifAgent:
    return AtifAgent(
        name="agentkit",
        version=agentkit_version(),
        model_name=header.model,
        tool_definitions=list(header.tools) or None,
        extra=_known({"thinking": header.thinking, "dialect": header.dialect}),
    )


def _subagents(trajectory: Trajectory) -> Iterator[Trajectory]:
    """Yield the records of sub-agents: those in memory, else the files beside this one."""
    if trajectory.subagents:
        yield from trajectory.subagents
        return
    for record in trajectory.records:
        if isinstance(record, SubagentStarted) and record.file is not None and trajectory.path is not None:
            path = trajectory.path.with_name(record.file)
            if path.name == record.file and path.exists():
                yield Trajectory.load(path)


class _Steps:
    """Makes the steps of a trajectory, record by record.

    Attributes:
        steps: The steps so far, as JSON objects.
    """

    def __init__(self, trajectory: Trajectory, embedded: set[str]) -> None:
        self.steps: list[dict[str, Any]] = []
        self._refs: dict[str, list[dict[str, Any]]] = {}  # to sub-agents, by the id of the call that ran them
        self._header = trajectory.header
        self._started = _time(trajectory.header.created)
        self._ids: list[int] = []  # ids of the session before the turn
        self._turn: list[TokenSegment] = []  # segments since the last turn
        self._turn_step: dict[str, Any] | None = None  # the last turn's step
        self._usage = Usage()  # of the run before the turn
        self._has_ids = any(isinstance(record, TokenSegment) for record in trajectory.records)
        self._began = False  # a turn has started; the messages before it are a given history
        for time_s, record in zip(trajectory.times_s, trajectory.records, strict=True):
            match record:
                case TokenSegment():
                    self._segment(record)
                case Compacted():
                    self._ids.clear()
                case TurnStarted():
                    self._began = True
                case MessageAdded():
                    self._message(record.message, time_s)
                case SubagentStarted():
                    path = None if record.trajectory_id in embedded else record.file
                    if path is not None or record.trajectory_id in embedded:
                        ref = _known({"trajectory_id": record.trajectory_id, "trajectory_path": path})
                        self._refs.setdefault(record.call_id, []).append(ref or {})
                case TurnFinished():
                    self._spent(record.usage)
                case Outcome():
                    self._usage = Usage()

    def totals(self) -> FinalMetrics:
        metrics = [step["metrics"] for step in self.steps if "metrics" in step]

        def total(name: str) -> Any:
            values = [each[name] for each in metrics if name in each]
            return sum(values) if values else None

        return FinalMetrics(
            total_prompt_tokens=total("prompt_tokens"),
            total_completion_tokens=total("completion_tokens"),
            total_cached_tokens=total("cached_tokens"),
            total_cost_usd=total("cost_usd"),
            total_steps=len(self.steps),
        )

    def _segment(self, segment: TokenSegment) -> None:
        if segment.restart:
            self._ids.clear()
            self._turn.clear()
        self._turn.append(segment)

    def _message(self, message: Message, time_s: float) -> None:
        if isinstance(message, ToolMessage):
            self._result(message, time_s)
            return
        step: dict[str, Any] = {"step_id": len(self.steps) + 1, "source": "agent", "message": message.content}
        if self._started is not None:
            with suppress(OverflowError):
                step["timestamp"] = (self._started + timedelta(seconds=time_s)).isoformat(timespec="milliseconds")
        match message:
            case AssistantMessage():
                step |= {"model_name": self._header.model, "reasoning_effort": self._header.effort}
                if not self._began:
                    step["is_copied_context"] = True
                if message.reasoning is not None:
                    step["reasoning_content"] = message.reasoning
                if message.calls:
                    step["tool_calls"] = [_call(call) for call in message.calls]
                if metrics := self._metrics():
                    step["metrics"] = metrics
                self._turn_step = step
            case SystemMessage():
                step["source"] = "system"
            case UserMessage():
                step |= {"source": "user", "message": _content(message.content, message.parts)}
        self.steps.append(step)

    def _result(self, message: ToolMessage, time_s: float) -> None:
        if self._turn_step is None:  # a history that begins with a result cannot be opened, but can be in a file
            self._message(UserMessage(message.content, message.parts), time_s)
            return
        ids = {call["tool_call_id"] for call in self._turn_step.get("tool_calls", ())}
        result: dict[str, Any] = {"content": _content(message.content, message.parts)}
        if message.call_id in ids:  # a malformed call is not one of the turn's calls
            result["source_call_id"] = message.call_id
        if message.is_error:
            result["extra"] = {"is_error": True}
        if refs := self._refs.get(message.call_id):
            result["subagent_trajectory_ref"] = refs
        self._turn_step.setdefault("observation", {"results": []})["results"].append(result)

    def _metrics(self) -> dict[str, Any]:
        """Return the ids of the turn that ends here, and continue after them."""
        segments, self._turn = self._turn, []
        first = next((index for index, each in enumerate(segments) if each.kind != "prompt"), len(segments))
        for segment in segments[:first]:
            self._ids += segment.ids
        prompt, added = list(self._ids), segments[first:]
        for segment in added:
            self._ids += segment.ids
        if not added:
            return {}
        completion = [token for segment in added for token in segment.ids]
        metrics: dict[str, Any] = {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(completion),
            "prompt_token_ids": prompt,
            "completion_token_ids": completion,
        }
        if all(segment.logprobs for segment in added if segment.kind == "sampled" and segment.ids):
            metrics["logprobs"] = [
                logprob for segment in added for logprob in segment.logprobs or [0.0] * len(segment.ids)
            ]
        if any(segment.kind != "sampled" for segment in added):
            mask = [int(segment.kind == "sampled") for segment in added for _ in segment.ids]
            metrics["extra"] = {"loss_mask": mask}
        return metrics

    def _spent(self, usage: Usage) -> None:
        """Add the usage since the turn before to the last turn's metrics."""
        before, self._usage = self._usage, usage
        if self._turn_step is None:
            return
        metrics = self._turn_step.setdefault("metrics", {})
        if "prompt_token_ids" in metrics:
            computed = usage.cache_miss_tokens - before.cache_miss_tokens
            metrics["cached_tokens"] = max(0, metrics["prompt_tokens"] - computed)
        elif not self._has_ids:
            metrics["prompt_tokens"] = usage.prompt_tokens - before.prompt_tokens
            metrics["completion_tokens"] = usage.sampled_tokens - before.sampled_tokens
            metrics["cached_tokens"] = usage.cache_hit_tokens - before.cache_hit_tokens
        if usage.cost_usd is not None:
            metrics["cost_usd"] = usage.cost_usd - (before.cost_usd or 0.0)


def _call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if isinstance(arguments, dict):
        return {"tool_call_id": call.id, "function_name": call.name, "arguments": arguments}
    # ATIF has only objects
    raw = {"arguments_text": call.arguments}
    return {"tool_call_id": call.id, "function_name": call.name, "arguments": {}, "extra": raw}


def _content(text: str, parts: Sequence[Part]) -> Any:
    if not parts:
        return text
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {
            "type": "image",
            "source": {"media_type": part.media_type, "path": f"data:{part.media_type};base64,{part.data}"},
        }
        for part in parts
    ]


def _known(values: dict[str, Any]) -> dict[str, Any] | None:
    return {name: value for name, value in values.items() if value is not None} or None


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def _messages(steps: Sequence[Step]) -> Iterator[Message]:
    for step in steps:
        content, parts = _read(step.message)
        if step.source == "user":
            yield UserMessage(content, parts)
        elif step.source == "system":
            yield UserMessage(content, parts) if step.step_id > 1 else SystemMessage(content)
        else:
            calls = tuple(
                ToolCall(
                    call.tool_call_id,
                    call.function_name,
                    (call.extra or {}).get("arguments_text") or json.dumps(call.arguments, ensure_ascii=False),
                )
                for call in step.tool_calls or ()
            )
            yield AssistantMessage(content, step.reasoning_content, calls)
        yield from _results(step)


def _results(step: Step) -> Iterator[Message]:
    """Yield the results of a step's calls in call order, then its other results as user messages."""
    results = step.observation.results if step.observation else []
    for call in step.tool_calls or ():
        mine = [result for result in results if result.source_call_id == call.tool_call_id]
        if not mine:
            yield ToolMessage(call.tool_call_id, call.function_name, NO_RESULT, is_error=True)
            continue
        content: list[ContentPart] = []
        for result in mine:
            given = result.content or ""
            content += [ContentPart(type="text", text=given)] if isinstance(given, str) else given
        is_error = any((result.extra or {}).get("is_error") is True for result in mine)
        text, parts = _read(content)
        yield ToolMessage(call.tool_call_id, call.function_name, text, is_error, parts)
    for result in results:
        if result.source_call_id is None and result.content:
            yield UserMessage(*_read(result.content))


def _read(content: Content) -> tuple[str, tuple[Part, ...]]:
    if isinstance(content, str):
        return content, ()
    parts = tuple(_part(part) for part in content)
    if all(isinstance(part, TextPart) for part in parts):
        return parts_text(parts), ()
    return parts_text(parts), parts


def _part(part: ContentPart) -> Part:
    if part.source is None:
        return TextPart(part.text or "")
    head, comma, data = part.source.path.partition(",")
    if not comma or head != f"data:{part.source.media_type};base64":
        raise ValueError(
            f"the image {part.source.path!r:.80} is not in the document; only images as "
            f"data:TYPE;base64,DATA with one of the types {', '.join(IMAGE_TYPES)} are read"
        )
    return ImagePart(part.source.media_type, data)


def _merged(messages: Iterator[Message]) -> Iterator[Message]:
    """Yield the messages with consecutive turns as one, since a model's turns never follow each other directly."""
    waiting: AssistantMessage | None = None  # a turn without calls
    for message in messages:
        if waiting is not None and isinstance(message, AssistantMessage):
            message = _joined(waiting, message)
        elif waiting is not None:
            yield waiting
        waiting = message if isinstance(message, AssistantMessage) and not message.calls else None
        if waiting is None:
            yield message
    if waiting is not None:
        yield waiting


def _joined(first: AssistantMessage, second: AssistantMessage) -> AssistantMessage:
    content = "\n\n".join(text for text in (first.content, second.content) if text)
    thoughts = [text for text in (first.reasoning, second.reasoning) if text is not None]
    return AssistantMessage(content, "\n\n".join(thoughts) if thoughts else None, second.calls)
