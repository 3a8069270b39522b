"""The setup, the agent and the verifier of a task each have their own network, and what is refused is in the record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agentkit.models.scripted import Policy
from agentkit.task import Task
from agentkit_evals.record import RunDirectory
from agentkit_evals.selfcheck import selfcheck
from agentkit_evals.verify import Backend

FETCH = (
    "python3 -c 'import urllib.request as u; u.urlopen(\"http://files.example.org/\")' 2>&1 | grep -o 'network[.].*'"
)
NETWORK = {"setup": ["a.example.com"], "agent": ["b.example.com"], "verifier": "none"}
REFUSED = [
    "setup: files.example.org:80: not in the allowlist: add it to network.setup",
    "agent: files.example.org:80: not in the allowlist: add it to network.agent",
    "verifier: files.example.org:80: network.verifier is none",
]


@pytest.fixture
def task(backend: Backend, number_task: Callable[..., Task]) -> Task:
    if backend == "unsafe-local":
        pytest.skip("not applicable: unsafe-local has no network of its own")
    return number_task(
        environment={"setup": [f"{FETCH} > n.txt"], "network": NETWORK, "backend": backend},
        verifier={"command": f"test \"$AGENTKIT_ANSWER\" = 'network.agent' && {FETCH}", "timeout_s": 20.0},
        solution={"command": FETCH},
    )


def test_each_phase_has_its_network(
    task: Task, evaluate: Callable[..., RunDirectory], script: Callable[..., Policy]
) -> None:
    calls: list[Any] = [
        [("bash", {"command": f"{FETCH} >> n.txt; cat n.txt"})],
        [("submit", {"answer": "network.agent"})],
    ]
    (trial,) = evaluate((task, script(*calls)), backend=None).trials
    assert trial.solved, trial.verifier_output
    assert trial.refused == REFUSED
    assert "[3 destinations were refused by the task's network:]" in trial.verifier_output
    assert trial.verifier_output.endswith(REFUSED[-1])


@pytest.mark.anyio
async def test_a_solution_has_the_network_of_the_agent(task: Task) -> None:
    assert (await selfcheck(task)).problems == []
