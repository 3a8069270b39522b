"""`agentkit check SUITE`: do the tasks measure what they say?"""

from __future__ import annotations

import json
from typing import Annotated

import anyio
import typer

from agentkit.cli.ending import ExitCode
from agentkit.cli.options import EnvFlag, JsonFlag
from agentkit.cli.terminal import visible


def command(
    suite: Annotated[
        str, typer.Argument(help="A folder of tasks, a suite or task file, `synth`, or `synth:FAMILY,FAMILY`.")
    ],
    env: EnvFlag = None,
    as_json: JsonFlag = False,
) -> ExitCode:
    """Probe tasks: their solution scores 1, doing nothing 0, a forged reward nothing. Exits with 1 when one fails."""
    from agentkit_evals.selfcheck import selfcheck
    from agentkit_evals.suite import load_suite

    problems: dict[str, list[str]] = {}

    async def probe_all() -> None:
        for case in load_suite(suite).cases:
            checked = await selfcheck(case.task, backend=env.value if env else None)
            problems[case.task.id] = checked.problems
            if not as_json:
                typer.echo(f"{'✗' if checked.problems else '✓'} {visible(case.task.id)}")
                for problem in checked.problems:
                    typer.echo(f"    {visible(problem)}")

    anyio.run(probe_all)
    failed = sum(bool(found) for found in problems.values())
    typer.echo(
        json.dumps(problems, indent=2) if as_json else f"{len(problems) - failed}/{len(problems)} tasks are sound"
    )
    return ExitCode.BELOW_THRESHOLD if failed else ExitCode.OK
