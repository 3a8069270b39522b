"""Task directories of Harbor and Terminal-Bench 1, read and run unchanged.

config.py          the keys of task.toml
read.py            a Harbor directory as a task
terminal_bench.py  a Terminal-Bench 1 directory as a task
sandbox.py         the image of a task, and variables of this machine
compose.py         the keys of docker-compose.yaml
services.py        the services of a task
servers.py         the MCP servers of a task
artifacts.py       what a separate verifier gets of the agent's sandbox
episode.py         a trial: the steps of a task in one sandbox, and their verification
"""

from __future__ import annotations

from pathlib import Path

from agentkit.task import Task
from agentkit_evals.harbor.read import is_harbor, read_harbor
from agentkit_evals.harbor.terminal_bench import is_terminal_bench, read_terminal_bench


def is_task_directory(folder: Path) -> bool:
    """Return whether a folder is one task, as opposed to a folder of tasks."""
    return is_harbor(folder) or is_terminal_bench(folder)


def read_task_directory(folder: Path) -> Task:
    """Read a task directory. Raises TaskFileError; the message has file and line."""
    return read_harbor(folder) if is_harbor(folder) else read_terminal_bench(folder)
