"""The run directory: the files that an evaluation writes while it runs, and the code that reads them.

    run.json            fixed at the start: tasks, model, seed, epochs, versions
    trials.jsonl        one line per finished trial, appended when it finishes
    trajectories/       one file per trial, written while the trial runs
    patches/            one file per trial whose task is scored by tests: the agent's changes
    attempts/TRIAL/     trajectories and patches of earlier attempts of a trial, numbered from 1
    trials.torn         incomplete last lines that were cut from trials.jsonl when a run was resumed
    report.html         the report

The directory can be read at any moment. An interrupted or killed run reads as a run with fewer trials, and can be
resumed (`resume.py`). A trial is finished once its line in trials.jsonl is complete. A resumed run goes on with trials
that are not, and starts those again that an infrastructure failure kept from being scored. Of such a trial, the last
line counts.
"""

from __future__ import annotations

import fcntl
import io
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError

from agentkit.errors import TrajectoryError
from agentkit.events import Status
from agentkit.model import Usage, total_usage
from agentkit.task import Strict, Task
from agentkit.trajectory import Trajectory
from agentkit.version import agentkit_version
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.untrusted import check_values, describe, open_regular, parse_json, read_regular, shorten
from agentkit_evals.errors import RunDirectoryError, not_written
from agentkit_evals.verify import Backend

FORMAT_VERSION = 4
MAX_LOCK_BYTES = 64 << 20
MAX_LOCK_VALUES = 2_000_000
"""Maximum number of values in `run.json`; enough for about 5,000 rows of SWE-bench."""
MAX_TRIALS_BYTES = 1 << 30
MAX_TRIAL_BYTES = 16 << 20
"""Maximum bytes of one line of `trials.jsonl`. A line holds an answer and a verifier's output, both bounded."""
MAX_TRIAL_VALUES = 100_000

Failure = Literal["model", "limit", "task", "infrastructure"]
"""Reason why a trial was not solved. Only "model" and "limit" are scored.

model           the reward is below 1, and no limit stopped the run
limit           the reward is below 1, and a limit of the task stopped the run
task            setup failed before the agent started
infrastructure  the machine, the engine or the verifier failed; `blame.py` has the rule
"""


class RunLock(Strict):
    """Contents of `run.json`: everything fixed before the first trial."""

    format: Literal["agentkit.run"] = "agentkit.run"
    version: int = FORMAT_VERSION
    name: str
    model: str
    fingerprint: str | None = None  # of an embedded model's weights and numerics
    model_options: dict[str, str | int] = Field(default_factory=dict)  # flags that load the model for `eval --resume`
    backend: Backend | None  # None: each task sets its own
    epochs: int = Field(ge=1, le=1 << 20)
    concurrency: int
    warm: int = Field(default=0, ge=0)  # sandboxes opened ahead
    seed: int
    max_cost_usd: float | None = Field(default=None, gt=0)
    prices_as_of: str | None = None  # the date of the list price of `Usage.cost_usd`
    list_price: str | None = None  # the list price of `TrialRecord.list_cost_usd`, in words
    sampling: SamplingParams  # its seed is not used: each trial derives one from `seed`
    tasks: list[Task]
    families: dict[str, str] = Field(default_factory=dict)  # task id -> group in reports
    phrasings: dict[str, str] = Field(default_factory=dict)  # task id -> phrasing, of generated tasks
    held_out_phrasings: list[str] = Field(default_factory=list)  # ids of tasks
    run_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9-]{1,64}$")  # label of the run's sandboxes
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    resumed: list[str] = Field(default_factory=list)  # times, as `created`
    agentkit: str = Field(default_factory=agentkit_version)
    python: str = platform.python_version()
    platform: str = Field(default_factory=platform.platform)
    command: list[str] = Field(default_factory=lambda: list(sys.argv))


TrialName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
"""A task id and an epoch. It becomes part of a path, so it has no slash."""


