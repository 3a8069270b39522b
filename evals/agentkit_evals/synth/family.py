"""Families of generated tasks: drawing a task, masking its names, and splitting tasks into train and held-out.

A family draws a `Draft` from a `Draw`. Every drawn name and value is *marked* (wrapped in two private-use characters).
Masking is therefore exact: a task's signature is its instruction and files with names, values and numbers masked. The
marks are removed from everything that leaves this module. A greeting before the instruction and a closing phrase after
it are not part of the signature, so a task with a different greeting is the same task.

A task is held out if its phrasing is reserved for held-out tasks, or if the hash of its signature falls into the
held-out bucket, one of five. All other tasks are for training, so no masked (instruction, files) pair occurs in both
splits.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
import shlex
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from agentkit.messages import AssistantMessage, Message, ToolMessage
from agentkit.models.scripted import AssistantTurn
from agentkit.task import AgentConfig, EnvironmentConfig, SolutionConfig, Task, ToolConfig, VerifierConfig
from agentkit_evals.provenance import generator_name
from agentkit_evals.synth.words import SYLLABLES
from agentkit_tools import BUILTINS

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
BUCKETS = 5  # one bucket of signatures in five is held out

_OPEN, _CLOSE = "\ue000", "\ue001"
_MARKED = re.compile(f"{_OPEN}[^{_CLOSE}]*{_CLOSE}")
_DIGITS = re.compile(r"\d+")
_CHOICE = re.compile(r"\[([^\]]*)\]")

OPENERS = (
    *("", "", "", "", "", ""),
    *("Hello. ", "Please help me. ", "A small task: ", "One task: ", "Task: ", "Hi. ", "Now this: ", "Good day. "),
)
CLOSERS = (
    *("", "", "", "", "", ""),
    *(" Thank you.", " Be exact.", " Please do it now.", " That is all.", " Thanks.", " This is the task.", " Go."),
)

T = TypeVar("T")


def plain(value: Any) -> Any:
    """Remove the marks from `value`: a string, or mappings, lists and tuples of strings."""
    if isinstance(value, str):
        return value.replace(_OPEN, "").replace(_CLOSE, "")
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value


def marked(text: str) -> str:
    """Mark `text` as a name or value."""
    return f"{_OPEN}{text}{_CLOSE}"


def masked(text: str) -> str:
    """Replace each marked name or value by `N` and every other run of digits by `0`."""
    return _DIGITS.sub("0", _MARKED.sub("N", text))


def is_held_out(signature: str) -> bool:
    """Return whether the hash of `signature` falls into the held-out bucket."""
    return zlib.crc32(signature.encode()) % BUCKETS == 0


class Draw:
    """Random choices of one task. `name`, `word`, `number`, `pick` return marked text; `choice` draws structure."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.names: list[str] = []

    def choice(self, options: Sequence[T]) -> T:
        """Draw an option as structure: it stays visible in the signature."""
        return options[int(self.rng.random() * len(options))]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def between(self, low: int, high: int) -> int:
        """Draw an integer from `low` to `high`, inclusive, as structure."""
        return low + int(self.rng.random() * (high - low + 1))

    def fresh(self, make: Callable[[], str]) -> str:
        """Call `make` until its text does not overlap another name of this task; return it marked."""
        while True:
            text = make()
            if not any(text in other or other in text for other in self.names):
                self.names.append(text)
                return marked(text)

    def name(self, syllables: int = 2) -> str:
        """Draw a new pronounceable lower-case name."""
        return self.fresh(lambda: "".join(self.choice(SYLLABLES) for _ in range(syllables)))

    def word(self, pool: Sequence[str]) -> str:
        """Draw a word from the pool that the task does not contain yet."""
        return self.fresh(lambda: self.choice(pool))

    def number(self, low: int, high: int) -> str:
        """Draw the digits of a number; unlike a name, it may repeat within a task."""
        return marked(str(self.between(low, high)))

    def pick(self, pool: Sequence[str]) -> str:
        """Draw a value (a separator, an extension) from the pool; it may repeat within a task."""
        return marked(self.choice(pool))

    def value(self) -> str:
        """Draw a new opaque value: usually a name, otherwise digits, or a name with digits."""
        kind = self.rng.random()
        if kind < 0.7:
            return self.name(self.choice((2, 2, 3)))
        if kind < 0.85:
            return self.fresh(lambda: str(self.between(100, 9999)))
        return self.fresh(lambda: f"{self.choice(SYLLABLES)}{self.choice(SYLLABLES)}{self.between(2, 99)}")

    def phrase(self, template: str, **slots: str) -> str:
        """Fill in a phrasing: draw one option of each `[a|b]` and replace each `{slot}`."""
        return _CHOICE.sub(lambda match: self.choice(match[1].split("|")), template).format_map(slots)


@dataclass(frozen=True, slots=True)
class Phrasing:
    """One wording of the instruction. `kind` is the variant of the family that it asks for."""

    text: str
    kind: str = ""
    held_out: bool = False


def phrasings(kind: str = "", *, train: Iterable[str], held_out: Iterable[str]) -> tuple[Phrasing, ...]:
    return (*(Phrasing(text, kind) for text in train), *(Phrasing(text, kind, held_out=True) for text in held_out))


@dataclass(frozen=True, slots=True)
class Act:
    """One turn of an oracle: its reasoning (dropped on turns without thinking), content and calls."""

    reasoning: str
    calls: Sequence[tuple[str, dict[str, Any]]] = ()
    content: str = ""


Step = Callable[[list[str]], Act]  # receives the result texts of the previous turn's calls


