"""Tests of all APIs: names of models and tools, conversations that an API accepts, retries and the rate limiter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from asking import ask
from hypothesis import given
from hypothesis import strategies as st

from agentkit import (
    Agent,
    ApiKeyError,
    AssistantMessage,
    Message,
    ModelOptionError,
    RemoteModel,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UnknownModelError,
    UserMessage,
)
from agentkit.errors import MissingDependencyError
from agentkit.model import Effort
from agentkit.models.embedded import EmbeddedModel
from agentkit.models.remote import dsml
from agentkit.models.remote.history import sendable
from agentkit.models.remote.names import ToolNames, arguments_object
from agentkit.models.remote.openai_chat import OpenAIChat, Server
from agentkit.models.remote.resolve import Endpoint, endpoint_of, is_remote
from agentkit.models.remote.retry import MAX_WAIT_S, RateLimiter, limiter_of, wait_s
from agentkit_engine import ModelNotFoundError
from agentkit_environments import Environment
from agentkit_tools.tool import NAME

KEY = "sk-secret-0123456789"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai:gpt-5", True),
        ("openai:qwen/Qwen3:free", True),
        ("deepseek:deepseek-chat", True),
        ("anthropic:claude-sonnet-4-5", True),
        ("openai:", False),
        ("gpt-5", False),
        ("vllm:toy", False),
        ("C:model", False),
        ("tiny", False),
    ],
)
def test_names_of_models(name: str, expected: bool) -> None:
    assert is_remote(name) == expected


def test_a_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openai:toy").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_remote("openai:toy") and is_remote("openai:other")


@pytest.mark.parametrize(
    ("name", "options", "error", "said"),
    [
        ("openai:gpt-5", {}, ApiKeyError, "no key for api.openai.com: set the environment variable OPENAI_API_KEY, or"),
        ("deepseek:deepseek-chat", {}, ApiKeyError, "set the environment variable DEEPSEEK_API_KEY"),
        ("deepseek:deepseek-chat", {"api_key": ""}, ApiKeyError, "set the environment variable DEEPSEEK_API_KEY"),
        ("anthropic:m", {"base_url": "https://api.anthropic.com/v1"}, ApiKeyError, "no key for api.anthropic.com"),
        ("openai:gpt-5", {"base_url": "https://api.openai.com/v1/"}, ApiKeyError, "no key for api.openai.com"),
        ("gpt-5", {}, UnknownModelError, "expected PROVIDER:MODEL, with the provider openai, anthropic, deepseek"),
        ("mistral:large", {}, UnknownModelError, "use openai: with a base URL for any server"),
        ("openai:toy", {"base_url": "localhost:8000"}, ModelOptionError, "expected one such as http://localhost:8000"),
        ("openai:toy", {"base_url": "http://me:pw@host/v1"}, ModelOptionError, "the base URL of host contains a user"),
        ("openai:toy", {"base_url": "http://host/v1", "api_key": "a b"}, ApiKeyError, "characters that no key has"),
        ("openai:toy", {"timeout_s": 0}, ValueError, "timeout_s"),
        ("openai:toy", {"max_retries": -1}, ValueError, "max_retries"),
        ("openai:toy", {"max_connections": 0}, ValueError, "max_connections"),
        (3, {}, TypeError, "a name such as"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(
    name: Any, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        RemoteModel(name, **options)
    assert "pw" not in str(caught.value)


def test_a_missing_package_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("agentkit.models.remote.connection.importlib.import_module", missing)
    with pytest.raises(MissingDependencyError, match=r'pip install "agentkit-harness\[api\]"'):
        RemoteModel("openai:toy", base_url="http://localhost:1/v1")


def test_an_agent_takes_the_name_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_API_KEY", KEY)
    model = Agent("deepseek:deepseek-chat", []).model
    assert isinstance(model, RemoteModel) and not isinstance(model, EmbeddedModel)
    assert (model.name, model.host) == ("deepseek:deepseek-chat", "api.deepseek.com")
    with pytest.raises(ModelNotFoundError, match="named with its provider, such as openai:MODEL"):
        Agent("gpt-5", [])
    with pytest.raises(UnknownModelError, match="'mistral:large' is not the name of a model behind an API"):
        Agent("mistral:large")
    assert KEY not in repr(model) + repr(vars(model)["_open_provider"]) + repr(
        Endpoint("openai", "m", "http://h", KEY, 1)
    )


@pytest.mark.parametrize(
    ("base_url", "api"),
    [
        (None, "openai-responses"),
        ("https://api.openai.com/v1", "openai-responses"),
        ("http://localhost:8000/v1", "openai-chat"),
        ("https://api.openai.com.evil.example/v1", "openai-chat"),
    ],
)
def test_openai_speaks_responses_only_at_openai(
    base_url: str | None, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert RemoteModel("openai:gpt-5", base_url=base_url)._open_provider().api == api
    if base_url:
        monkeypatch.setenv("OPENAI_BASE_URL", base_url)
        assert RemoteModel("openai:gpt-5")._open_provider().api == api


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://h:1/v1//", "http://h:1/v1"),
        ("http://h/v1/chat/completions", "http://h/v1"),
        ("http://h/v1/responses/", "http://h/v1"),
        ("https://h/v1/messages", "https://h/v1"),
        ("http://messages/", "http://messages"),
    ],
)
def test_a_base_url_may_end_with_the_path_of_a_request(given: str, used: str) -> None:
    assert endpoint_of("openai:toy", base_url=given, api_key=None, timeout_s=1.0).base_url == used


@pytest.mark.parametrize("name", ["openai:m", "anthropic:m", "deepseek:m"])
def test_a_server_of_ones_own_may_need_no_key(name: str) -> None:
    assert RemoteModel(name, base_url="http://localhost:8000").host == "localhost:8000"


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["api.moonshot.ai", "dashscope-intl.aliyuncs.com"])
async def test_an_effort_that_a_host_lacks_is_refused(host: str, environment: Environment) -> None:
    model = RemoteModel("openai:m", base_url=f"https://{host}/v1", api_key=KEY)
    with pytest.raises(ModelOptionError, match="openai:m has no effort 'low'; it has none, high"):
        await Agent(model, [], effort="low").run("Q", environment=environment)


@pytest.mark.parametrize(
    ("host", "dialect"),
    [
        ("api.deepseek.com", "deepseek"),
        ("api.moonshot.ai", "thinking"),
        ("dashscope-intl.aliyuncs.com", "enable_thinking"),
        ("openrouter.ai", "hosted"),
        ("notopenrouter.ai", "own"),
        ("localhost:8000", "own"),
    ],
)
def test_hosts_get_the_fields_that_they_know(host: str, dialect: str) -> None:
    assert OpenAIChat(Endpoint("openai", "m", f"https://{host}/v1", KEY, 1.0), Server()).dialect == dialect


@pytest.mark.parametrize(
    ("effort", "think", "sent"),
    [("none", False, {"reasoning_effort": "none"}), ("high", False, {}), ("low", True, {"reasoning_effort": "low"})],
)
def test_effort_at_a_host_without_a_switch(effort: Effort, think: bool, sent: dict[str, str]) -> None:
    chat = OpenAIChat(Endpoint("openai", "m", "https://openrouter.ai/api/v1", KEY, 1.0), Server())
    assert chat._thinking(ask(think=think, effort=effort)) == sent


@given(st.lists(st.text(max_size=80), unique=True, max_size=20))
def test_tool_names_fit_every_api_and_are_mapped_back(names: list[str]) -> None:
    mapped = ToolNames(names)
    sent = [mapped.sent(name) for name in names]
    assert len(set(sent)) == len(names) and all(NAME.fullmatch(name) for name in sent)
    assert [mapped.ours(name) for name in sent] == names
    assert all(mapped.sent(name) == name for name in names if NAME.fullmatch(name))


@given(st.text())
def test_arguments_are_always_an_object(text: str) -> None:
    assert isinstance(arguments_object(text), dict)
    assert arguments_object(json.dumps({"a": text})) == {"a": text}


CALL_IDS = st.sampled_from(["a", "b", "c"])
MESSAGES = st.one_of(
    st.builds(UserMessage, st.text(min_size=1, max_size=3)),
    st.builds(ToolMessage, CALL_IDS, st.just("look"), st.text(max_size=3)),
    st.builds(
        AssistantMessage,
        st.text(max_size=3),
        calls=st.lists(CALL_IDS, unique=True, max_size=3).map(
            lambda ids: tuple(ToolCall(call_id, "look at", "{}") for call_id in ids)
        ),
    ),
)


@given(st.lists(MESSAGES, max_size=12))
def test_every_conversation_becomes_one_that_an_api_accepts(messages: list[Message]) -> None:
    sent = sendable([SystemMessage("s"), UserMessage("u"), *messages], ToolNames(["look at"]))
    waiting: list[str] = []
    for before, message in zip([None, *sent], sent, strict=False):
        if isinstance(message, ToolMessage):
            waiting.remove(message.call_id)
            assert message.name == "look_at"
            continue
        assert not waiting
        assert not (isinstance(before, UserMessage) and isinstance(message, UserMessage))
        if isinstance(message, AssistantMessage):
            assert message.content or message.calls
            waiting = [call.id for call in message.calls]
    assert not waiting
    said = [message.content for message in messages if isinstance(message, UserMessage | AssistantMessage)]
    assert all(any(text in message.content for message in sent) for text in said)


WRITTEN = '<|DSML|tool_calls>\n<|DSML|invoke name="look">\n</|DSML|invoke>\n</|DSML|tool_calls>'
TOOLS: Sequence[dict[str, Any]] = [{"function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


@given(st.text(max_size=20), st.integers(min_value=1, max_value=9))
def test_what_was_shown_is_never_part_of_a_call(before: str, step: int) -> None:
    text = f"{before}\n\n{WRITTEN}"
    shown = 0
    for end in range(0, len(text), step):
        assert dsml.shown_length(text[:end], shown) >= shown
        shown = dsml.shown_length(text[:end], shown)
    assert shown <= text.index("<|DSML|")
    rest, calls = dsml.split_calls(text, turn=0, tools=TOOLS)
    assert rest == text[: text.index("<|DSML|")].rstrip() and len(calls) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a < b",
        f"So:\n{WRITTEN}\nThat is all.",
        "<|DSML",
        "`<|DSML|tool_calls>` begins a block",
        f"{WRITTEN} is an example",
    ],
)
def test_other_text_is_left_alone(text: str) -> None:
    assert dsml.split_calls(text, turn=0, tools=TOOLS) == (text, [])


def test_waits() -> None:
    assert all(0 <= (wait_s(failures, None) or 0) <= MAX_WAIT_S for failures in range(1, 200))
    assert 2 <= (wait_s(1, 2.0) or 0) <= 2.2
    assert wait_s(1, MAX_WAIT_S + 1) is None


@pytest.mark.anyio
async def test_the_rate_limiter_lets_few_through_after_a_refusal() -> None:
    limiter = RateLimiter()
    first = anyio.Event()
    most = passed = 0

    async def request(hold: anyio.Event) -> None:
        nonlocal most, passed
        async with limiter:
            most = max(most, limiter.active)
            passed += 1
            first.set()
            await hold.wait()

    hold = anyio.Event()
    async with anyio.create_task_group() as tasks:
        for _ in range(16):
            tasks.start_soon(request, hold)
        await anyio.wait_all_tasks_blocked()
        assert limiter.active == most == 16
        limiter.throttle(0.01)
        hold.set()
    most, passed, first = 0, 0, anyio.Event()
    hold = anyio.Event()
    async with anyio.create_task_group() as tasks:
        for _ in range(16):
            tasks.start_soon(request, hold)
        with anyio.fail_after(5):
            await first.wait()
        await anyio.wait_all_tasks_blocked()
        assert 8 <= limiter.active == most < 16
        hold.set()
    assert passed == 16 and most < 16


@pytest.mark.anyio
async def test_sessions_of_a_key_share_a_rate_limiter() -> None:
    limiter = limiter_of("host", "key", None)
    assert limiter is limiter_of("host", "key", 3) and limiter.max_connections == 3
    assert limiter is not limiter_of("host", "other", None) and limiter is not limiter_of("elsewhere", "key", None)
