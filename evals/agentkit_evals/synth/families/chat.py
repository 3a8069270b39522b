"""Answer in plain text: no tool is needed, whether or not tools are available."""

from __future__ import annotations

import shlex

from agentkit_evals.synth.family import Act, Draft, Draw, Family, Phrasing, marked, phrasings, plain, print_answer
from agentkit_evals.synth.words import COLORS, FIRST_NAMES, FRUITS, HAND_TOOLS, MAMMALS, THINGS
from agentkit_tools import BUILTINS

KINDS = {"mammal": MAMMALS, "fruit": FRUITS, "color": COLORS, "tool": HAND_TOOLS}
ABILITIES = "I can read, search and change files, run commands and compute."
ALONE = 'test "$(printf %s "$AGENTKIT_ANSWER" | tr -d "\\n .!\\140\\042\\047")" = '  # ignores punctuation and quotes


class Chat(Family):
    name = "chat"
    needs_tool = False
    phrasings = (
        *phrasings(
            "greet",
            train=(
                "My name is {name}. [Greet me|Say hello to me|Please greet me].",
                "[Hello|Hi|Good day], I am {name}. [Say hello to me|Greet me|Say hi].",
                "[Say|Please say] hello to {name}.",
                "[Greet {name}, please|Please greet {name}|Greet {name} now].",
            ),
            held_out=("I am {name}. Greet me, please.",),
        ),
        *phrasings(
            "who",
            train=(
                "[My name is|They call me|You may call me] {name}. [What is my name|What am I called|How am I called]?",
                "I am {name}. [Who am I?|Say who I am.|Tell me who I am.]",
            ),
            held_out=("I am {name}. What is my name?",),
        ),
        *phrasings(
            "repeat",
            train=(
                "Say the word {word}.",
                "[Repeat|Say again] this word: {word}",
                "[Answer with|Give me] the one word {word}.",
                "Say {word} and nothing [else|more].",
                "[Please|Now] repeat the word {word}.",
            ),
            held_out=("Answer with {word} and nothing else.",),
        ),
        *phrasings(
            "choose",
            train=(
                "Which of [these|the following] is [a|the] {kind}: {items}?",
                "One of these[| words] is a {kind}: {items}. Which one?",
                "Name the {kind} [among|in] {items}.",
            ),
            held_out=("Which one is a {kind}: {items}?",),
        ),
        *phrasings(
            "place",
            train=("Which word is {place}: {items}?", "[Say|Name|Give me] the {place} of these words: {items}."),
            held_out=("Which of these words is {place}: {items}?",),
        ),
        *phrasings(
            "abilities",
            train=(
                "What can you do[| for me| here]?",
                "[Tell me|Say|Explain] what you can do.",
                "[How can you help me|What are you good for|What can you help me with]?",
            ),
            held_out=("Please tell me what you can do.",),
        ),
        *phrasings(
            "thanks",
            train=(
                "Thank you, {name} says [thanks|thank you] too.",
                "[Thanks|Many thanks] from {name}.",
                "{name} says [thank you|thanks].",
            ),
            held_out=("Thank you from {name}.",),
        ),
    )

    def draft(self, draw: Draw, phrasing: Phrasing) -> Draft:
        name = draw.word(FIRST_NAMES) if draw.chance(0.4) else draw.fresh(lambda: plain(draw.name()).capitalize())
        word = draw.word(THINGS) if draw.chance(0.3) else draw.value()
        slots = {"name": name, "word": word if draw.chance(0.6) else f"`{word}`", "kind": "", "items": "", "place": ""}
        answer, check, plan = _plain_answers(phrasing.kind, name, word)
        if phrasing.kind == "choose":
            kind = draw.choice(tuple(KINDS))
            slots["kind"] = marked(kind)
            chosen = draw.word(KINDS[kind])
            items = [chosen] + [
                draw.name() if draw.chance(0.4) else draw.word(KINDS[other])
                for other in draw.rng.sample([other for other in KINDS if other != kind], draw.choice((2, 2, 3)))
            ]
            draw.rng.shuffle(items)
            answer, check, plan = chosen, ALONE + chosen, f"The {slots['kind']} is {chosen}."
            slots["items"] = _listed(draw, items)
        if phrasing.kind == "place":
            items = [draw.name() for _ in range(draw.choice((3, 3, 4)))]
            at = draw.choice((0, 1, -1))
            slots["place"] = {0: "first", 1: "second", -1: "last"}[at]
            slots["items"] = _listed(draw, items)
            answer, check, plan = items[at], ALONE + items[at], f"The {slots['place']} word is {items[at]}."
        return Draft(
            instruction=draw.phrase(phrasing.text, **slots),
            steps=[lambda results: Act(f"{plan} I need no tool.", content=answer)],
            verifier=check,
            solution=print_answer(answer),
            tools=() if draw.chance(0.25) else tuple(BUILTINS),
        )


def _listed(draw: Draw, items: list[str]) -> str:
    return ", ".join(items[:-1]) + draw.choice((", ", " or ", ", or ")) + items[-1]


def _plain_answers(kind: str, name: str, word: str) -> tuple[str, str, str]:
    """Return answer, verifier and thought for the kinds that only repeat a name or word."""
    has_name = f'case "$AGENTKIT_ANSWER" in *{name}*) ;; *) exit 1 ;; esac'
    if kind == "greet":
        greets = 'printf %s "$AGENTKIT_ANSWER" | grep -Eiq "^(hello|hi|hey|welcome|good|greetings)"'
        return f"Hello, {name}!", f"{has_name}; {greets}", f"I greet {name}."
    if kind == "who":
        return f"You are {name}.", has_name, f"The name is {name}."
    if kind == "repeat":
        return word, ALONE + shlex.quote(plain(word)), f"I repeat {word}."
    if kind == "thanks":
        return (
            f"You are welcome, {name}!",
            f'{has_name}; printf %s "$AGENTKIT_ANSWER" | grep -iq welcome',
            f"I answer {name}.",
        )
    return ABILITIES, 'printf %s "$AGENTKIT_ANSWER" | grep -q files', "I say what I can do."
