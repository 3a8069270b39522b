"""Tasks over worlds: what an operation draws, and how it becomes a task with an oracle.

A task's *signature* is its instruction and the texts that set it apart, with drawn names, values and numbers masked; a
greeting before the instruction and a closing phrase after it are not part of it. A held-out task is over a held-out
world, and its phrasing is reserved for held-out tasks or the hash of its signature falls into the held-out bucket, one
of five. All other signatures are for training, so that no masked task occurs in both splits.
"""

from __future__ import annotations

import functools
import re
import shlex
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, TypeVar

from agentkit.task import AgentConfig, EnvironmentConfig, SolutionConfig, Task, ToolConfig, VerifierConfig
from agentkit_evals.provenance import generator_name
from agentkit_evals.synth import Split
from agentkit_evals.synth.checks import nothing_to_do
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.find import find
from agentkit_evals.synth.oracle import Oracle, Step, play
from agentkit_evals.synth.phrasing import CLOSERS, OPENERS, Phrasing, wordings
from agentkit_evals.synth.shell import print_answer
from agentkit_evals.synth.world import Artifact, World, draw_world
from agentkit_tools import BUILTINS

BUCKETS = 5  # one bucket of signatures in five is held out
_DIGITS = re.compile(r"\d+")
A = TypeVar("A", bound=Artifact)
LICENCE = "Apache-2.0 AND MIT"  # of the phrasings, and of the words (`vocabulary.PACKAGES`)
ATTEMPTS = 50  # drafts that may fall into the other split before the next seed is tried


@dataclass(frozen=True, slots=True)
class SynthTask:
    """A generated task with its oracle.

    Attributes:
        task: The task.
        operation: Name of its operation.
        phrasing: The operation and the index of the phrasing.
        held_out_phrasing: The phrasing occurs in held-out tasks only.
        signature: The instruction and the texts that set it apart, with names, values and numbers masked.
        names: The names and values drawn for it.
        oracle: Returns a policy that solves the task.
    """

    task: Task
    operation: str
    phrasing: str
    held_out_phrasing: bool
    signature: str
    names: tuple[str, ...]
    oracle: Callable[[], Oracle]


@dataclass(frozen=True, slots=True)
class Draft:
    """One task over a world.

    Attributes:
        instruction: The request, without greeting.
        steps: The oracle's turns.
        answer: Text that the final answer must contain, ignoring case; "" if any answer is accepted.
        reply: The solution's answer if `answer` is "", for drafts whose verifier checks the answer.
        alone: The request demands a form of answer, so it cannot be one of two requests.
        verifier: Shell command that checks the work directory of a fresh sandbox; "" if the answer is all that counts.
        solution: Shell command that solves the task, without printing the answer.
        about: Texts that make this task differ from others with the same instruction, such as the file it reads; part
            of the signature.
        files: Files that the task adds to the world or changes.
        verifier_files: Files that only the verifier sees.
        tools: Names of built-in tools, or fields of command tools.
        system: The system prompt; None for agentkit's, "" for none.
        output_schema: JSON schema of the answer, if it must be JSON.
        difficulty: Tool calls of the oracle plus one for each distractor, fact to carry or answer to compute.
    """

    instruction: str
    steps: Sequence[Step]
    answer: str = ""
    reply: str = "done"
    alone: bool = False
    verifier: str = ""
    solution: str = ""
    about: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    verifier_files: Mapping[str, str] = field(default_factory=dict)
    tools: Sequence[str | Mapping[str, Any]] = tuple(BUILTINS)
    system: str | None = None
    output_schema: dict[str, Any] | None = None
    difficulty: int = 1


