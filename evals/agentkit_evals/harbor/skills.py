"""Skills of a task: folders in the sandbox, each with a SKILL.md that says what it is good for (agentskills.io).

The agent is told their names, descriptions and files, and reads the files itself when it needs them.
"""

from __future__ import annotations

import contextlib
import re

import yaml

from agentkit.harbor import HarborConfig, HarborStep
from agentkit_environments import Environment, FileTooLargeError

MAX_SKILLS = 100
MAX_FILE_BYTES = 1 << 20
MAX_CHARACTERS = 1024
"""Of a description, as in the specification of skills."""
LIST = 'for file in "$0"/*/SKILL.md; do [ -f "$file" ] && printf "%s\\0" "$file"; done; true'
HEADING = "\n\nThese skills are available. Before you do what one describes, read its file.\n"
_FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)


async def with_skills(config: HarborConfig, step: HarborStep, environment: Environment) -> HarborStep:
    """Return a step whose instruction ends with a list of the skills in the sandbox, if there are any."""
    if config.skills_dir is None:
        return step
    found = await environment.exec(["/bin/sh", "-c", LIST, config.skills_dir])
    lines = []
    for path in found.stdout.split("\0")[:-1][:MAX_SKILLS]:
        with contextlib.suppress(PermissionError, FileTooLargeError, FileNotFoundError):
            content = await environment.read_file(path, max_bytes=MAX_FILE_BYTES)
            if (skill := _front_matter(content.decode(errors="replace"))) is not None:
                lines.append(f"- {skill[0]} ({path}): {skill[1]}")
    if not lines:
        return step
    return step.model_copy(update={"instruction": step.instruction.rstrip() + HEADING + "\n".join(lines)})


def _front_matter(text: str) -> tuple[str, str] | None:
    """Return the name and the description in a SKILL.md; None if it does not have both."""
    match = _FRONT_MATTER.match(text)
    try:
        given = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(given, dict) or not all(isinstance(given.get(key), str) for key in ("name", "description")):
        return None
    return " ".join(given["name"].split())[:MAX_CHARACTERS], " ".join(given["description"].split())[:MAX_CHARACTERS]