def submit(reasoning: str, answer: str = "done") -> Act:
    return Act(reasoning, [("submit", {"answer": answer})])


@dataclass(frozen=True, slots=True)
class Draft:
    """One task before masking; its texts can contain marks."""

    instruction: str
    steps: Sequence[Step]
    verifier: str  # shell command, run in the agent's workdir
    solution: str  # shell command that solves the task and prints the answer
    files: dict[str, str] = field(default_factory=dict)
    verifier_files: dict[str, str] = field(default_factory=dict)
    tools: Sequence[str | Mapping[str, Any]] = tuple(BUILTINS)  # names of built-ins, or fields of command tools


Oracle = Callable[[Sequence[Message], bool], AssistantTurn]  # (messages so far, think) -> the next turn


@dataclass(frozen=True, slots=True)
class SynthTask:
    """A generated task with its oracle.

    `signature` is the masked instruction and files; `names` are the names and words drawn for the task.
    """

    task: Task
    family: str
    phrasing: str
    held_out_phrasing: bool
    signature: str
    names: tuple[str, ...]
    oracle: Callable[[], Oracle]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A draft accepted for a split. `phrasing` is the index of its phrasing in the family."""

    draft: Draft
    phrasing: int
    instruction: str
    signature: str
    names: tuple[str, ...]


class Family(ABC):
    """A family of generated tasks. Subclasses define `name`, `phrasings` and `draft`."""

    name: ClassVar[str]
    phrasings: ClassVar[tuple[Phrasing, ...]]
    needs_tool: ClassVar[bool] = True  # no task of the family can be solved without a tool call
    far_fact: ClassVar[bool] = False  # a needed fact is more than 512 tokens back
    spread_fact: ClassVar[bool] = False  # the far fact is spread over many positions

    @abstractmethod
    def draft(self, draw: Draw, phrasing: Phrasing) -> Draft:
        """Draw one task for the given phrasing."""

    def draw(self, seed: int, split: Split) -> Drawn:
        """Draw the contents of this seed's task; the same on every machine.

        Raises ValueError for an unknown split.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        new_phrasing = split == "heldout" and rng.choice(self.phrasings).held_out
        indices = [index for index, each in enumerate(self.phrasings) if each.held_out == new_phrasing]
        while True:
            index = rng.choice(indices)
            draw = Draw(rng)
            draft = self.draft(draw, self.phrasings[index])
            files = sorted(f"{path}:{text}" for path, text in draft.files.items())
            signature = masked("\n".join([draft.instruction, *files]))
            if new_phrasing or is_held_out(signature) == (split == "heldout"):
                instruction = draw.choice(OPENERS) + plain(draft.instruction) + draw.choice(CLOSERS)
                return Drawn(draft, index, instruction, signature, tuple(draw.names))

    def sample(self, seed: int, split: Split) -> SynthTask:
        """Return this seed's task with its oracle. Raises ValueError for an unknown split."""
        drawn = self.draw(seed, split)
        draft, label, held_out = drawn.draft, f"{self.name}/{drawn.phrasing}", self.phrasings[drawn.phrasing].held_out
        task = Task(
            id=f"{self.name}-{split}-{seed}",
            instruction=drawn.instruction,
            environment=EnvironmentConfig(files=plain(draft.files)),
            tools=[tool if isinstance(tool, str) else ToolConfig(**plain(tool)) for tool in draft.tools],
            agent=AgentConfig(max_turns=12, max_tokens=600),
            verifier=VerifierConfig(command=plain(draft.verifier), files=plain(draft.verifier_files)),
            solution=SolutionConfig(command=plain(draft.solution)),
            metadata={
                "family": self.name,
                "phrasing": label,
                "held_out_phrasing": held_out,
                "provenance": {
                    "generator": generator_name(f"synth.{self.name}"),
                    "seed": seed,
                    "licence": "Apache-2.0",
                },
            },
        )
        return SynthTask(
            task=task,
            family=self.name,
            phrasing=label,
            held_out_phrasing=held_out,
            signature=drawn.signature,
            names=drawn.names,
            oracle=lambda: functools.partial(play, draft.steps),
        )


def play(steps: Sequence[Step], messages: Sequence[Message], think: bool) -> AssistantTurn:
    """Return the oracle's next turn, given the tool results at the end of `messages`."""
    turn = sum(isinstance(message, AssistantMessage) for message in messages)
    results = [m.content for m in itertools.takewhile(lambda m: isinstance(m, ToolMessage), reversed(messages))][::-1]
    act = steps[turn](results)
    return AssistantTurn(
        reasoning=plain(act.reasoning) if think else None,
        content=plain(act.content),
        calls=[(name, plain(arguments)) for name, arguments in act.calls],
    )


def answer_is(answer: str) -> str:
    """Return the verifier command for one exact answer."""
    return f'test "$AGENTKIT_ANSWER" = {shlex.quote(plain(answer))}'


def print_answer(answer: str) -> str:
    """Return the solution command that only prints an answer."""
    return f"printf '%s\\n' {shlex.quote(plain(answer))}"


def replace_in_file(path: str, old: str, new: str) -> str:
    """Return a shell command that replaces the only occurrence of `old` in a file by `new`."""
    script = "import sys; p, a, b = sys.argv[1:]; t = open(p).read(); assert t.count(a) == 1; "
    script += "open(p, 'w').write(t.replace(a, b))"
    return shlex.join(["python3", "-c", script, *(plain(text) for text in (path, old, new))])


def listed(items: Sequence[str], joint: str = "and") -> str:
    """Join items as `a`, `a and b` or `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {joint} {items[-1]}"