class Operation(ABC):
    """One kind of task. Subclasses define `name`, `phrasings` and `draft`; `phrasing.wordings` adds to `phrasings`."""

    name: ClassVar[str]
    phrasings: ClassVar[tuple[Phrasing, ...]]
    needs_tool: ClassVar[bool] = True  # no task of this kind can be solved without a tool call
    uses_world: ClassVar[bool] = True  # False if its tasks need no files
    far_fact: ClassVar[bool] = False  # a needed fact is more than the model's window back
    spread_fact: ClassVar[bool] = False  # the far fact is spread over many positions

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in cls.__dict__:
            cls.phrasings = (*cls.phrasings, *wordings(cls.name))

    @abstractmethod
    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        """Draw one task over the world, or None if the world has nothing for it."""

    def sample(self, world_seed: int, seed: int, split: Split) -> SynthTask | None:
        """Return task `seed` over a world, or None if the world has none of this kind; the same on every machine."""
        world = draw_world(world_seed, split) if self.uses_world else World(world_seed, (), frozenset())
        draw = Draw(f"{self.name}/{split}/{world_seed}/{seed}")
        new_phrasing = split == "heldout" and draw.choice(self.phrasings).held_out
        indices = [index for index, each in enumerate(self.phrasings) if each.held_out == new_phrasing]
        for _ in range(ATTEMPTS):
            index = draw.choice(indices)
            draw.names = set(world.names)
            draft = self.draft(draw, world, self.phrasings[index])
            if draft is None:
                return None
            unscored = not draft.verifier and not draft.answer.strip()
            if unscored or nothing_to_do(draft.verifier_files, {**world.files, **draft.files}):
                continue
            signature = masked("\n".join([draft.instruction, *draft.about]), draw.names)
            if new_phrasing or is_held_out(signature) == (split == "heldout"):
                return self._task(draw, world, draft, index, f"{self.name}-{split}-{world_seed}", seed, signature)
        return None

    def _task(
        self, draw: Draw, world: World, draft: Draft, index: int, prefix: str, seed: int, signature: str
    ) -> SynthTask:
        checks = [*([draft.verifier] if draft.verifier else []), *map(answer_has, draft.answer.splitlines())]
        label, held_out = f"{self.name}/{index}", self.phrasings[index].held_out
        task = Task(
            id=f"{prefix}-{seed}",
            instruction=draw.choice(OPENERS) + draft.instruction.strip() + draw.choice(CLOSERS),
            system=draft.system,
            environment=EnvironmentConfig(files={**world.files, **draft.files}),
            tools=[tool if isinstance(tool, str) else ToolConfig(**tool) for tool in draft.tools],
            output_schema=draft.output_schema,
            agent=AgentConfig(max_turns=16, max_tokens=900),
            verifier=VerifierConfig(command=" && ".join(checks), files=dict(draft.verifier_files)),
            solution=SolutionConfig(
                command="\n".join(filter(None, (draft.solution, print_answer(draft.answer or draft.reply))))
            ),
            metadata={
                "family": self.name,
                "phrasing": label,
                "held_out_phrasing": held_out,
                "difficulty": draft.difficulty,
                "world": world.seed,
                "provenance": {
                    "generator": generator_name(f"synth.{self.name}"),
                    "seed": seed,
                    "licence": LICENCE,
                },
            },
        )
        return SynthTask(
            task=task,
            operation=self.name,
            phrasing=label,
            held_out_phrasing=held_out,
            signature=signature,
            names=tuple(sorted(draw.names)),
            oracle=lambda: functools.partial(play, draft.steps),
        )


class OperationOver(Operation, Generic[A]):
    """An operation over one file of a class: one that the world has, or a new one."""

    artifact: type[A]
    tries: ClassVar[int] = 1  # files over which to try to draw a task

    @abstractmethod
    def new(self, draw: Draw, kind: str) -> A:
        """Draw a new file for a kind of phrasing."""

    def fits(self, artifact: A, /, kind: str) -> bool:
        """Return whether a task can be drawn over the file."""
        return True

    @abstractmethod
    def draft_over(self, artifact: A, /, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        """Draw one task over the file, which the world need not have, or None if there is none after all."""

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        new, fits = functools.partial(self.new, kind=phrasing.kind), functools.partial(self.fits, kind=phrasing.kind)
        for _ in range(self.tries):
            found = find(draw, world, self.artifact, new, fits)
            if found is None:
                return None
            artifact, files = found
            draft = self.draft_over(artifact, draw, world, phrasing)
            if draft is not None:
                return replace(draft, files={**files, **draft.files})
        return None


def answer_has(text: str) -> str:
    """Return the verifier command for an answer that contains a text as words of its own."""
    return f'printf %s "$AGENTKIT_ANSWER" | grep -Fqiw -- {shlex.quote(text.strip())}'


def is_held_out(signature: str) -> bool:
    """Return whether the hash of a signature falls into the held-out bucket."""
    return zlib.crc32(signature.encode()) % BUCKETS == 0


def masked(text: str, names: Iterable[str]) -> str:
    """Replace each name or value that was drawn by `N`, and every other run of digits by `0`."""
    found = sorted((name for name in names if name in text), key=lambda name: (-len(name), name))
    if found:
        text = re.sub(rf"(?<!\w)(?:{'|'.join(map(re.escape, found))})(?!\w)", "N", text)
    return _DIGITS.sub("0", text)
