"""Task files are read strictly: every mistake gives the file, the line and what is expected."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from agentkit.errors import TaskFileError
from agentkit.task import LimitsConfig, Task, load_task
from agentkit_environments import Network, ResourceLimits
from agentkit_tools import BUILTINS

GOOD = """\
id: count-errors
instruction: How many lines of app.log contain ERROR? Submit the number.
environment:
  files:
    app.log: !file app.log
    notes/readme.txt: |
      hello
  setup: ["mkdir -p out"]
  workdir: /app
  limits: {memory_mib: 256}
tools:
  - bash
  - name: weather
    description: Tell the weather.
    parameters: {type: object, properties: {city: {type: string}}, required: [city]}
    command: cat
  - submit
agent: {thinking: never, max_turns: 4}
verifier:
  command: test "$AGENTKIT_ANSWER" = 2
solution: {command: grep -c ERROR app.log}
metadata: {source: hand-written}
"""


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "app.log").write_text("ERROR a\nok\nERROR b\n")
    path = tmp_path / "task.yaml"
    path.write_text(text)
    return path


def problem(tmp_path: Path, text: str) -> str:
    with pytest.raises(TaskFileError) as caught:
        load_task(write(tmp_path, text))
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("none", Network()),
        ("public", Network.everywhere("public")),
        ("[PyPI.org]", Network.everywhere(["pypi.org"])),
        ("{setup: public, agent: ['*.example.com:443']}", Network(setup="public", agent=["*.example.com:443"])),
    ],
)
def test_a_network_is_that_of_every_phase_or_of_each(tmp_path: Path, network: str, expected: Network) -> None:
    task = load_task(write(tmp_path, f"id: x\ninstruction: y\nenvironment:\n  network: {network}\n"))
    assert task.environment.spec().network == expected
    assert Task.model_validate_json(task.model_dump_json()) == task


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("all", "task.yaml:4: environment.network: network must be none, public or a list of hosts, got 'all'"),
        ("[5]", "task.yaml:4: environment.network: a host must be text, got 5"),
        ("{agent: [https://pypi.org]}", "task.yaml:4: environment.network.agent: 'https://pypi.org' is not a host"),
        ("{agents: none}", 'task.yaml:4: unknown key "environment.network.agents"; did you mean "agent"?'),
    ],
)
def test_a_wrong_network_is_named(tmp_path: Path, network: str, message: str) -> None:
    assert message in problem(tmp_path, f"id: x\ninstruction: y\nenvironment:\n  network: {network}\n")


def test_reads_a_whole_task(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, GOOD))
    assert task.environment.files == {"app.log": "ERROR a\nok\nERROR b\n", "notes/readme.txt": "hello\n"}
    assert task.environment.spec().limits == ResourceLimits(memory_mib=256)
    assert task.environment.spec().network == Network()
    assert [tool.name for tool in task.build_tools()] == ["bash", "weather", "submit"]
    assert (task.agent.thinking, task.agent.effort, task.agent.max_turns) == ("never", "high", 4)


def test_defaults_match_the_packages() -> None:
    task = Task(id="a", instruction="Say hi.")
    assert task.tools == list(BUILTINS)
    assert task.environment.limits == LimitsConfig(**dataclasses.asdict(ResourceLimits()))
    assert task.verifier is None


def test_a_task_can_name_bash_session_which_is_no_default(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text("id: one\ninstruction: Go on.\ntools: [bash_session, submit]\n")
    assert [tool.name for tool in load_task(path).build_tools()] == ["bash_session", "submit"]
    path.write_text("id: one\ninstruction: Go on.\n")
    assert "bash_session" not in [tool.name for tool in load_task(path).build_tools()]


def test_an_output_schema_leaves_submit_out_of_the_default_tools() -> None:
    schema = {"type": "object", "properties": {"degrees": {"type": "integer"}}}
    task = Task(id="a", instruction="Measure.", output_schema=schema)
    assert task.tools == [name for name in BUILTINS if name != "submit"]
    assert Task.model_validate_json(task.model_dump_json()) == task
    assert Task(id="a", instruction="Measure.", output_schema=schema, tools=["submit"]).tools == ["submit"]


def test_a_task_survives_its_own_dump(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, GOOD))
    assert Task.model_validate_json(task.model_dump_json()) == task


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("verifier:", "verfier:", 'task.yaml:19: unknown key "verfier"; did you mean "verifier"?'),
        ("max_turns: 4", "turns: 4", 'task.yaml:18: unknown key "agent.turns"; did you mean "max_turns"?'),
        (
            "metadata:",
            "output_schema: {type: strin}\nmetadata:",
            "task.yaml:22: output_schema: $.type: 'strin' is not valid under any of the given schemas; "
            "expected a JSON schema",
        ),
        ("    command: cat", "    cmd: cat", 'task.yaml:16: unknown key "tools.1.cmd"; did you mean "command"?'),
        ("max_turns: 4", "zzz: 4", 'unknown key "agent.zzz"; expected one of thinking, effort, max_turns, '),
        ("max_turns: 4", "max_turns: four", "task.yaml:18: agent.max_turns: input should be a valid integer, got str"),
        ("max_turns: 4", "max_turns: 0", "task.yaml:18: agent.max_turns: input should be greater than or equal to 1"),
        (
            "memory_mib: 256",
            "memory_mib: '256'",
            "task.yaml:10: environment.limits.memory_mib: input should be a valid",
        ),
        ("thinking: never", "thinking: often", "'always', 'never' or 'auto', got str 'often'"),
        ("  - bash", "  - bsah", 'task.yaml:12: tools.0: unknown tool "bsah"; built in: bash, read_file, write_file'),
        ("  - submit", "  - bash", "task.yaml:11: tools: duplicate tools: bash"),
        ("name: weather", "name: the weather", "task.yaml:13: tools.1: tool name 'the weather': expected 1 to 64"),
        ("{type: object,", "{type: objct,", "task.yaml:13: tools.1: tool 'weather'"),
        ("  - submit", "  - 7", "task.yaml:17: tools.2: input should be a valid string, got int 7"),
        ("id: count-errors", "id: ../x", "task.yaml:1: id: string should match pattern"),
        ("id: count-errors\n", "", 'task.yaml:1: missing key "id"'),
        ("workdir: /app", "workdir: /etc", "task.yaml:3: environment: workdir must be outside the system"),
        ("notes/readme.txt", "/etc/passwd", "task.yaml:6: environment.files./etc/passwd: '/etc/passwd' must be a"),
        ("notes/readme.txt", "../up", "'../up' must be a relative path without '..'"),
        ("!file app.log", "!file gone.log", "task.yaml:5: not valid YAML: !file gone.log cannot be read as text"),
        ("!file app.log", "!file ../secret", "task.yaml:5: not valid YAML: !file ../secret lies outside"),
        ("!file app.log", "!shell date", "task.yaml:5: not valid YAML: could not determine a constructor"),
        ("metadata: {", "metadata: [", "task.yaml:22: not valid YAML: while parsing a flow sequence"),
        ("metadata:", "id:", 'task.yaml:22: not valid YAML: duplicate key "id"'),
    ],
)
def test_each_mistake_has_file_line_and_remedy(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    assert expected in problem(tmp_path, GOOD.replace(old, new))


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("verifier:", "verfier:").replace("max_turns: 4", "turns: 4")
    assert [line.split(": ")[0] for line in problem(tmp_path, text).splitlines()] == ["task.yaml:18", "task.yaml:19"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "task.yaml:1: expected keys and values (id, instruction"),
        ("- a\n", "got list ['a']"),
        ("a: 1\n---\nb: 2\n", "task.yaml:2: not valid YAML: expected a single document"),
        ("a: \x07", "task.yaml:1: not valid YAML: "),
    ],
)
def test_files_that_are_not_tasks(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problem(tmp_path, text)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match=r"gone\.yaml: cannot be read: No such file"):
        load_task(tmp_path / "gone.yaml")
    (tmp_path / "b.yaml").write_bytes(b"id: \xff")
    with pytest.raises(TaskFileError, match="not UTF-8 text: byte 4 is 0xff"):
        load_task(tmp_path / "b.yaml")
