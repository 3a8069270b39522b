"""`agentkit check SUITE`: check that the verifiers of tasks can be trusted."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from agentkit.cli.ending import ExitCode, run
from agentkit.cli.options import EnvFlag, JsonFlag, SuiteArgument, refuse_foreign_suite
from agentkit.cli.terminal import visible


def command(suite: SuiteArgument, env: EnvFlag = None, as_json: JsonFlag = False) -> ExitCode:
    """Check that each task scores its solution 1, an untouched environment 0, and rejects a forged reward.

    Reads every task file of a folder and reports every problem. Exits with 1 if a task is not sound, with 2 if a file
    cannot be read as a task.
    """
    from agentkit.errors import AgentkitError, TaskFileError
    from agentkit_environments import ImageBuildError, ImageMissingError
    from agentkit_evals.errors import EvalError, SuiteError
    from agentkit_evals.selfcheck import selfcheck
    from agentkit_evals.suite import Case, load_suite, task_files

    refuse_foreign_suite(suite)
    problems: dict[str, list[str]] = {}

    def report(name: str, found: list[str]) -> None:
        problems.setdefault(name, []).extend(found)
        if not as_json:
            typer.echo(f"{'✗' if found else '✓'} {visible(name)}")
            for problem in found:
                typer.echo("    " + visible(problem).replace("\n", "\n    "))

    cases: list[Case] = []
    ids: dict[str, str] = {}
    unreadable = 0
    for source in task_files(Path(suite)) if Path(suite).is_dir() else [suite]:
        try:
            loaded = load_suite(str(source)).cases
        except (TaskFileError, SuiteError) as exc:
            if source == suite and not Path(suite).exists():
                raise
            unreadable += 1
            report(str(source), str(exc).splitlines())
            continue
        for case in loaded:
            if (other := ids.setdefault(case.task.id, str(source))) != str(source):
                unreadable += 1
                report(str(source), [f"the id {case.task.id!r} is already used in {other}; ids must be unique"])
            else:
                cases.append(case)

    async def probe_all() -> None:
        for case in cases:
            try:
                found = (await selfcheck(case.task, backend=env.value if env else None)).problems
            except (AgentkitError, EvalError, ImageBuildError, ImageMissingError) as exc:
                found = [str(exc)]
            report(case.task.id, found)

    if cases:
        run(probe_all)
    elif not unreadable:
        raise SuiteError(f"{suite} has no tasks; add .yaml task files")
    failed = sum(bool(found) for found in problems.values())
    typer.echo(
        json.dumps(problems, indent=2) if as_json else f"{len(problems) - failed}/{len(problems)} tasks are sound"
    )
    if unreadable:
        return ExitCode.USAGE
    return ExitCode.UNSOLVED if failed else ExitCode.OK
