"""An agent's changes to a git repository, as a patch.

The patch is the difference of two git trees, which are written with a separate index, so the agent's commits, index and
branch do not matter. Files that git ignores are left out, unless they were tracked at the start.
"""

from __future__ import annotations

import secrets

from agentkit.errors import TaskSetupError
from agentkit_environments import Environment

MAX_PATCH_BYTES = 16 << 20
TIMEOUT_S = 300.0
SNAPSHOT = """\
export GIT_INDEX_FILE="$0.index"
if git rev-parse --quiet --verify "$1^{tree}" > "$0.tree"; then git read-tree "$1"; fi && git add -A && git write-tree
"""
DIFF = (
    "git diff --binary --full-index --no-renames --no-color --no-ext-diff --no-textconv "
    '--src-prefix=a/ --dst-prefix=b/ "$1" "$2" > "$0.patch"'
)


async def snapshot(environment: Environment) -> str:
    """Return the id of a tree with the files of the work directory.

    Raises:
        TaskSetupError: git does not run, or the work directory is not in a repository.
    """
    result = await environment.exec(["/bin/sh", "-c", SNAPSHOT, _new_place(), "HEAD"], timeout_s=TIMEOUT_S)
    if result.exit_code != 0:
        raise TaskSetupError(
            f"{environment.spec.workdir} must be a git repository of an image with git, to score the change by tests: "
            f"git exited with {result.exit_code}: {result.stderr.strip()[-500:]}"
        )
    return result.stdout.strip()


async def patch_since(environment: Environment, start: str) -> bytes:
    """Return the changes of the work directory since the snapshot `start`.

    Raises:
        ValueError: the repository was damaged.
        FileTooLargeError: the patch has more than `MAX_PATCH_BYTES`.
    """
    place = _new_place()
    end = await environment.exec(["/bin/sh", "-c", SNAPSHOT, place, start], timeout_s=TIMEOUT_S)
    if end.exit_code == 0:
        argv = ["/bin/sh", "-c", DIFF, place, start, end.stdout.strip()]
        end = await environment.exec(argv, timeout_s=TIMEOUT_S)
    if end.exit_code != 0:
        raise ValueError(f"the changes to the repository cannot be read: {end.stderr.strip()[-500:]}")
    return await environment.read_file(f"{place}.patch", max_bytes=MAX_PATCH_BYTES)


def _new_place() -> str:
    return f"/tmp/agentkit-{secrets.token_hex(8)}"
