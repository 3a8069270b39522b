"""Files for a task: one that the world has, or a new one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.world import Artifact, World, is_new

A = TypeVar("A", bound=Artifact)
TRIES = 40


def find(
    draw: Draw,
    world: World,
    kind: type[A],
    make: Callable[[Draw], A],
    fits: Callable[[A], bool] = lambda artifact: True,
    *,
    taken: Collection[str] = (),
) -> tuple[A, dict[str, str]] | None:
    """Return an artifact that fits, and the file to add to the world; half of the time it is one of the world's own.

    `taken` are paths of files that the task has already. None if `TRIES` new artifacts do not fit.
    """
    if draw.chance(0.5):
        known = world.all(kind)
        for artifact in draw.some(known, min(len(known), 4)):
            if artifact.path not in taken and fits(artifact):
                return artifact, {}
    for _ in range(TRIES):
        made = make(draw)
        if fits(made) and is_free(made.path, world, taken):
            return made, {made.path: made.text}
    return None


def is_free(path: str, world: World, taken: Collection[str] = ()) -> bool:
    """Return whether a new file can have this path beside the files of the world and those in `taken`."""
    return is_new(path, [*(artifact.path for artifact in world.artifacts), *taken])


def new_path(draw: Draw, world: World, near: str, ending: str, taken: Collection[str] = ()) -> str:
    """Draw the path of a file that a request asks for: near a file of the request, with its name or a new one."""
    folder, slash, name = near.rpartition("/")
    stem = name.partition(".")[0]
    for _ in range(TRIES):
        kind = draw.rng.random()
        if kind < 0.4:
            path = f"{folder}{slash}{stem}.{ending}"
        elif kind < 0.8:
            path = f"{folder}{slash}{draw.file_stem()}.{ending}"
        else:
            path = f"{draw.file_stem()}.{ending}"
        if is_free(path, world, [near, *taken]):
            return draw.named(path)
    return draw.named(f"{folder}{slash}{draw.invented()}-{draw.invented()}.{ending}")
