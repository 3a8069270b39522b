"""Harbor task directories: what is read, what is refused by name, and whole trials in Docker."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anyio
import pytest
import typer.testing
from hypothesis import strategies as st
from tests.fuzz import amounts, fuzz
from tests.harbor import grid
from tests.harbor import models as harbor

from agentkit.cli import app
from agentkit.environment_config import NetworkConfig
from agentkit.errors import TaskFileError, TaskSetupError
from agentkit.models.scripted import Policy
from agentkit.strict import Strict
from agentkit.task import HarborConfig, Task, load_task
from agentkit.trajectory import Trajectory
from agentkit_environments import ImageBuildError, available_backends
from agentkit_environments.folder import folder_hash
from agentkit_evals.harbor import read_task_directory
from agentkit_evals.harbor.config import DeclaredArtifact, Package, Phase, Step, TaskToml, Verifier
from agentkit_evals.harbor.config import Environment as TomlEnvironment
from agentkit_evals.harbor.read import _line, _parse
from agentkit_evals.harbor.sandbox import filled_in
from agentkit_evals.record import RunDirectory
from agentkit_evals.selfcheck import SelfCheck, selfcheck
from agentkit_evals.suite import load_suite, task_files

from .conftest import agentkit

Evaluate = Callable[..., RunDirectory]
MakeScript = Callable[..., Policy]
DOCKER = available_backends()["docker"]

TOML = """\
schema_version = "1.4"
[metadata]
difficulty = "easy"
[environment]
network_mode = "no-network"
"""
DOCKERFILE = "FROM agentkit-base:latest\nWORKDIR /app\nRUN echo 42 > n.txt\n"
TEST = """\
#!/bin/sh
if [ "$(cat /app/answer.txt)" = 42 ]; then echo 1; else echo 0; fi > /logs/verifier/reward.txt
"""
SOLVE = "#!/bin/sh\ncp n.txt answer.txt\n"
BEFORE = {
    "schema_version": "ATIF-v1.8",
    "agent": {"name": "x", "version": "1"},
    "steps": [{"step_id": 1, "source": "user", "message": "Earlier."}],
}
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Function that makes a task directory from files; None leaves a file out."""

    def write(name: str = "copy-number", **files: str | None) -> Path:
        folder = tmp_path / "tasks" / name
        content: dict[str, str | None] = {
            "task.toml": TOML,
            "instruction.md": "Copy n.txt to answer.txt.\n",
            "environment/Dockerfile": DOCKERFILE,
            "tests/test.sh": TEST,
            "solution/solve.sh": SOLVE,
            **files,
        }
        for path, text in content.items():
            if text is not None:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text)
        return folder

    return write


def config_of(task: Task) -> HarborConfig:
    assert isinstance(task.verifier, HarborConfig)
    return task.verifier


# Reading.


def test_a_directory_is_a_task(make: Make) -> None:
    toml = """\
version = "2.0"
artifacts = ["/app/out", {source = "log.txt", destination = "logs/log.txt"}]
[task]
name = "org/copy-number"
keywords = ["files"]
[metadata]
made = 2026-01-02
big = 99999999999999999999999
odd = inf
[agent]
timeout_sec = 100
user = 1001
network_mode = "public"
[verifier]
timeout_sec = 20.5
env = {MODE = "strict"}
user = "root"
[environment]
build_timeout_sec = 30.0
os = "Linux"
cpus = 2
memory = "3G"
storage_mb = 100
env = {TOKEN = "${TOKEN}"}
workdir = "/"
[environment.healthcheck]
command = "true"
retries = 2
[solution]
env = {FAST = "1"}
"""
    folder = make("Copy number!", **{"task.toml": toml, "trajectory.json": json.dumps(BEFORE)})
    task = read_task_directory(folder)
    assert (task.id, task.instruction) == ("Copy-number-", "Copy n.txt to answer.txt.\n")
    environment = task.environment
    assert environment.build is not None and environment.build.sha256 == folder_hash(folder / "environment")
    assert environment.build.timeout_s == 30 and environment.as_image and environment.backend == "docker"
    assert (environment.user, environment.workdir) == ("1001", "/")
    assert environment.network == NetworkConfig.everywhere("public")
    assert (environment.limits.memory_mib, environment.limits.cpus, environment.limits.file_size_mib) == (
        3072,
        2.0,
        100,
    )
    assert environment.env == {"TOKEN": "${TOKEN}"}, "a run's record must not have the value"
    assert task.agent.timeout_s == 100
    assert task.metadata == {
        "made": "2026-01-02",
        "big": "99999999999999999999999",
        "odd": "inf",
        "package": "org/copy-number",
    }
    config = config_of(task)
    (step,) = config.steps
    assert (step.verifier_timeout_s, step.verifier_env, step.verifier_user) == (20.5, {"MODE": "strict"}, "root")
    assert (step.tests, step.solution) == (["tests"], "./solution") and step.separate is None
    assert [artifact.source for artifact in step.artifacts] == ["/logs/artifacts", "/app/out", "log.txt"]
    assert config.healthcheck is not None and config.healthcheck.retries == 2
    assert (config.solution_env, config.history) == ({"FAST": "1"}, "trajectory.json")
    assert Task.model_validate_json(task.model_dump_json()) == task, "run.json holds the task"


def test_defaults_are_those_of_harbor(make: Make) -> None:
    task = read_task_directory(make(**{"task.toml": "", "solution/solve.sh": None}))
    assert task.solution is None and task.environment.workdir == ""
    assert task.environment.network == NetworkConfig.everywhere("public")
    assert config_of(task).steps[0].verifier_timeout_s == 600
    offline = read_task_directory(make(**{"task.toml": "environment.allow_internet = false"}))
    assert offline.environment.network == NetworkConfig()


PHASES = """\
[environment]
network_mode = "allowlist"
allowed_hosts = ["PyPI.org", "*.example.com"]
[agent]
network_mode = "no-network"
[verifier]
network_mode = "public"
"""


def test_each_phase_has_a_network(make: Make) -> None:
    task = read_task_directory(make(**{"task.toml": PHASES}))
    setup = ("pypi.org", "*.example.com")
    assert task.environment.network == NetworkConfig(setup=setup, agent="none", verifier="public")
    assert Task.model_validate_json(task.model_dump_json()) == task
    separate = PHASES + 'environment_mode = "separate"\n[verifier.environment]\nnetwork_mode = "no-network"\n'
    (step,) = config_of(read_task_directory(make(**{"task.toml": separate, "tests/Dockerfile": DOCKERFILE}))).steps
    assert step.separate is not None
    assert step.separate.network == NetworkConfig(setup="none", agent="none", verifier="public")


