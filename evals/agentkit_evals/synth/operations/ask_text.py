"""Questions about notes, mail and agendas."""

from __future__ import annotations

from agentkit_evals.synth.artifacts.texts import Agenda, Mail, Prose
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention, mention_value
from agentkit_evals.synth.operations.steps import read_and_answer
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.parameters import series
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.task import Draft, Operation
from agentkit_evals.synth.world import World


class AskNote(Operation):
    """The value of a fact that a note states."""

    name = "ask_note"
    phrasings = phrasings(
        train=(
            "What is the {subject} [according to|in] {path}?",
            "[Read|Open|Look at] {path} and tell me the {subject}.",
            "I [forgot|need] the {subject}. It is in {path}.",
            "[Find|Look up|Get] the {subject} in {path}.",
            "{path} [mentions|has] the {subject}. What is it?",
            "Which {subject} is [written|noted] in {path}?",
            "What does {path} say about the {subject}?",
            "Tell me the {subject} [from|that is in] {path}.",
            "[My notes are|The notes are] in {path}. What is the {subject}?",
            "{subject} in {path}?",
            "Do you see the {subject} in {path}? [Give it to me|Submit it|Tell me].",
            "[Please submit|Submit] the {subject} from {path}.",
        ),
        held_out=(
            "What did I write down in {path} as the {subject}?",
            "[Check|Search] {path} for the {subject} and report it.",
            "The {subject} should be somewhere in {path}; what is it?",
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        choices = [(note, fact) for note in world.all(Prose) for fact in note.facts]
        if not choices:
            return None
        note, fact = draw.choice(choices)
        return Draft(
            instruction=draw.phrase(phrasing.text, subject=fact.subject, path=mention(draw, note.path)),
            steps=read_and_answer(note.path, f"The {fact.subject} is {fact.value}.", fact.value),
            answer=fact.value,
            about=[note.text],
        )


class AskMail(Operation):
    """The sender, recipient, date or subject of a mail."""

    name = "ask_mail"
    phrasings = (
        *phrasings(
            "sender",
            train=(
                "Who [sent|wrote] {path}?",
                "Who is {path} from?",
                "Tell me who [sent|wrote] the [mail|email|message] in {path}.",
                "[What is the name of the sender|Name the sender] of {path}.",
                "From whom is the [mail|message] {path}?",
            ),
            held_out=("Which person wrote the mail {path}?",),
        ),
        *phrasings(
            "address",
            train=(
                "What is the sender's [email|address|mail address] in {path}?",
                "From which address [was {path} sent|did {path} come]?",
                "I need the email address of the person who wrote {path}.",
            ),
            held_out=("Give me the address that sent {path}.",),
        ),
        *phrasings(
            "recipient",
            train=(
                "Who [got|received] {path}?",
                "To whom [was {path} sent|is {path} addressed]?",
                "Who is the recipient of {path}?",
            ),
            held_out=("Name the person that {path} was sent to.",),
        ),
        *phrasings(
            "subject",
            train=(
                "What is the subject [of|line of|in] {path}?",
                "[Tell me|Give me] the subject of {path}.",
                "What is the mail {path} about? [Submit its subject|Just the subject line].",
            ),
            held_out=("Read {path} and report the subject line.",),
        ),
        *phrasings(
            "date",
            train=(
                "When was {path} sent?",
                "[On which date|On what day] was {path} [sent|written]?",
                "What is the date of {path}?",
            ),
            held_out=("Which date does the mail {path} have?",),
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        if not (mails := world.all(Mail)):
            return None
        mail = draw.choice(mails)
        answer: str = getattr(mail, phrasing.kind)
        return Draft(
            instruction=draw.phrase(phrasing.text, path=mention(draw, mail.path)),
            steps=read_and_answer(mail.path, f"The {phrasing.kind} is {answer}.", answer),
            answer=answer,
            about=[mail.text],
        )


class AskAgenda(Operation):
    """The time, place or person of an event, or the event of a day."""

    name = "ask_agenda"
    phrasings = (
        *phrasings(
            "date",
            train=(
                "When is the {title} [in|according to] {path}?",
                "On which [day|date] is the {title}? [See|Look in] {path}.",
                "[What is the date|What date is] [of |]the {title} in {path}?",
                "Check {path}: [when|on which date] is the {title}?",
            ),
            held_out=("Which day is the {title} on, according to {path}?",),
        ),
        *phrasings(
            "time",
            train=(
                "[At what time|What time] is the {title} in {path}?",
                "What time does the {title} [start|begin]? It is in {path}.",
                "At which time is the {title}? [See|Check] {path}.",
            ),
            held_out=("When exactly does the {title} start, says {path}? Give the time.",),
        ),
        *phrasings(
            "place",
            train=(
                "Where is the {title} [in|according to] {path}?",
                "In which city is the {title}? [See|Check] {path}.",
                "[Look in|Open] {path}: where does the {title} take place?",
            ),
            held_out=("Which place does {path} give for the {title}?",),
        ),
        *phrasings(
            "person",
            train=(
                "With whom is the {title} [in|according to] {path}?",
                "Who [do I meet for|is with me at] the {title}? [See|Check] {path}.",
                "Whom do I meet at the {title}? It is in {path}.",
            ),
            held_out=("Which person is in {path} for the {title}?",),
        ),
        *phrasings(
            "title",
            train=(
                "What do I have on {date}? [See|Look in|Check] {path}.",
                "What is on {date} in {path}?",
                "Which [event|appointment] is on {date} in {path}?",
                "[Open|Read] {path}. What happens on {date}?",
            ),
            held_out=("Anything on {date}, according to {path}?",),
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        choices = [
            (agenda, event) for agenda in world.all(Agenda) for event in agenda.events if getattr(event, phrasing.kind)
        ]
        if not choices:
            return None
        agenda, event = draw.choice(choices)
        answer: str = getattr(event, phrasing.kind)
        title = event.title if draw.chance(0.7) else mention_value(draw, event.title)
        return Draft(
            instruction=draw.phrase(phrasing.text, title=title, date=event.date, path=mention(draw, agenda.path)),
            steps=read_and_answer(agenda.path, f"The line is `{event.line}`.", answer),
            answer=answer,
            about=[agenda.text],
        )


class ReadSeveral(Operation):
    """Facts of two or three files, read in one turn, in the order of the request."""

    name = "read_several"
    phrasings = phrasings(
        train=(
            "{Items}?",
            "[Tell me|Give me|I need] {items}.",
            "[Find|Look up|Get] {items}. Answer in this order.",
            "What are {items}?",
            "[Please submit|Submit] {items}, one per line.",
            "{Items}: what are they?",
        ),
        held_out=("I'd like to know {items}.", "Report {items}, in order."),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        notes = [note for note in world.all(Prose) if note.facts]
        if len(notes) < 2:
            return None
        chosen = draw.some(notes, min(len(notes), draw.choice((2, 2, 3))))
        facts = [draw.choice(note.facts) for note in chosen]
        items = series(
            [
                f"the {fact.subject} [from|in] {mention(draw, note.path)}"
                for note, fact in zip(chosen, facts, strict=True)
            ]
        )
        paths = [note.path for note in chosen]
        answer = "\n".join(fact.value for fact in facts)
        return Draft(
            instruction=draw.phrase(draw.phrase(phrasing.text, items=items, Items=items[0].upper() + items[1:])),
            steps=[
                lambda results: Act(
                    f"I read {series([f'`{path}`' for path in paths])}.",
                    [("read_file", {"path": path}) for path in paths],
                ),
                lambda results: submit(
                    "; ".join(f"the {fact.subject} is {fact.value}" for fact in facts) + ".", answer
                ),
            ],
            answer=answer,
            about=[note.text for note in chosen],
            difficulty=len(chosen) + 1,
        )
