"""Commands of the catalog over a file of their kind."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace

from agentkit_evals.synth.catalog import commands
from agentkit_evals.synth.catalog.inputs import INPUTS
from agentkit_evals.synth.checks import same_files
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention
from agentkit_evals.synth.operations.steps import always, look
from agentkit_evals.synth.oracle import Act, Step, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.task import Draft, Operation
from agentkit_evals.synth.world import World

KNOWN_FORMATS = ("lines", "numbers", "text")
"""Inputs at which the oracle need not look first."""


class RunKnownCommand(Operation):
    """Ask about a text file, change it or write another one, by a command of the catalog."""

    name = "run_known_command"
    phrasings = phrasings(train=("{request}",), held_out=())

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        known = draw.choice(commands())
        new, endings = INPUTS[known.input]
        ending = draw.choice(endings)
        paths = {"path": draw.path(ending), "out": draw.path(known.ending or ending, depth=0)}
        if len(set(paths.values()) | world.files.keys()) < 2 + len(world.files):
            return None
        file = new(draw)
        said = {key: mention(draw, path) for key, path in paths.items()}
        request, result = known.request(draw, file, **said), known.result(file)
        call = known.call(file, **paths)
        done = Act("I do it with a command." if call[0] == "bash" else "I do it with a script.", [call])
        steps: list[Step] = [always(done)]
        if known.input not in KNOWN_FORMATS or draw.chance(0.4):
            steps.insert(0, always(look(paths["path"])))
        if known.answer:
            steps.append(lambda results: submit("The output is the answer.", results[0].strip()))
            draft = Draft(request, steps, answer=result.strip(), about=[known.answer])
        else:
            path = paths["out" if known.writes else "path"]
            steps.append(lambda results: submit("It is done."))
            draft = Draft(request, steps, about=[known.writes or known.changes], **same_files({path: result}))
        return replace(draft, files={paths["path"]: file.content}, solution="" if known.answer else _shell(*call))


def _shell(tool: str, arguments: Mapping[str, str]) -> str:
    """Return the shell command of a call of `bash` or `python`."""
    return arguments["command"] if tool == "bash" else shlex.join(["python3", "-c", arguments["code"]])