STEPS = """\
multi_step_reward_strategy = "final"
[environment]
network_mode = "no-network"
[verifier]
env = {A = "1", B = "1"}
[[steps]]
name = "first"
min_reward = 0.5
agent.timeout_sec = 7
[[steps]]
name = "second"
min_reward = {speed = 2}
verifier = {env = {B = "2"}, timeout_sec = 3}
"""


def test_steps_and_separate_verifiers(make: Make) -> None:
    files = {
        "task.toml": STEPS,
        "instruction.md": None,
        "steps/first/instruction.md": "Begin.",
        "steps/second/instruction.md": "Go on.",
        "steps/second/tests/test.sh": TEST,
        "steps/second/tests/Dockerfile": DOCKERFILE,
        "steps/second/solution/solve.sh": SOLVE,
    }
    folder = make(**files)
    task = read_task_directory(folder)
    first, second = config_of(task).steps
    assert config_of(task).final_step_only and task.instruction == "Begin." and task.agent.timeout_s == 7
    assert (first.tests, second.tests) == (["tests"], ["tests", "steps/second/tests"])
    assert (first.solution, second.solution) == ("solution", "steps/second/solution")
    assert (first.min_reward, second.min_reward) == ({"reward": 0.5}, {"speed": 2.0})
    assert second.verifier_env == {"A": "1", "B": "2"} and second.verifier_timeout_s == 3
    assert (first.separate, second.separate) == (None, None)

    (folder / "task.toml").write_text(STEPS.replace("[verifier]", '[verifier]\nenvironment_mode = "separate"'))
    first, second = config_of(read_task_directory(folder)).steps
    assert first.separate == task.environment and first.upload_tests, "a fresh sandbox like the agent's"
    assert second.separate is not None and second.separate.build is not None and not second.upload_tests
    assert second.separate.build.folder == str(folder / "steps/second/tests")


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ("[environment]\nmemory_gb = 2\n", ':2: unknown key "environment.memory_gb"; did you mean "memory_mb"?'),
        ("[enviroment]\ncpus = 1\n", ':1: unknown key "enviroment"; did you mean "environment"?'),
        ("[agent]\n\ntimeout_sec = 'long'\n", ":3: agent.timeout_sec: "),
        ("[agent]\ntimeout_sec = nan\n", ":2: agent.timeout_sec: "),
        ("[agent]\nuser = 'a b'\n", ":2: agent.user: 'a b' is not a user name"),
        ("a = 1\na = 2\n", ":2: not valid TOML"),
        ("a = " + "[" * 20_000, ":1: not valid TOML: nested too deeply"),
        ("metadata.x = " + "[" * 60 + "]" * 60, ":1: nested more than 50 deep"),
        ("schema_version = 2.0\n", ":1: schema_version: "),
        ("[[steps]]\nname = 'a/b'\n", ":2: steps.0.name: 'a/b' is not the name of a folder"),
        ("[[steps]]\nname = 'a'\n[[steps]]\nname = 'a'\n", "two steps are named a"),
        ("artifacts = ['/a/../etc']\n", ":1: artifacts.0.source: "),
        ("[environment]\nmemory = 'much'\n", ":2: environment.memory: 'much' is not a size"),
        ("[verifier]\nenvironment_mode = 'shared'\nenvironment = {}\n", "there is an environment; remove one of them"),
        ("[environment]\nworkdir = 'app'\n", ":2: environment.workdir: "),
        ("[environment]\nos = 'windows'\n", ":2: environment.os: only linux containers are supported"),
        ("[environment]\ngpus = 1\n", ":2: environment.gpus: GPUs in sandboxes are not supported"),
        ("[environment]\ntpu = {type = 'v4', topology = '2x2'}\n", ":2: environment.tpu: TPUs are not supported"),
        (
            "[verifier.environment]\nskills_dir = '/skills'\n",
            ":2: verifier.environment.skills_dir: only the agent can have skills",
        ),
        (
            "[[verifier.environment.mcp_servers]]\nname = 'x'\nurl = 'http://x'\n",
            ":1: verifier.environment.mcp_servers: only the agent can have MCP servers",
        ),
        ("[[environment.mcp_servers]]\nname = 'x'\n", ':1: environment.mcp_servers.0: the transport "sse" needs url'),
        (
            "[[environment.mcp_servers]]\nname = 'x'\ntransport = 'stdio'\ncommand = 'a'\nheaders = {A = 'b'}\n",
            ':1: environment.mcp_servers.0: the transport "stdio" has no headers',
        ),
        (
            "[[environment.mcp_servers]]\nname = 'x'\ntransport = 'websocket'\nurl = 'http://x'\n",
            ":3: environment.mcp_servers.0.transport: ",
        ),
        (
            "[[environment.mcp_servers]]\nname = 'x'\nurl = 'file:///etc/passwd'\n",
            ":1: environment.mcp_servers.0: url: 'file:///etc/passwd' must begin with http",
        ),
        (
            "[[environment.mcp_servers]]\nname = 'x'\nurl = 'http://x'\n" * 2,
            ":1: environment.mcp_servers: two servers are named x",
        ),
        (
            "[environment]\nnetwork_mode = 'allowlist'\nallowed_hosts = ['10.0.0.0/8']\n",
            ":3: environment.allowed_hosts: '10.0.0.0/8' is not a host",
        ),
        (
            "[agent]\nnetwork_mode = 'public'\nallowed_hosts = ['pypi.org']\n",
            'allowed_hosts need network_mode = "allowlist", got "public"',
        ),
        ("[verifier]\nallowed_hosts = ['pypi.org']\n", 'allowed_hosts need network_mode = "allowlist", got none'),
        ("[environment]\nallowed_hosts = ['pypi.org:80']\n", "'pypi.org:80' must be a host without a port"),
        ("[[steps]]\nname = 'A'\n[[steps]]\nname = 'a'\n", "two steps are named a"),
        ("[[steps]]\nname = 'nul.1'\n", ":2: steps.0.name: 'nul.1' is not the name of a folder"),
        (
            "artifacts = [{source = '/x', destination = '../x'}]\n",
            ":1: artifacts.0.destination: '../x' must be a relative",
        ),
        (
            "[[environment.mcp_servers]]\nname = 'x'\nurl = 'http://x'\nheaders = {Authorization = 'Bearer abc'}\n",
            ":1: environment.mcp_servers.0: headers: 'Authorization' is a secret; write it as ${NAME}",
        ),
        (
            "[[steps]]\nname = 'a'\nagent.network_mode = 'no-network'\n",
            ":3: steps.agent.network_mode: a network for one step is not supported",
        ),
        (
            "[[steps]]\nname = 'a'\n[steps.verifier]\nnetwork_mode = 'allowlist'\nallowed_hosts = ['pypi.org']\n",
            ":4: steps.verifier.network_mode: a network for one step is not supported",
        ),
        (
            "[[verifier.collect]]\ncommand = 'x'\nservice = 'db'\n",
            ":3: verifier.collect: service 'db': only the agent's sandbox is supported",
        ),
        ("artifacts = [{source = '/x', service = 'db'}]\n", ":1: artifacts: service 'db': only the agent's sandbox"),
        (
            "artifacts = [{source = '/x', exclude = ['[[:alpha:]]']}]\n",
            ":1: artifacts.0.exclude.0: '[[:alpha:]]': escapes and classes such as",
        ),
        ("[verifier.environment]\ngpus = 1\n", ":2: verifier.environment.gpus: "),
    ],
)
def test_wrong_and_unsupported_keys_are_named(make: Make, toml: str, problem: str) -> None:
    folder = make(**{"task.toml": toml})
    with pytest.raises(TaskFileError) as caught:
        read_task_directory(folder)
    assert problem in str(caught.value)
    assert all(line.startswith(f"{folder}/task.toml:") for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"instruction.md": None}, "instruction.md: cannot be read: No such file"),
        ({"instruction.md": ""}, "instruction"),
        ({"tests/test.sh": None}, "tests/test.sh is missing"),
        (
            {"environment/Dockerfile": None},
            "environment/Dockerfile is missing; add it, or give environment.docker_image",
        ),
        (
            {"environment/compose.yaml": "services: {}"},
            "compose.yaml: only environment/docker-compose.yaml can declare services",
        ),
    ],
)
def test_missing_files_are_named(make: Make, files: dict[str, str | None], problem: str) -> None:
    with pytest.raises(TaskFileError, match=problem):
        read_task_directory(make(**files))


