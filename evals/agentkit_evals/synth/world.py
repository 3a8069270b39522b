"""Worlds: work directories as people keep them.

A world is drawn from a seed: artifacts, which are files whose meaning is known, in folders. Operations find artifacts
by class and draw tasks over them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from agentkit_evals.synth import Split
from agentkit_evals.synth.draw import Draw


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file of a world. Subclasses add what its text means."""

    path: str
    text: str


A = TypeVar("A", bound=Artifact)


@dataclass(frozen=True, slots=True)
class World:
    """A work directory: its artifacts by path, and the names and values drawn for it."""

    seed: int
    artifacts: tuple[Artifact, ...]
    names: frozenset[str]

    @property
    def files(self) -> Mapping[str, str]:
        return {artifact.path: artifact.text for artifact in self.artifacts}

    def with_files(self, files: Mapping[str, str]) -> World:
        """Return the world with more files, or other contents of some; no task is drawn about them."""
        kept = (artifact for artifact in self.artifacts if artifact.path not in files)
        return replace(self, artifacts=(*kept, *(Artifact(path, text) for path, text in files.items())))

    def all(self, kind: type[A]) -> list[A]:
        """Return the artifacts of one class."""
        return [artifact for artifact in self.artifacts if isinstance(artifact, kind)]


def is_new(path: str, paths: Iterable[str]) -> bool:
    """Return whether no other file has this path, is a folder of it, or is in a folder of it."""
    return not any(path == old or path.startswith(f"{old}/") or old.startswith(f"{path}/") for old in paths)


def world_seed(seed: int, index: int) -> int:
    """Return the seed of the world with this index in a run with this seed."""
    return seed * 1_000_000 + index


@functools.lru_cache(maxsize=256)
def draw_world(seed: int, split: Split) -> World:
    """Return the world of a seed; the same on every machine. Train and held-out worlds share no seed."""
    from agentkit_evals.synth.artifacts import ARTIFACTS

    draw = Draw(f"world/{split}/{seed}")
    count = draw.weighted(
        {draw.between(1, 4): 4, draw.between(5, 12): 4, draw.between(13, 40): 2, draw.between(100, 300): 0.2}
    )
    artifacts: dict[str, Artifact] = {}
    for _ in range(count):
        artifact = draw.weighted(ARTIFACTS)(draw)
        if is_new(artifact.path, artifacts):
            artifacts[artifact.path] = artifact
    return World(seed, tuple(artifacts.values()), frozenset(draw.names))
