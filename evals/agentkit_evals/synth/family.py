"""What a family of generated tasks is: exact masking of names, the draft of one task, and the rule of the split.

A family draws a `Draft` from a `Draw`. Every name and value of the draft comes out of the draw *marked* (wrapped in two
private-use characters), so that the task's signature, its instruction and files with names, values and numbers masked,
is exact and needs no guessing. The marks are gone from everything that leaves this module. A greeting before the
instruction and a word after it are no part of the signature: with another "Hello." a task is the same task.

The split: a task belongs to held-out when its phrasing is never trained on, or when the hash of its signature falls
into one bucket of five; else it belongs to training. So no masked (instruction, files) pair is ever in both.
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
    """`value` without marks: strings, and mappings, lists and tuples of them."""
    if isinstance(value, str):
        return value.replace(_OPEN, "").replace(_CLOSE, "")
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value


def marked(text: str) -> str:
    """`text` as a name or value."""
    return f"{_OPEN}{text}{_CLOSE}"


def masked(text: str) -> str:
    """`text` with each marked name or value as `N` and every other run of digits as `0`."""
    return _DIGITS.sub("0", _MARKED.sub("N", text))


def is_held_out(signature: str) -> bool:
    """Whether the hash of this signature falls into the held-out bucket."""
    return zlib.crc32(signature.encode()) % BUCKETS == 0


class Draw:
    """The random choices of one task. What `name`, `word`, `number`, `pick` return is marked; `choice` is structure."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.names: list[str] = []

    def choice(self, options: Sequence[T]) -> T:
        """One of the options, as structure: it stays visible in the signature."""
        return options[int(self.rng.random() * len(options))]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included, as structure."""
        return low + int(self.rng.random() * (high - low + 1))

    def fresh(self, make: Callable[[], str]) -> str:
        """What `make` gives, marked, once it neither contains nor lies inside anything else of this task."""
        while True:
            text = make()
            if not any(text in other or other in text for other in self.names):
                self.names.append(text)
                return marked(text)

    def name(self, syllables: int = 2) -> str:
        """A new pronounceable lower-case name."""
        return self.fresh(lambda: "".join(self.choice(SYLLABLES) for _ in range(syllables)))

    def word(self, pool: Sequence[str]) -> str:
        """A new word of the pool."""
        return self.fresh(lambda: self.choice(pool))

    def number(self, low: int, high: int) -> str:
        """A number's digits; unlike a name it may occur twice in a task."""
        return marked(str(self.between(low, high)))

    def pick(self, pool: Sequence[str]) -> str:
        """A value of the pool, which may occur twice in a task (a separator, an extension)."""
        return marked(self.choice(pool))

    def value(self) -> str:
        """A new opaque value: mostly a name, else digits, or a name with digits."""
        kind = self.rng.random()
        if kind < 0.7:
            return self.name(self.choice((2, 2, 3)))
        if kind < 0.85:
            return self.fresh(lambda: str(self.between(100, 9999)))
        return self.fresh(lambda: f"{self.choice(SYLLABLES)}{self.choice(SYLLABLES)}{self.between(2, 99)}")

    def phrase(self, template: str, **slots: str) -> str:
        """Fill a phrasing: `[a|b]` is one of the options, `{slot}` a slot."""
        return _CHOICE.sub(lambda match: self.choice(match[1].split("|")), template).format_map(slots)


@dataclass(frozen=True, slots=True)
class Phrasing:
    """One way to put the instruction. `kind` says which variant of the family it asks for."""

    text: str
    kind: str = ""
    held_out: bool = False


def phrasings(kind: str = "", *, train: Iterable[str], held_out: Iterable[str]) -> tuple[Phrasing, ...]:
    return (*(Phrasing(text, kind) for text in train), *(Phrasing(text, kind, held_out=True) for text in held_out))


@dataclass(frozen=True, slots=True)
class Act:
    """One turn of an oracle: what it thinks (dropped on turns that do not think), says and calls."""

    reasoning: str
    calls: Sequence[tuple[str, dict[str, Any]]] = ()
    content: str = ""