def test_odd_files(make: Make, tmp_path: Path) -> None:
    folder = make()
    (folder / "task.toml").write_bytes(b"a = 1\n\xff")
    with pytest.raises(TaskFileError, match=r"task\.toml:2: not UTF-8"):
        read_task_directory(folder)
    (folder / "task.toml").write_text("")
    os.mkfifo(folder / "tests" / "pipe")
    with pytest.raises(TaskFileError, match="pipe: cannot be read: not a file"):
        read_task_directory(folder)


def test_a_task_file_cannot_name_folders_of_the_machine(tmp_path: Path) -> None:
    """A YAML file must not make agentkit upload folders of this machine."""
    path = tmp_path / "task.yaml"
    sha256 = '"' + "0" * 64 + '"'
    build = f"{{folder: /etc, sha256: {sha256}}}"
    path.write_text(f"id: a\ninstruction: x\nenvironment: {{build: {build}}}\n")
    with pytest.raises(TaskFileError, match=r":3: environment\.build: only a task directory"):
        load_task(path)
    step = "{instruction: x, agent_timeout_s: 1.0, verifier_timeout_s: 1.0, tests: [.]}"
    path.write_text(f"id: a\ninstruction: x\nverifier: {{folder: /etc, sha256: {sha256}, steps: [{step}]}}\n")
    with pytest.raises(TaskFileError, match=r":3: verifier: only a task directory"):
        load_task(path)


def test_suites_of_directories_and_files(make: Make, tmp_path: Path) -> None:
    one, two = make("one"), make("two", **{"environment/data.yaml": "id: not-a-task\n"})
    (tmp_path / "tasks" / "three.yaml").write_text("id: three\ninstruction: x\nverifier: {command: 'true'}\n")
    assert task_files(tmp_path / "tasks") == [one, tmp_path / "tasks" / "three.yaml", two]
    assert [case.task.id for case in load_suite(str(tmp_path / "tasks")).cases] == ["one", "three", "two"]
    (case,) = load_suite(str(one)).cases
    assert (case.task.id, case.family) == ("one", "one")


def test_variables_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "s3cret")
    monkeypatch.delenv("NONE", raising=False)
    given = {"A": "${KEY}", "B": "${NONE:-a:-b}", "C": "x${KEY}", "D": "${NONE:-}"}
    assert filled_in(given) == {"A": "s3cret", "B": "a:-b", "C": "x${KEY}", "D": ""}
    with pytest.raises(TaskSetupError, match="the task's variable X is \\$\\{NONE\\}, but NONE is not set"):
        filled_in({"X": "${NONE}"})


EXAMPLE = Path(__file__).parents[2] / "examples" / "harbor-task" / "task.toml"


def readable(texts: Iterable[str]) -> list[str]:
    """Return the files that we can read."""
    found = []
    for text in texts:
        with contextlib.suppress(TaskFileError):
            _parse(Path("task.toml"), text)
            found.append(text)
    return found


OUR_MODELS: dict[str, type[Strict]] = {
    "TaskConfig": TaskToml,
    "EnvironmentConfig": TomlEnvironment,
    "VerifierConfig": Verifier,
    "AgentConfig": Phase,
    "StepConfig": Step,
    "PackageInfo": Package,
    "ArtifactConfig": DeclaredArtifact,
}
"""Our models by the names of harbor's."""


def test_harbor_accepts_what_we_read() -> None:
    """Every file of the grid that we can read is accepted by harbor, and its models have no key that ours lack."""
    for text in (TOML, STEPS, PHASES, EXAMPLE.read_text(), ""):
        _parse(Path("task.toml"), text)
        harbor.check_task_config(text)
    read = readable(grid.files())
    assert len(read) > 50
    for text in read:
        harbor.check_task_config(text)
    assert [text for text in read if text not in harbor.ACCEPTED] == []
    schemas = {"TaskConfig": harbor.TASK_CONFIG, **harbor.TASK_CONFIG["$defs"]}
    for name, model in OUR_MODELS.items():
        assert set(schemas[name]["properties"]) <= set(model.model_fields), name