class TrialRecord(Strict):
    """One line of `trials.jsonl`: one task, run once."""

    trial: TrialName
    task: str
    epoch: int
    attempt: int = Field(default=1, ge=1)
    family: str
    phrasing: str
    held_out_phrasing: bool
    status: Status | None  # how the agent's run ended; None if it did not start or left no outcome
    failure: Failure | None  # None: solved
    reward: float | None  # None: not scored, so not part of any mean
    answer: str | None
    error: str | None
    verifier_output: str
    dropped: list[str] = Field(default_factory=list)  # workdir entries the verifier did not get, with reasons
    refused: list[str] = Field(default_factory=list)  # connections that the network refused, with phase and reason
    backend: str | None
    usage: Usage
    list_cost_usd: float | None = None  # what an embedded model's run would have cost; None for a model behind an API
    started: str
    setup_s: float
    agent_s: float
    verify_s: float

    @property
    def solved(self) -> bool:
        """True if the trial got the full reward."""
        return self.failure is None

    @property
    def is_retried(self) -> bool:
        """True if a resumed run runs the trial again, because the machine kept it from being scored."""
        return self.failure == "infrastructure"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run on disk: its lock and its finished trials, in order of completion. Of a trial that was retried, only the
    last attempt is among them."""

    path: Path
    lock: RunLock
    trials: tuple[TrialRecord, ...]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read a run, finished or not. An incomplete last line of `trials.jsonl`, left by a crash, is ignored.

        Raises:
            RunDirectoryError: the folder is not a run, has another format version, or is damaged.
        """
        path = Path(path)
        lock = _read_lock(path / "run.json")
        tasks = {task.id for task in lock.tasks}
        trials: dict[str, TrialRecord] = {}
        file = path / "trials.jsonl"
        for number, line in enumerate(_whole_lines(file), start=1):
            try:
                check_values(line, MAX_TRIAL_VALUES)
                trial = TrialRecord.model_validate_json(line)
                if trial.task not in tasks:
                    raise ValueError(f"task {shorten(trial.task)} is not in run.json")
                earlier = trials.pop(trial.trial, None)
                if earlier is not None and not (earlier.is_retried and trial.attempt > earlier.attempt):
                    raise ValueError(f"trial {trial.trial} occurs twice")
            except ValidationError as exc:
                raise RunDirectoryError(f"{file}:{number}: not a trial: {describe(exc)}") from exc
            except ValueError as exc:
                raise RunDirectoryError(f"{file}:{number}: not a trial: {exc}") from exc
            trials[trial.trial] = trial
        return cls(path, lock, tuple(trials.values()))

    @property
    def complete(self) -> bool:
        """True if every planned trial has finished."""
        return len(self.trials) == len(self.lock.tasks) * self.lock.epochs

    @property
    def num_left(self) -> int:
        """Number of planned trials that a resumed run has to run: unfinished ones, and those to be retried."""
        finished = sum(not trial.is_retried for trial in self.trials)
        return len(self.lock.tasks) * self.lock.epochs - finished

    @property
    def usage(self) -> Usage:
        """Usage of all trials together, including attempts that were interrupted and have only a trajectory."""
        parts = [trial.usage for trial in self.trials]
        for file in (*self.unfinished.values(), *sorted((self.path / "attempts").glob("*/*.jsonl"))):
            with suppress(TrajectoryError):
                parts.append(Trajectory.load(file).usage)
        return total_usage(parts)

    @property
    def unfinished(self) -> dict[str, Path]:
        """The trajectories of trials that have begun and have no record: they are running, or were interrupted."""
        recorded = {trial.trial for trial in self.trials}
        files = sorted((self.path / "trajectories").glob("*.jsonl"))
        return {file.stem: file for file in files if file.stem not in recorded}

    @property
    def out_of_budget(self) -> bool:
        """True if the limit on the cost stopped the run before all trials had finished."""
        limit = self.lock.max_cost_usd
        if limit is None or self.complete:
            return False
        cost = self.usage.cost_usd
        return cost is None or cost >= limit

    def scores(self, family: str | None = None) -> list[list[float]]:
        """Return the rewards of the scored epochs of every planned task, optionally of one family only.

        A task without a scored epoch (its trials failed, or the run was interrupted) has an empty list.
        """
        trials: dict[str, list[float]] = {}
        for trial in self.trials:
            rewards = trials.setdefault(trial.task, [])
            if trial.reward is not None and family in (None, trial.family):
                rewards.append(trial.reward)
        families = self.lock.families | {trial.task: trial.family for trial in self.trials}
        return [
            trials.get(task.id, []) for task in self.lock.tasks if family is None or families.get(task.id) == family
        ]

    def trajectory(self, trial: TrialRecord) -> Trajectory | None:
        """Return the trajectory of a trial, or None if none was written."""
        file = trajectory_path(self.path, trial.trial)
        return Trajectory.load(file) if file.exists() else None


def trajectory_path(run: Path, trial: str) -> Path:
    """Return the path of a trial's trajectory."""
    return run / "trajectories" / f"{trial}.jsonl"


def patch_path(run: Path, trial: str) -> Path:
    """Return the path of the patch with a trial's changes, which exists if its task is scored by tests."""
    return run / "patches" / f"{trial}.diff"


def attempt_path(run: Path, trial: str, attempt: int) -> Path:
    """Return the path of the trajectory of an earlier attempt of a trial; its patch has the suffix `.diff`."""
    return run / "attempts" / trial / f"{attempt}.jsonl"