Step = Callable[[list[str]], Act]  # gets the texts of the results of the previous turn's calls


def submit(reasoning: str, answer: str = "done") -> Act:
    return Act(reasoning, [("submit", {"answer": answer})])


@dataclass(frozen=True, slots=True)
class Draft:
    """One task before masking: all its texts may carry marks."""

    instruction: str
    steps: Sequence[Step]
    verifier: str  # shell command, run in the agent's workdir
    solution: str  # shell command that does the job and prints the answer
    files: dict[str, str] = field(default_factory=dict)
    verifier_files: dict[str, str] = field(default_factory=dict)
    tools: Sequence[str | Mapping[str, Any]] = tuple(BUILTINS)  # names, and the fields of command tools


Oracle = Callable[[Sequence[Message], bool], AssistantTurn]  # (messages so far, think) -> the next turn


@dataclass(frozen=True, slots=True)
class SynthTask:
    """A generated task with its oracle.

    `signature` is the instruction and the files, names and values masked; `names` are the names and words drawn for it.
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
    """A draft that the split admits. `phrasing` is the index of its phrasing in the family."""

    draft: Draft
    phrasing: int
    instruction: str
    signature: str
    names: tuple[str, ...]


class Family(ABC):
    """A kind of generated task. Subclasses give `name`, `phrasings` and `draft`."""

    name: ClassVar[str]
    phrasings: ClassVar[tuple[Phrasing, ...]]
    needs_tool: ClassVar[bool] = True  # without a tool call no task of the family can be solved
    far_fact: ClassVar[bool] = False  # something needed stands more than 512 tokens back
    spread_fact: ClassVar[bool] = False  # and it is spread over a stretch of text: no single place holds it

    @abstractmethod
    def draft(self, draw: Draw, phrasing: Phrasing) -> Draft:
        """Draw one task that is put as `phrasing` says."""

    def draw(self, seed: int, split: Split) -> Drawn:
        """Everything of the task of this seed but its `Task`: the same on every machine.

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
        """The task of this seed, with its oracle. Raises ValueError for an unknown split."""
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
            metadata={"family": self.name, "phrasing": label, "held_out_phrasing": held_out},
        )
        return SynthTask(
            task=task,
            family=self.name,
            phrasing=label,
            held_out_phrasing=held_out,
            signature=drawn.signature,
            names=drawn.names,
            oracle=lambda: functools.partial(_play, draft.steps),
        )


def _play(steps: Sequence[Step], messages: Sequence[Message], think: bool) -> AssistantTurn:
    """The oracle's next turn: the step of this turn's number, given the results at the end of `messages`."""
    turn = sum(isinstance(message, AssistantMessage) for message in messages)
    results = [m.content for m in itertools.takewhile(lambda m: isinstance(m, ToolMessage), reversed(messages))][::-1]
    act = steps[turn](results)
    return AssistantTurn(
        reasoning=plain(act.reasoning) if think else None,
        content=plain(act.content),
        calls=[(name, plain(arguments)) for name, arguments in act.calls],
    )


def answer_is(answer: str) -> str:
    """The verifier command of a task whose answer is one exact text."""
    return f'test "$AGENTKIT_ANSWER" = {shlex.quote(plain(answer))}'


def print_answer(answer: str) -> str:
    """The solution command that only prints an answer."""
    return f"printf '%s\\n' {shlex.quote(plain(answer))}"


def replace_in_file(path: str, old: str, new: str) -> str:
    """The shell command that replaces the only `old` in a file by `new`."""
    script = "import sys; p, a, b = sys.argv[1:]; t = open(p).read(); assert t.count(a) == 1; "
    script += "open(p, 'w').write(t.replace(a, b))"
    return shlex.join(["python3", "-c", script, *(plain(text) for text in (path, old, new))])


def listed(items: Sequence[str], joint: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {joint} {items[-1]}"