@pytest.mark.parametrize(
    "text",
    [
        "schema_version = 1",
        "[environment]\ncpus = []",
        "[environment]\nos = 'plan9'",
        "[[steps]]",
        "[verifier]\nenv = 1",
    ],
)
def test_harbors_schema_refuses_other_types(text: str) -> None:
    with pytest.raises(ValueError, match=r"\$\."):
        harbor.check_task_config(text)


@harbor.needs_harbor
def test_harbors_own_models_accept_what_we_read(tmp_path: Path) -> None:
    """Harbor itself says the same as the files in `tests/harbor`, which it can make again."""
    code = """
import json, sys
from harbor.models.task import config
*texts, names = json.load(sys.stdin)
for text in texts:
    try:
        config.TaskConfig.model_validate_toml(text)
    except Exception as exc:
        sys.exit(f"{text!r}: {exc}")
print(json.dumps({name: list(getattr(config, name).model_fields) for name in names}))
"""
    given = [TOML, STEPS, PHASES, EXAMPLE.read_text(), "", *readable(grid.files()), [*OUR_MODELS]]
    fields = json.loads(harbor.run_harbor(code, json.dumps(given).encode()))
    schemas = {"TaskConfig": harbor.TASK_CONFIG, **harbor.TASK_CONFIG["$defs"]}
    for name, model in OUR_MODELS.items():
        assert set(fields[name]) <= set(model.model_fields), name
        assert set(fields[name]) == set(schemas[name]["properties"]), name
    subprocess.run([harbor.PYTHON, harbor.FOLDER / "record.py", tmp_path], check=True)
    for path in tmp_path.glob("*.json"):
        assert json.loads(path.read_text()) == json.loads((harbor.FOLDER / path.name).read_text())
    assert len(list(tmp_path.iterdir())) == 3


values = st.recursive(
    st.sampled_from(["1", "-1", "0.5", "true", '"x"', '"/a"', '"public"', "nan", "inf", "1979-05-27", '"${A}"', "''"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(st.sampled_from(["a", "source", "service", "name"]), inner, max_size=2).map(
            lambda items: f"{{{', '.join(f'{key} = {value}' for key, value in items.items())}}}"
        )
    ),
    max_leaves=4,
)
tables = st.sampled_from(
    ["", "[task]", "[agent]", "[verifier]", "[environment]", "[verifier.environment]", "[[steps]]", "[metadata]", "[x"]
)
keys = st.sampled_from(
    [
        *("name", "timeout_sec", "user", "network_mode", "allowed_hosts", "env", "cpus", "memory", "memory_mb", "gpus"),
        *("artifacts", "steps", "healthcheck", "collect", "min_reward", "version", "schema_version", "os", "workdir"),
        *("mcp_servers", "transport", "url", "command", "args", "headers", "exclude"),
    ]
)
lines = st.lists(tables | st.builds(lambda key, value: f"{key} = {value}", keys, values), max_size=8)


@amounts(200, 6_000)
def test_any_toml_is_read_or_refused(examples: int) -> None:
    def check(text: str) -> None:
        try:
            _parse(Path("task.toml"), text)
        except TaskFileError as exc:
            assert all(line.startswith("task.toml:") for line in str(exc).splitlines())

    fuzz(check, lines.map("\n".join) | st.text(max_size=30), examples)


def test_lines_of_keys() -> None:
    text = 'a = 1\n[b]\nc.d = 1\n[b."e"]\nf = 2\n[[steps]]\nname = "x"\n'
    assert [_line(text, loc) for loc in (("a",), ("b", "c", "d"), ("b", "e", "f"), ("b", "e", "zzz"), ("zzz",))] == [
        *(1, 3, 5, 4, 1)
    ]
    assert _line(text, ("steps", 0, "name")) == 7


# Terminal-Bench 1.

COMPOSE = """\
services:
  client:
    build: {dockerfile: Dockerfile}
    image: ${T_BENCH_TASK_DOCKER_CLIENT_IMAGE_NAME}
    container_name: ${T_BENCH_TASK_DOCKER_CLIENT_CONTAINER_NAME}
    command: ["sh", "-c", "sleep infinity"]
    environment: ["TEST_DIR=${T_BENCH_TEST_DIR}"]
    volumes: ["${T_BENCH_TASK_LOGS_PATH}:${T_BENCH_CONTAINER_LOGS_PATH}"]
"""
RUN_TESTS = """\
#!/bin/bash
cd "$TEST_DIR" && . ./expected.sh
[ "$(cat /app/answer.txt)" = "$EXPECTED" ] && echo "PASSED test_outputs.py::test_answer" && exit
echo "FAILED test_outputs.py::test_answer - AssertionError"
"""


@pytest.fixture
def terminal_bench(tmp_path: Path) -> Make:
    """Function that makes a task directory of Terminal-Bench 1."""

    def write(**files: str | None) -> Path:
        folder = tmp_path / "tb" / "copy-number"
        content: dict[str, str | None] = {
            "task.yaml": "instruction: Copy n.txt.\ndifficulty: easy\nmax_test_timeout_sec: 30\ntags: [files]\n",
            "Dockerfile": DOCKERFILE,
            "docker-compose.yaml": COMPOSE,
            "run-tests.sh": RUN_TESTS,
            "tests/expected.sh": "EXPECTED=42\n",
            "solution.sh": "#!/bin/bash\ncp n.txt answer.txt\n",
            **files,
        }
        for path, text in content.items():
            if text is not None:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text)
        return folder

    return write


