"""Evaluations and commands on a model behind an API: faults of the API change neither scores nor counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import typer.testing
from anyio.from_thread import start_blocking_portal
from servers import chat
from servers.chat import ChatServer, calls, text
from servers.http import Reply

from agentkit import RemoteModel
from agentkit.cli import app
from agentkit.cli.ending import ExitCode
from agentkit.errors import ApiKeyError
from agentkit.task import Task
from agentkit_evals.record import RunDirectory
from agentkit_evals.run import EvalRun
from agentkit_evals.suite import Case, Suite

KEY = "sk-secret-0123456789"
MakeTask = Callable[..., Task]
Serving = Callable[[ChatServer], str]


@pytest.fixture(autouse=True)
def set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentkit.models.remote.retry.BASE_S", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("COLUMNS", "200")


def solve(body: dict[str, Any]) -> Reply:
    """Read the number, then submit it; a prompt has as many tokens as messages."""
    messages = body["messages"]
    usage = {"prompt_tokens": len(messages), "completion_tokens": 3, "total_tokens": len(messages) + 3}
    if messages[-1]["role"] != "tool":
        return calls(("read_file", '{"path": "n.txt"}'), usage=usage)
    return calls(("submit", json.dumps({"answer": messages[-1]["content"].split()[-1]})), usage=usage)


async def evaluate(url: str, directory: Path, task: MakeTask, *, tasks: int = 12, **options: Any) -> RunDirectory:
    model = RemoteModel("openai:toy", base_url=url, max_retries=14, **options)
    cases = tuple(
        Case(task(f"n{number}", environment={"files": {"n.txt": f"{42 + number % 2}\n"}}), "numbers")
        for number in range(tasks)
    )
    run = EvalRun(
        Suite("suite", cases), model, directory, model_name=model.name, concurrency=tasks, backend="unsafe-local"
    )
    async with model:
        return await run.execute()


def figures(run: RunDirectory) -> list[tuple[Any, ...]]:
    return sorted(
        (
            trial.trial,
            trial.reward,
            trial.failure,
            trial.usage.prompt_tokens,
            trial.usage.sampled_tokens,
            trial.usage.turns,
        )
        for trial in run.trials
    )


@pytest.mark.anyio
async def test_faults_of_the_api_change_neither_scores_nor_counts(tmp_path: Path, number_task: MakeTask) -> None:
    """Every third request is refused, every fourth stream breaks, and in the middle the server restarts."""
    answered = Counter[str]()
    down = anyio.Event()

    def faulty(body: dict[str, Any]) -> Reply:
        number = sum(answered.values())
        good = solve(body)
        if number == 15:
            down.set()
        if number % 3 == 0:
            answered["refused"] += 1
            return chat.error(429, "slow down", headers={"retry-after-ms": "1"})
        if number % 4 == 0:
            answered["broken"] += 1
            return Reply(good.body[: len(good.body) // 2], cut=True)  # type: ignore[index, arg-type]
        answered["good"] += 1
        return good

    calm = ChatServer(solve, key=KEY)
    async with calm.serve() as url:
        expected = figures(await evaluate(url, tmp_path / "calm", number_task))
    assert [row[1] for row in expected].count(1.0) == 6 and {row[3:] for row in expected} == {(6, 6, 2)}

    stormy = ChatServer(faulty, key=KEY)
    found: list[RunDirectory] = []
    finished = anyio.Event()

    async def run(url: str) -> None:
        found.append(await evaluate(url, tmp_path / "stormy", number_task))
        finished.set()

    async with anyio.create_task_group() as tasks:
        async with stormy.serve() as url:
            tasks.start_soon(run, url)
            await down.wait()
        port = int(url.rpartition(":")[2].partition("/")[0])
        async with stormy.serve(port=port):
            await finished.wait()
    assert figures(found[0]) == expected
    assert min(answered["refused"], answered["broken"]) >= 5


@pytest.mark.anyio
async def test_many_trials_of_one_key_do_not_storm_an_api_that_refuses(tmp_path: Path, number_task: MakeTask) -> None:
    """The API takes two requests at a time. After a refusal the trials wait together, and return a few at a time."""
    active = refused = 0

    async def slowly(good: Reply) -> AsyncIterator[bytes]:
        nonlocal active
        try:
            await anyio.sleep(0.005)
            assert isinstance(good.body, bytes)
            yield good.body
        finally:
            active -= 1

    def narrow(body: dict[str, Any]) -> Reply:
        nonlocal active, refused
        if active >= 2:
            refused += 1
            return chat.error(429, "slow down", headers={"retry-after-ms": "20"})
        active += 1
        return Reply(slowly(solve(body)))

    server = ChatServer(narrow)
    async with server.serve() as url:
        run = await evaluate(url, tmp_path / "run", number_task, tasks=24)
    assert [trial.failure for trial in run.trials].count("infrastructure") == 0
    assert sum(trial.usage.turns for trial in run.trials) == 48 == len(server.requests) - refused
    assert refused < 60


@pytest.mark.anyio
async def test_max_connections_bounds_the_requests_of_all_trials(tmp_path: Path, number_task: MakeTask) -> None:
    active = most = 0

    async def counted(good: Reply) -> AsyncIterator[bytes]:
        nonlocal active
        assert isinstance(good.body, bytes)
        yield good.body
        await anyio.lowlevel.checkpoint()
        active -= 1

    def answer(body: dict[str, Any]) -> Reply:
        nonlocal active, most
        active += 1
        most = max(most, active)
        return Reply(counted(solve(body)))

    async with ChatServer(answer).serve() as url:
        await evaluate(url, tmp_path / "run", number_task, max_connections=3)
    assert most <= 3


@pytest.mark.anyio
async def test_a_key_that_the_api_refuses_ends_the_evaluation(tmp_path: Path, number_task: MakeTask) -> None:
    server = ChatServer(solve, key="another")
    error: Exception | None = None
    async with server.serve() as url:
        try:
            await evaluate(url, tmp_path / "run", number_task)
        except ApiKeyError as exc:
            error = exc
    assert "refuses the key: check OPENAI_API_KEY" in str(error)
    assert (tmp_path / "run" / "trials.jsonl").read_bytes() == b""


@pytest.mark.anyio
async def test_an_api_that_fails_is_infrastructure(tmp_path: Path, number_task: MakeTask) -> None:
    async with ChatServer(chat.error(400, "toy does not support tools")).serve() as url:
        run = await evaluate(url, tmp_path / "run", number_task, tasks=1)
    trial = run.trials[0]
    assert (trial.failure, trial.reward, trial.status) == ("infrastructure", None, "error")
    assert "does not support tools; choose a model that calls tools" in str(trial.error)


@pytest.fixture
def serving() -> Iterator[Serving]:
    """Function that serves in a thread until the test ends."""
    with start_blocking_portal() as portal:
        stack: list[Any] = []

        def start(server: ChatServer) -> str:
            context = portal.wrap_async_context_manager(server.serve())
            stack.append(context)
            return context.__enter__()

        yield start
        for context in stack:
            context.__exit__(None, None, None)


def agentkit(*arguments: str) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_run_on_a_model_behind_an_api(serving: Serving, tmp_path: Path) -> None:
    server = ChatServer(
        chat.error(500, "oops"), calls(("submit", '{"answer": "42"}'), thought="Easy."), models=("toy",), key=KEY
    )
    record = tmp_path / "run.jsonl"
    result = agentkit(
        *("run", "Answer 42.", "-m", "openai:toy", "--base-url", serving(server), "--env", "unsafe-local"),
        *("--trajectory", str(record), "--temperature", "0.2"),
    )
    assert result.exit_code == ExitCode.OK, result.output
    assert "retrying in 0.0 s" in result.output and "HTTP 500: oops" in result.output
    assert "Easy." in result.output and "answer    42" in result.output
    assert server.requests[0]["temperature"] == 0.2
    assert KEY not in record.read_text() + result.output
    assert agentkit("view", str(record)).exit_code == ExitCode.OK


def test_eval_on_a_model_behind_an_api(serving: Serving, tmp_path: Path, number_task: MakeTask) -> None:
    task = number_task(environment={"files": {"n.txt": "42\n"}})
    (tmp_path / "task.json.yaml").write_text(task.model_dump_json(exclude_defaults=True))
    out = tmp_path / "out"
    result = agentkit(
        *("eval", str(tmp_path / "task.json.yaml"), "-m", "openai:toy", "--base-url", serving(ChatServer(solve))),
        *("--env", "unsafe-local", "--out", str(out), "--threshold", "1", "--max-connections", "2"),
    )
    assert result.exit_code == ExitCode.OK, result.output
    assert RunDirectory.open(out).lock.model == "openai:toy"
    assert all(KEY not in path.read_text() for path in out.rglob("*.*") if path.is_file())
    assert (out / "report.html").exists()


def test_chat_with_a_model_behind_an_api(serving: Serving) -> None:
    server = ChatServer(text("Hello."), text("Bye."))
    arguments = ["chat", "-m", "openai:toy", "--base-url", serving(server), "--env", "unsafe-local"]
    result = typer.testing.CliRunner().invoke(app, arguments, input="Hi\nBye\n", catch_exceptions=False)
    assert result.exit_code == ExitCode.OK and "Hello." in result.output and "Bye." in result.output
    assert [message["role"] for message in server.requests[1]["messages"]] == ["system", "user", "assistant", "user"]


def test_a_chat_outlives_a_failure_of_the_api(serving: Serving) -> None:
    odd = chat.error(
        400, "something \x1b[31modd"
    )  # twice: the request is repeated without fields that not every server knows
    server = ChatServer(text("Hello."), odd, odd, text("I am back."))
    arguments = ["chat", "-m", "openai:toy", "--base-url", serving(server), "--env", "unsafe-local"]
    result = typer.testing.CliRunner().invoke(app, arguments, input="Hi\nAnd?\nAgain\n", catch_exceptions=False)
    assert result.exit_code == ExitCode.INFRASTRUCTURE, result.output
    assert "something \N{SYMBOL FOR ESCAPE}[31modd" in result.output and "I am back." in result.output
    assert "\x1b[31m" not in result.output


def test_a_piped_chat_fails_if_a_message_got_no_answer(serving: Serving) -> None:
    server = ChatServer(text(""), text("Hello."))
    arguments = ["chat", "-m", "openai:toy", "--base-url", serving(server), "--env", "unsafe-local"]
    result = typer.testing.CliRunner().invoke(app, arguments, input="Hi\nAgain\n", catch_exceptions=False)
    assert result.exit_code == ExitCode.UNSOLVED and "Hello." in result.output


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (chat.error(401, f"bad {KEY}"), ExitCode.USAGE, "refuses the key: check OPENAI_API_KEY"),
        (chat.error(404, "no such model", code="model_not_found"), ExitCode.USAGE, "has no model 'toy'; it has big"),
        (
            Reply(b"<html>", 200, {"content-type": "text/html"}),
            ExitCode.INFRASTRUCTURE,
            "is not the base URL of an OpenAI",
        ),
        (chat.error(400, "toy does not support tools"), ExitCode.INFRASTRUCTURE, "choose a model that calls tools"),
        (
            chat.error(400, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'),
            ExitCode.INFRASTRUCTURE,
            "(vLLM: start it with --enable-auto-tool-choice and --tool-call-parser)",
        ),
    ],
)
@pytest.mark.parametrize("command", ["run", "eval"])
def test_a_refusal_is_one_line(
    command: str,
    answer: Reply,
    code: ExitCode,
    said: str,
    serving: Serving,
    tmp_path: Path,
    number_task: MakeTask,
) -> None:
    (tmp_path / "task.yaml").write_text(number_task().model_dump_json(exclude_defaults=True))
    what = "Say hello." if command == "run" else str(tmp_path / "task.yaml")
    url = serving(ChatServer(answer, models=("big",)))
    extra = [] if command == "run" else ["--out", str(tmp_path / "out")]
    result = agentkit(command, what, "-m", "openai:toy", "--base-url", url, "--env", "unsafe-local", *extra)
    assert result.exit_code == code, result.output
    assert said in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output and KEY not in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-m", "deepseek:deepseek-chat"], ExitCode.USAGE, "set the environment variable DEEPSEEK_API_KEY"),
        (["-m", "openai:toy", "--base-url", "nowhere"], ExitCode.USAGE, "the base URL 'nowhere' is not a URL"),
        (
            ["-m", "openai:toy", "--base-url", "http://127.0.0.1:9/v1"],
            ExitCode.INFRASTRUCTURE,
            "in 6 attempts: check the base URL, and that its server runs, or try again later",
        ),
        (
            ["-m", "openai:toy", "--base-url", "http://127.0.0.1:9/v1", "--grammar", "on"],
            ExitCode.USAGE,
            "no grammar can be set",
        ),
    ],
)
def test_a_model_that_cannot_be_reached(
    arguments: list[str], code: ExitCode, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    result = agentkit("run", "Say hello.", "--env", "unsafe-local", *arguments)
    assert result.exit_code == code, result.output
    assert said in " ".join(result.output.split()), result.output


@pytest.mark.parametrize(("effort", "sent"), [(["--effort", "low"], "low"), (["--effort", "none"], None), ([], "high")])
def test_the_effort_of_a_run(effort: list[str], sent: str | None, serving: Serving) -> None:
    server = ChatServer(chat.text("Hello."))
    result = agentkit(
        *("run", "Say hello.", "-m", "openai:toy", "--base-url", serving(server), "--env", "unsafe-local"), *effort
    )
    assert result.exit_code == 0, result.output
    assert server.requests[0].get("reasoning_effort") == sent
    assert server.requests[0]["chat_template_kwargs"]["thinking"] is (sent is not None)


def test_doctor_says_which_keys_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    found = json.loads(agentkit("doctor", "--json").output)
    assert found["keys"]["OPENAI_API_KEY"] is True and found["keys"]["ANTHROPIC_API_KEY"] is False
    assert found["apis"]["openai"] and found["apis"]["anthropic"]
    said = agentkit("doctor").output
    assert "✓ OPENAI_API_KEY  set" in said and "– ANTHROPIC_API_KEY  not set" in said and KEY not in said


def weather(body: dict[str, Any]) -> Reply:
    """Call the tool for the city in the question; the model `worse` knows only Paris, and calls when it should not."""
    city = body["messages"][-1]["content"]
    if body["model"] == "worse":
        return calls(("geo_weather", '{"city": "Paris"}'))
    return (
        text("There is no tool for that.") if city == "Nowhere" else calls(("geo_weather", json.dumps({"city": city})))
    )


def test_rows_of_bfcl_on_two_models_behind_an_api(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    function = {"name": "geo.weather", "description": "Weather.", "parameters": {
        "type": "dict", "properties": {"city": {"type": "string"}}, "required": ["city"]}}  # fmt: skip
    rows = [
        {"id": f"simple_{number}", "question": [[{"role": "user", "content": city}]], "function": [function],
         "ground_truth": [{"geo.weather": {"city": [city.lower()]}}]}
        for number, city in enumerate(("Paris", "Rome", "Bonn"))
    ]  # fmt: skip
    rows.append({"id": "irrelevance_0", "question": [[{"role": "user", "content": "Nowhere"}]], "function": [function]})
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    server = ChatServer(weather, key=KEY)
    url = serving(server)
    result = agentkit("eval", "rows.jsonl", "-m", "openai:good", "-m", "openai:worse", "--base-url", url, "--json")
    assert result.exit_code == ExitCode.OK, result.output
    found = json.loads(result.stdout)
    assert [run["mean"] for run in found["runs"]] == [1.0, 0.25]
    (compared,) = found["comparisons"]
    assert compared["total"]["difference"]["value"] == -0.75 and compared["total"]["difference"]["p_value"] == 0.25
    assert [flip["task"] for flip in compared["a_better"]] == ["simple_1", "simple_2", "irrelevance_0"]
    assert {Path(run["run"]).name for run in found["runs"]} == {"openai-good", "openai-worse"}
    # one request per trial, with the tool but without a system prompt
    assert len(server.requests) == 8
    assert {message["role"] for body in server.requests for message in body["messages"]} == {"user"}
    assert {tool["function"]["name"] for body in server.requests for tool in body["tools"]} == {"geo_weather"}


def test_a_missing_key_is_found_before_the_first_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number_task: MakeTask
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    Path("task.yaml").write_text(number_task().model_dump_json(exclude_defaults=True))
    result = agentkit("eval", "task.yaml", "-m", "openai:toy", "-m", "anthropic:toy")
    assert result.exit_code == ExitCode.USAGE and "ANTHROPIC_API_KEY" in result.output
    assert not Path("runs").exists()