class TrialLog:
    """The open `trials.jsonl` of a run, which one process at a time can write. A context manager."""

    def __init__(self, run: Path) -> None:
        """Open the file, or create it. An incomplete last line, left by a crash, is moved to `trials.torn`.

        Raises:
            RunDirectoryError: another process is writing the run.
            OSError: a file cannot be written.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._path = run / "trials.jsonl"
        self._fd = os.open(self._path, flags, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._cut(run / "trials.torn")
        except BlockingIOError as exc:
            os.close(self._fd)
            raise RunDirectoryError(
                f"{run} is in use by another process; wait until that has ended, or stop it"
            ) from exc
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def append(self, record: TrialRecord) -> None:
        """Add a record. On return the disk has it.

        Raises:
            OutputError: the file cannot be written.
        """
        rest = memoryview(record.model_dump_json().encode() + b"\n")
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
        except OSError as exc:
            raise not_written(exc, self._path) from exc

    def _cut(self, torn: Path) -> None:
        end = size = os.fstat(self._fd).st_size
        tail = b""
        while end and b"\n" not in tail:
            start = max(0, end - (1 << 20))
            tail, end = os.pread(self._fd, end - start, start) + tail, start
        if kept := tail[tail.rfind(b"\n") + 1 :]:
            with torn.open("ab") as file:
                file.write(kept + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.ftruncate(self._fd, size - len(kept))


def scores_by_task(trials: Sequence[TrialRecord]) -> list[list[float]]:
    """Return the rewards of the scored epochs of each task, as input for `agentkit_evals.statistics`."""
    scores: dict[str, list[float]] = {}
    for trial in trials:
        if trial.reward is not None:
            scores.setdefault(trial.task, []).append(trial.reward)
    return list(scores.values())


def lock_bytes(lock: RunLock) -> bytes:
    """Return the contents of `run.json`.

    Raises:
        RunDirectoryError: the contents would be too large to be read.
    """
    data = lock.model_dump_json(indent=1).encode()
    try:
        check_values(data, MAX_LOCK_VALUES)
    except ValueError as exc:
        raise RunDirectoryError(
            f"the {len(lock.tasks):,} tasks of {lock.name} are too large for one run: {exc}; run fewer of them, for "
            "example with --limit"
        ) from exc
    if len(data) > MAX_LOCK_BYTES:
        raise RunDirectoryError(
            f"the {len(lock.tasks):,} tasks of {lock.name} have {len(data):,} bytes, expected at most "
            f"{MAX_LOCK_BYTES:,}; run fewer of them, for example with --limit"
        )
    return data


def write_lock(run: Path, data: bytes) -> None:
    """Write `run.json`, whole or not at all; `data` is from `lock_bytes`.

    Raises:
        OutputError: the file cannot be written.
    """
    part = run / "run.json.part"
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(run / "run.json")
    except OSError as exc:
        raise not_written(exc, part) from exc


def _read_lock(file: Path) -> RunLock:
    try:
        data: Any = parse_json(read_regular(file, max_bytes=MAX_LOCK_BYTES), max_values=MAX_LOCK_VALUES)
    except (FileNotFoundError, NotADirectoryError) as exc:
        inside = sorted(path.parent.name for path in file.parent.glob("*/run.json"))
        hint = f"; give one of the runs in it: {', '.join(inside[:8])}" if inside else ""
        raise RunDirectoryError(f"{file.parent} is not a run: it has no run.json{hint}") from exc
    except OSError as exc:
        raise RunDirectoryError(f"{file} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise RunDirectoryError(f"{file} cannot be read: {shorten(str(exc), 300, quote=False)}") from exc
    if not isinstance(data, dict) or data.get("format") != "agentkit.run":
        raise RunDirectoryError(f'{file} is not an agentkit run: expected "format": "agentkit.run"')
    if data.get("version") != FORMAT_VERSION:
        raise RunDirectoryError(
            f"{file} has run format {shorten(data.get('version'))}; this agentkit reads format {FORMAT_VERSION}"
        )
    try:
        return RunLock.model_validate(data)
    except ValidationError as exc:
        raise RunDirectoryError(f"{file} is damaged: {describe(exc)}") from exc


def _whole_lines(file: Path) -> Iterator[bytes]:
    """Yield the complete lines of a file, or none if the file is missing. Raise RunDirectoryError."""
    try:
        with io.BufferedReader(open_regular(file)) as source:
            if (size := os.fstat(source.fileno()).st_size) > MAX_TRIALS_BYTES:
                raise RunDirectoryError(f"{file} has {size:,} bytes, expected at most {MAX_TRIALS_BYTES:,}")
            while (line := source.readline(MAX_TRIAL_BYTES + 1)).endswith(b"\n"):
                yield line
            if len(line) > MAX_TRIAL_BYTES:
                raise RunDirectoryError(f"{file} has a line of more than {MAX_TRIAL_BYTES:,} bytes")
    except FileNotFoundError:
        return
    except OSError as exc:
        raise RunDirectoryError(f"{file} cannot be read: {exc.strerror}") from exc