def test_a_terminal_bench_directory_is_a_task(terminal_bench: Make) -> None:
    folder = terminal_bench()
    (case,) = load_suite(str(folder.parent)).cases
    task = case.task
    assert (task.id, task.instruction, task.agent.timeout_s) == ("copy-number", "Copy n.txt.", 360)
    assert task.metadata == {"difficulty": "easy", "category": None, "tags": ["files"]}
    config = config_of(task)
    assert (config.reward, config.script, config.steps[0].tests) == (
        "pytest",
        "run-tests.sh",
        ["run-tests.sh", "tests"],
    )
    assert (config.steps[0].verifier_timeout_s, config.steps[0].solution) == (30, "solution.sh")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"task.yaml": "instruction: x\n"}, r'task\.yaml:1: missing key "difficulty"'),
        ({"task.yaml": "instruction: x\ndifficulty: easy\ncolour: red\n"}, r'task\.yaml:3: unknown key "colour"'),
        ({"task.yaml": "instruction: x\ndifficulty: easy\nparser_name: swe\n"}, "parser_name: 'swe' is not supported"),
        (
            {"task.yaml": "instruction: x\ndifficulty: easy\nrun_tests_in_same_shell: true\n"},
            "run_tests_in_same_shell is not supported",
        ),
        ({"Dockerfile": None}, "Dockerfile is missing"),
        (
            {"docker-compose.yaml": "services: {a: {build: .}, b: {build: .}}\n"},
            r":1: services: none is the agent's san",
        ),
        (
            {"docker-compose.yaml": COMPOSE + "    privileged: true\n"},
            r":9: services\.client\.privileged: the rights of",
        ),
        ({"docker-compose.yaml": "services: {client: {build: lab}}\n"}, r"services\.client: build: .*lab is missing"),
        ({"docker-compose.yaml": "services: {client: {build: ..}}\n"}, r"services\.client: build: '\.\.' lies outside"),
        ({"docker-compose.yaml": "services: {client: {}}\n", "Dockerfile": None}, "Dockerfile is missing"),
        ({"docker-compose.yaml": "services: {client: x}\n"}, r":1: services\.client: "),
        ({"docker-compose.yaml": "services: {}\n"}, r":1: services: "),
        ({"docker-compose.yaml": COMPOSE + "    cpus: 99999\n"}, r"docker-compose\.yaml:1: cpus: "),
        ({"docker-compose.yaml": "[]\n"}, ":1: expected keys and values"),
    ],
)
def test_terminal_bench_directories_that_are_refused(
    terminal_bench: Make, files: dict[str, str | None], problem: str
) -> None:
    with pytest.raises(TaskFileError, match=problem):
        read_task_directory(terminal_bench(**files))


def test_the_sandbox_and_services_of_terminal_bench(terminal_bench: Make) -> None:
    compose = """
services:
  desk:
    build: {context: client}
    container_name: ${T_BENCH_TASK_DOCKER_CLIENT_CONTAINER_NAME}
    working_dir: /app
    user: 1000
    tty: true
    command: tail -f /dev/null
    environment: ["TEST_DIR=${T_BENCH_TEST_DIR}"]
    volumes: [".:/app", "${T_BENCH_TASK_LOGS_PATH}:${T_BENCH_CONTAINER_LOGS_PATH}"]
    mem_limit: 3g
    networks: [lab]
    depends_on: [store]
  store:
    image: stock
    container_name: ${T_BENCH_TASK_DOCKER_NAME_PREFIX}__store
    networks: [lab]
networks: {lab: {driver: bridge, labels: [a=b]}}
"""
    task = read_task_directory(terminal_bench(**{"docker-compose.yaml": compose, "client/Dockerfile": DOCKERFILE}))
    main, config = task.environment, config_of(task)
    assert main.build is not None and main.build.folder == f"{config.folder}/client"
    assert (main.workdir, main.user, main.env) == ("/app", "1000", {"TEST_DIR": "/tests"})
    assert (main.limits.memory_mib, main.network.agent) == (3072, "public")
    assert (config.command, config.files, config.wait_for) == (
        ["tail", "-f", "/dev/null"],
        {"/app": "."},
        {"store": "service_started"},
    )
    (store,) = config.services
    assert (store.image, store.aliases, config.aliases) == ("stock", ["agentkit__store"], ["desk"])
    assert Task.model_validate_json(task.model_dump_json()) == task, "run.json holds the task"


@pytest.mark.parametrize(("mode", "network"), [("none", "none"), ("bridge", "public")])
def test_the_network_of_a_terminal_bench_task(terminal_bench: Make, mode: str, network: str) -> None:
    compose = f"services: {{any: {{build: ., network_mode: {mode}}}}}\n"
    task = read_task_directory(terminal_bench(**{"docker-compose.yaml": compose}))
    assert {task.environment.network.agent, task.environment.network.verifier} == {network}


# Trials in Docker.


def bash(*commands: str) -> list[list[tuple[str, dict[str, Any]]]]:
    return [[("bash", {"command": command})] for command in commands]


def checks(task: Task) -> SelfCheck:
    return anyio.run(selfcheck, task)


def remove_image(task: Task) -> None:
    image = task.environment.spec().image
    subprocess.run(["docker", "rmi", "-f", str(image)], capture_output=True, check=False)


