"""A sandbox in which many generated tasks run, one after the other: it is reset between tasks, not opened again.

The programs that run in it are oracles and verifiers of this package, so a verifier runs in the sandbox of its oracle.
"""

from __future__ import annotations

import io
import secrets
import tarfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from agentkit.messages import Message
from agentkit.task import VerifierConfig
from agentkit.thinking import Thinking
from agentkit_environments import Environment, EnvironmentSpec, open_environment
from agentkit_evals.synth.oracle import OracleError, transcript
from agentkit_evals.synth.task import SynthTask
from agentkit_evals.verify import Backend

CLEAR = 'find . -mindepth 1 -delete; rm -rf "$1"'


class OracleSandbox:
    """One sandbox, as an async context manager. Raises SandboxUnavailableError on entry if none can be opened."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    async def __aenter__(self) -> Self:
        self._environment: Environment = await open_environment(EnvironmentSpec(), backend=self.backend)
        self._verifier_dir = f"/tmp/agentkit-{secrets.token_hex(8)}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._environment.close()

    async def solve(self, synth: SynthTask, *, thinking: Thinking) -> tuple[list[Message], str]:
        """Run a task's oracle and its verifier; return the messages and the answer.

        Raises:
            OracleError: the verifier rejects the outcome.
        """
        await self._reset(synth.task.environment.files)
        messages, answer = await transcript(synth, self._environment, thinking=thinking)
        if output := await self._rejects(synth, answer):
            raise OracleError(f"{synth.task.id}: answered {answer!r}, which its verifier rejects: {output}")
        return messages, answer

    async def check_idle(self, synth: SynthTask) -> None:
        """Run the verifier on the untouched files. Raises OracleError if it accepts them."""
        await self._reset(synth.task.environment.files)
        if not await self._rejects(synth, ""):
            raise OracleError(f"{synth.task.id}: its verifier accepts an agent that did nothing")

    async def _reset(self, files: Mapping[str, str]) -> None:
        await self._environment.exec(["/bin/sh", "-c", CLEAR, "sh", self._verifier_dir])
        await self._environment.import_dir(self._environment.spec.workdir, _archive(files))

    async def _rejects(self, synth: SynthTask, answer: str) -> str:
        """Return the exit code and output of a verifier that rejects an answer; "" if it accepts the answer."""
        verifier = synth.task.verifier
        assert isinstance(verifier, VerifierConfig)
        for path, text in verifier.files.items():
            await self._environment.write_file(f"{self._verifier_dir}/{path}", text)
        variables = {"AGENTKIT_ANSWER": answer, "AGENTKIT_VERIFIER_DIR": self._verifier_dir, "PYTHONSAFEPATH": "1"}
        result = await self._environment.exec(verifier.command, env=variables)
        return "" if result.exit_code == 0 else f"exit code {result.exit_code}, {result.stdout}{result.stderr}"


def _archive(files: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, text in files.items():
            data = text.encode()
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def turns(messages: Sequence[Message]) -> int:
    """Return the number of assistant messages."""
    return sum(message.role == "assistant" for message in messages)