@pytest.mark.docker
@pytest.mark.skipif(DOCKER is not None, reason=f"no Docker: {DOCKER}")
class TestInDocker:
    """Whole trials. Each task has an image of its own, built from the base image."""

    def test_a_sound_task(self, make: Make) -> None:
        task = read_task_directory(make())
        checked = checks(task)
        assert checked.problems == []
        assert (checked.oracle.reward, checked.oracle.source) == (1.0, "reward.txt")
        assert checked.forged.reward == checked.nothing.reward == 0.0
        remove_image(task)

    def test_a_sound_terminal_bench_task(self, terminal_bench: Make) -> None:
        task = read_task_directory(terminal_bench())
        checked = checks(task)
        assert checked.problems == []
        assert (checked.oracle.source, checked.oracle.tests, checked.nothing.tests) == ("tests", 1, 1)
        remove_image(task)

    def test_the_example(self) -> None:
        folder = Path(__file__).parents[2] / "examples" / "harbor-task"
        checked = typer.testing.CliRunner().invoke(app, ["check", str(folder)])
        assert (checked.exit_code, checked.stdout.split()) == (0, "✓ harbor-task 1/1 tasks are sound".split())
        remove_image(read_task_directory(folder))

    def test_tests_that_write_no_reward_cannot_be_trusted(self, make: Make) -> None:
        """The agent's reward file is gone before the tests run, so it does not become their reward."""
        task = read_task_directory(make(**{"tests/test.sh": "#!/bin/sh\nls /logs/verifier; exit 0\n"}))
        checked = checks(task)
        assert (checked.forged.reward, checked.forged.source, checked.forged.output) == (0.0, "missing", "")
        assert "wrote neither reward.json nor reward.txt" in checked.problems[0]
        remove_image(task)

    def test_the_agent_is_told_its_skills(self, make: Make, evaluate: Evaluate, script: MakeScript) -> None:
        skills = {
            "csv": "---\nname: csv\ndescription: >\n  Read and write\n  tables.\n---\nUse the csv module.\n",
            "no-front-matter": "Just text.\n",
            "no-description": "---\nname: x\n---\n",
            "not-yaml": "---\nname: [\n---\n",
            "odd name": "---\r\nname: odd\r\ndescription: 'Odd: yes'\r\n---\r\n",
        }
        files = {f"environment/skills/{name}/SKILL.md": text for name, text in skills.items()}
        build = DOCKERFILE + "COPY skills /skills/\nRUN mkdir /skills/empty /skills/huge\n"
        build += "RUN head -c 2000000 /dev/zero > /skills/huge/SKILL.md\n"
        toml = TOML + "skills_dir = '/skills'\n"
        task = read_task_directory(make(**{"task.toml": toml, "environment/Dockerfile": build, **files}))
        done = evaluate((task, script([("bash", {"command": "cp n.txt answer.txt"})], "Done.")), backend=None)
        (trial,) = done.trials
        trajectory = done.trajectory(trial)
        assert (trial.error, trial.reward) == (None, 1.0) and trajectory is not None
        said = next(message.content for message in trajectory.messages if message.role == "user")
        assert said.splitlines() == [
            "Copy n.txt to answer.txt.",
            "",
            "These skills are available. Before you do what one describes, read its file.",
            "- csv (/skills/csv/SKILL.md): Read and write tables.",
            "- odd (/skills/odd name/SKILL.md): Odd: yes",
        ]
        remove_image(task)

    def test_no_process_of_the_agent_outlives_it(self, make: Make, evaluate: Evaluate, script: MakeScript) -> None:
        """A daemon of root writes the answer and the reward without end; while the tests run, it is dead."""
        forge = "while :; do echo 42 > /app/answer.txt; echo 1 > /logs/verifier/reward.txt; done"
        test = """\
#!/bin/sh
rm -f /app/answer.txt
grep -sl '[f]orge' /proc/[0-9]*/cmdline
for _ in $(seq 100000); do :; done
[ -e /app/answer.txt ] && echo 1 > /logs/verifier/reward.txt || echo 0 > /logs/verifier/reward.txt
"""
        task = read_task_directory(make(**{"tests/test.sh": test}))
        start = f"echo '{forge}' > /forge.sh; setsid sh /forge.sh > /dev/null 2>&1 &"
        lives = "rm /app/answer.txt; until [ -s /app/answer.txt ]; do :; done; id -u; pgrep -c -f '[f]orge.sh'"
        done = evaluate((task, script(*bash(start, lives), "Done.")), backend=None)
        (trial,) = done.trials
        trajectory = done.trajectory(trial)
        assert trajectory is not None
        result = [message.content for message in trajectory.messages if message.role == "tool"][1]
        assert result.split()[:2] == ["0", "1"], "the daemon outlives the call that started it, as root"
        assert (trial.reward, trial.error, trial.verifier_output) == (0.0, None, "")
        remove_image(task)

    def test_a_trial_runs_unchanged(
        self, make: Make, evaluate: Evaluate, script: MakeScript, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Users, variables, the image's entry point, prior context and a reward as JSON, in one task."""
        monkeypatch.setenv("HARBOR_TOKEN", "t0ken")
        toml = """\
[environment]
network_mode = "no-network"
env = {TOKEN = "${HARBOR_TOKEN}"}
[environment.healthcheck]
command = "test -e /app/ready && test $(id -u) = 1000"
interval_sec = 0.1
retries = 200
[agent]
user = 1000
[verifier]
env = {WANTED = "${HARBOR_TOKEN}"}
"""
        dockerfile = (
            DOCKERFILE
            + "RUN chmod 777 /app\n"
            + 'ENTRYPOINT ["/bin/sh", "-c", "echo $(id -u) >> /app/ready; exec \\"$@\\"", "sh"]\n'
        )
        test = """\
#!/bin/sh
said="$(cat /app/who) $(id -un) $TOKEN"
echo "got $said; started $(wc -l < /app/ready) times"
[ "$said" = "agent 1000 root $WANTED" ] && quality=0.5 || quality=0
printf '{"reward": %s, "speed": 3}' "$quality" > /logs/verifier/reward.json
echo 1 > /logs/verifier/reward.txt
"""
        files = {"task.toml": toml, "environment/Dockerfile": dockerfile, "tests/test.sh": test}
        task = read_task_directory(make(**files, **{"trajectory.json": json.dumps(BEFORE)}))
        policy = script(*bash("echo agent $(id -u) > who; touch /etc/x; ls /tests /solution"), "Done.")
        done = evaluate((task, policy), backend=None)
        (trial,) = done.trials
        assert (trial.reward, trial.failure, trial.backend, trial.status) == (0.5, "model", "docker", "answered")
        assert trial.verifier_output == "got agent 1000 root t0ken; started 2 times"
        trajectory = done.trajectory(trial)
        assert trajectory is not None and trajectory.messages[1].content == "Earlier."
        result = next(message.content for message in trajectory.messages if message.role == "tool")
        assert "/etc/x" in result and "Permission denied" in result, "the agent is not root"
        assert "/tests" in result and "/solution" in result and "No such file" in result
        assert "t0ken" not in (done.path / "run.json").read_text()
        remove_image(task)

    def test_steps_share_a_sandbox_and_a_session(self, make: Make, evaluate: Evaluate, script: MakeScript) -> None:
        toml = """\
multi_step_reward_strategy = "mean"
environment.network_mode = "no-network"
[[steps]]
name = "one"
min_reward = 0.5
[[steps]]
name = "two"
min_reward = 1
[[steps]]
name = "three"
"""
        test = "#!/bin/sh\ncat /app/n.txt; ls /tests\ncp /app/n.txt /logs/verifier/reward.txt\n"
        files: dict[str, str | None] = {"task.toml": toml, "tests/test.sh": test, "instruction.md": None}
        for step in ("one", "two", "three"):
            files[f"steps/{step}/instruction.md"] = f"Do {step}."
        files["steps/two/workdir/setup.sh"] = "cat n.txt > seen; ls /tests >> seen 2>&1; cat new.txt >> seen"
        files["steps/two/workdir/new.txt"] = "new"
        files["steps/two/tests/extra"] = "x"
        task = read_task_directory(make(**files))
        policy = script(*bash("echo 0.75 > n.txt"), "One.", *bash("cat seen; echo 0.25 > n.txt"), "Two.")
        done = evaluate((task, policy), backend=None)
        (trial,) = done.trials
        assert trial.reward == 0.5, "the mean of 0.75 and 0.25; the third step is not reached"
        lines = trial.verifier_output.splitlines()
        assert lines[:4] == ["[step one: reward 0.75]", "0.75", "test.sh", "[step two: reward 0.25]"]
        assert lines[4:] == ["0.25", "extra", "test.sh"]
        trajectory = done.trajectory(trial)
        assert trajectory is not None
        users = [message.content for message in trajectory.messages if message.role == "user"]
        assert users == ["Do one.", "Do two."]
        seen = [message.content for message in trajectory.messages if message.role == "tool"][1]
        assert seen.splitlines()[0] == "0.75" and "/tests" in seen and seen.rstrip().endswith("new")
        assert trial.usage.turns == 4, "the usage of both steps"
        remove_image(task)

    def test_a_separate_verifier_gets_only_the_artifacts(
        self, make: Make, evaluate: Evaluate, script: MakeScript
    ) -> None:
        toml = """\
artifacts = ["out.txt", {source = "/app/results", exclude = ["*.tmp", "cache"]}, "/nowhere", "/app/results"]
[environment]
network_mode = "no-network"
[verifier]
environment_mode = "separate"
[[verifier.collect]]
command = "echo collected > results/collected"
"""
        test = """\
#!/bin/sh
cd /app; cat n.txt out.txt results/a results/collected /logs/artifacts/note; ls; ls results
ls /usr/local/bin 2>/dev/null | grep -cx ls
test "$(cat out.txt)" = 42 && echo 1 > /logs/verifier/reward.txt
"""
        task = read_task_directory(make(**{"task.toml": toml, "tests/test.sh": test}))
        command = (
            "echo 42 > out.txt; mkdir -p results/cache/deep; echo a > results/a; touch results/b.tmp;"
            "echo note > /logs/artifacts/note; echo 0 > n.txt;"
            "touch left-behind; mkdir -p /usr/local/bin;"
            "printf '#!/bin/sh\\necho forged' > /usr/local/bin/ls; chmod +x /usr/local/bin/ls"
        )
        (trial,) = evaluate((task, script(*bash(command), "Done.")), backend=None).trials
        assert (trial.reward, trial.error) == (1.0, None)
        shown = "42 42 a collected note n.txt out.txt results a collected 0"
        assert trial.verifier_output.split() == shown.split()
        remove_image(task)

    def test_mcp_servers_run_in_the_sandbox(self, make: Make, evaluate: Evaluate, script: MakeScript) -> None:
        toml = """\
environment.network_mode = "no-network"
[[environment.mcp_servers]]
name = "notes"
transport = "stdio"
command = "python3"
args = ["/srv/server.py", "strict"]
[[environment.mcp_servers]]
name = "web"
transport = "http"
url = "http://localhost:8000/mcp"
headers = {Authorization = "Bearer ${WEB_TOKEN:-t0ken}"}
[[steps]]
name = "one"
healthcheck = {command = "CONNECT", interval_sec = 0.1, retries = 200}
[[steps]]
name = "two"
healthcheck = {command = "CONNECT", interval_sec = 0.1, retries = 200}
"""
        toml = toml.replace(
            "CONNECT", "python3 -c 'import socket; socket.create_connection((\\\"localhost\\\", 8000))'"
        )
        dockerfile = (
            DOCKERFILE
            + 'COPY *.py /srv/\nENTRYPOINT ["/bin/sh", "-c", "python3 /srv/web.py 8000 & exec \\"$@\\"", "sh"]\n'
        )
        test = "#!/bin/sh\nsort -u calls; ls /tmp; cp n.txt /logs/verifier/reward.txt\n"
        files = {"task.toml": toml, "environment/Dockerfile": dockerfile, "tests/test.sh": test}
        for name, source in (("server", "rough_mcp_server"), ("web", "small_http_mcp_server")):
            files[f"environment/{name}.py"] = (Path(__file__).parents[1] / "tools" / f"{source}.py").read_text()
        for step in ("one", "two"):
            files[f"steps/{step}/instruction.md"] = "Call."
        task = read_task_directory(make(**files))
        calls = [("notes__echo", {"text": "hello"}), ("web__where", {})]
        policy = script(calls, "Done.", [("notes__echo", {"text": "again"})], "Done.")
        done = evaluate((task, policy), backend=None)
        (trial,) = done.trials
        assert (trial.reward, trial.error) == (42.0, None)
        assert trial.verifier_output.splitlines()[1:2] == ["echo"], "the server ran in the sandbox; its pipes are gone"
        trajectory = done.trajectory(trial)
        assert trajectory is not None
        results = [message.content for message in trajectory.messages if message.role == "tool"]
        assert [json.loads(results[0]), json.loads(results[2])] == [{"text": "hello"}, {"text": "again"}]
        assert results[1] == "sandbox Bearer t0ken localhost:8000"
        remove_image(task)

    def test_a_server_that_does_not_start_is_the_tasks_fault(
        self, make: Make, evaluate: Evaluate, script: MakeScript
    ) -> None:
        toml = TOML + '[[environment.mcp_servers]]\nname = "notes"\ntransport = "stdio"\ncommand = "no-such-program"\n'
        (trial,) = evaluate((read_task_directory(make(**{"task.toml": toml})), script("Done.")), backend=None).trials
        assert (trial.reward, trial.failure) == (None, "task")
        assert (trial.error or "").startswith("MCP server notes: it ended before it answered")

    @pytest.mark.parametrize(
        ("command", "error"),
        [
            ("echo no database; exit 3", r"health check .* failed 2 times: exit status 3, no database"),
            ("echo waiting; sleep 60", r"health check .* failed 2 times: no end within 1 s, waiting"),
        ],
    )
    def test_a_sandbox_that_never_becomes_healthy_is_the_tasks_fault(
        self, make: Make, evaluate: Evaluate, script: MakeScript, command: str, error: str
    ) -> None:
        check = f'[environment.healthcheck]\ncommand = "{command}"\ninterval_sec = 0\ntimeout_sec = 1\nretries = 2\n'
        task = read_task_directory(make(**{"task.toml": TOML + check}))
        (trial,) = evaluate((task, script("Done.")), backend=None).trials
        assert (trial.reward, trial.failure, trial.usage.turns) == (None, "task", 0)
        assert re.search(error, trial.error or ""), trial.error
        remove_image(task)

    @pytest.mark.parametrize("patience", ["retries = 4", "start_period_sec = 300\nretries = 1"])
    def test_the_agent_waits_until_the_sandbox_is_healthy(
        self, make: Make, evaluate: Evaluate, script: MakeScript, patience: str
    ) -> None:
        command = "echo >> /checks; test $(wc -l < /checks) = 4"
        check = f'command = "{command}"\ninterval_sec = 0.01\nstart_interval_sec = 0.01\n{patience}\n'
        toml = f"{TOML}[environment.healthcheck]\n{check}"
        test = "#!/bin/sh\ncp seen /logs/verifier/reward.txt\n"
        task = read_task_directory(make(**{"task.toml": toml, "tests/test.sh": test}))
        (trial,) = evaluate((task, script(*bash("wc -l < /checks > seen"), "Done.")), backend=None).trials
        assert (trial.reward, trial.error) == (4.0, None), "the agent starts after the fourth check"
        remove_image(task)

    def test_images_that_cannot_be_built(self, make: Make) -> None:
        folder = make(**{"environment/Dockerfile": "FROM agentkit-missing.invalid/base:1\nRUN true\n"})
        with pytest.raises(ImageBuildError) as caught:
            checks(read_task_directory(folder))
        said = str(caught.value)
        assert f"{folder}/environment/Dockerfile, step 1 of 2: FROM agentkit-missing.invalid/base:1" in said
        assert "the base image agentkit-missing.invalid/base:1 is missing and could not be pulled" in said

        (folder / "environment/Dockerfile").write_text("FROM agentkit-base:latest\nRUN echo why; exit 7\n")
        with pytest.raises(ImageBuildError, match=r"(?s)step 2 of 2: RUN echo why; exit 7: .*code: 7\n.*why"):
            checks(read_task_directory(folder))

        task = read_task_directory(folder)
        (folder / "environment/Dockerfile").write_text(DOCKERFILE)
        with pytest.raises(ImageBuildError, match="has changed since the task was read"):
            checks(task)
        (folder / "environment/Dockerfile").write_text("FROM agentkit-base:latest\nRUN exit 7\n")
        checked = typer.testing.CliRunner().invoke(app, ["check", str(folder)])
        assert checked.exit_code == 1 and "step 2 of 2: RUN exit 7" in checked.stdout, (
            "other tasks would be checked, too"
        )

    def test_an_image_is_built_once_for_each_content(self, make: Make, untrained: Path) -> None:
        """The base image is gone after the first build, so that a second one would fail."""
        base, run = f"localhost:1/agentkit-base:{os.getpid()}", typer.testing.CliRunner()
        subprocess.run(["docker", "tag", "agentkit-base:latest", base], check=True)
        folder = make(**{"environment/Dockerfile": DOCKERFILE.replace("agentkit-base:latest", base)})
        task = read_task_directory(folder)
        checked = run.invoke(app, ["check", str(folder)])
        subprocess.run(["docker", "rmi", base], check=True, capture_output=True)
        assert checked.exit_code == 0, checked.output
        ran = run.invoke(app, ["run", str(folder), "-m", str(untrained), "--max-tokens", "4", "--json"])
        assert json.loads(ran.stdout)["limit"] == "max_tokens", ran.output
        assert run.invoke(app, ["check", str(folder)]).exit_code == 0

        with (folder / "environment/Dockerfile").open("a") as file:
            file.write("RUN true\n")
        checked = run.invoke(app, ["check", str(folder)])
        assert checked.exit_code == 1 and f"step 1 of 4: FROM {base}: the base image" in checked.stdout, checked.output
        remove_image(task)

    @pytest.mark.parametrize(
        ("test", "error"),
        [
            ("echo nan > /logs/verifier/reward.txt", "reward.txt must hold numbers within"),
            (
                "echo 1 > /logs/verifier/reward.txt; echo '[1' > /logs/verifier/reward.json",
                "reward.json must hold numbers",
            ),
            ('echo \'{"a": 1, "b": 1}\' > /logs/verifier/reward.json', "expected a number named `reward`, got a, b"),
            ("sleep 60; echo 1 > /logs/verifier/reward.txt", "the tests timed out after 1 s"),
        ],
    )
    def test_rewards_that_cannot_be_used(
        self, make: Make, evaluate: Evaluate, script: MakeScript, test: str, error: str
    ) -> None:
        toml = f"{TOML}[verifier]\ntimeout_sec = 1\n" if "sleep" in test else TOML
        task = read_task_directory(make(**{"tests/test.sh": f"#!/bin/sh\n{test}\n", "task.toml": toml}))
        (trial,) = evaluate((task, script("Done.")), backend=None).trials
        assert (trial.reward, trial.failure) == (0.0, "model") and error in (trial.error or "")

    def test_commands(self, make: Make, untrained: Path, tmp_path: Path) -> None:
        folder = make()
        run = typer.testing.CliRunner()
        checked = run.invoke(app, ["check", str(tmp_path / "tasks"), "--json"])
        assert (checked.exit_code, json.loads(checked.stdout)) == (0, {"copy-number": []}), checked.output
        options = ["-m", str(untrained), "--max-tokens", "4", "--trajectory", str(tmp_path / "t.jsonl"), "--json"]
        ran = run.invoke(app, ["run", str(folder), *options])
        assert ran.exit_code == 1, ran.output
        found = json.loads(ran.stdout)
        assert (found["reward"], found["backend"], found["limit"]) == (0.0, "docker", "max_tokens")
        assert Trajectory.load(tmp_path / "t.jsonl").messages[1].content == "Copy n.txt to answer.txt.\n"
        refused = run.invoke(app, ["run", str(folder), "-m", str(untrained), "--workdir", str(tmp_path)])
        assert refused.exit_code == 2 and "folder of its image; leave it out" in refused.output
        refused = run.invoke(app, ["run", str(folder), "-m", str(untrained), "--env", "process"])
        assert refused.exit_code == 3 and "no images" in refused.output
        remove_image(read_task_directory(folder))

    def test_a_folder_of_directories_is_evaluated(self, make: Make, untrained: Path, tmp_path: Path) -> None:
        short = f"{TOML}[agent]\ntimeout_sec = 1\n"
        folders = [
            make(**{"task.toml": short}),
            make("always", **{"task.toml": short, "tests/test.sh": "#!/bin/sh\necho 1 > /logs/verifier/reward.txt\n"}),
        ]
        done = agentkit("eval", tmp_path / "tasks", "-m", untrained, "--out", tmp_path / "run", "--json")
        found = json.loads(done.stdout)
        assert (found["solved"], found["trials"], found["mean"]) == (1, 2, 0.5)
        run = RunDirectory.open(tmp_path / "run")
        scored = {trial.task: (trial.reward, trial.backend, trial.error) for trial in run.trials}
        assert scored == {"always": (1.0, "docker", None), "copy-number": (0.0, "docker", None)}
        for folder in folders:
            remove_image(read_task_directory(folder))
