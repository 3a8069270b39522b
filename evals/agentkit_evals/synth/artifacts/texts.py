"""Notes, mail and agendas: texts that state facts in sentences."""

from __future__ import annotations

from dataclasses import dataclass

from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.world import Artifact

SUBJECTS = (
    *("{noun} {unit}", "{noun} {unit}", "{noun}", "{adjective} {noun}", "{person}'s {noun}", "{city} {noun}"),
    *("{noun} of the {other}", "{noun} {other}", "next {noun}", "{noun} for {person}"),
)
UNITS = ("code", "number", "password", "date", "time", "price", "address", "owner", "name", "limit", "size", "deadline")
LINES = (
    *("The {subject} is {value}.", "The {subject} is {value}.", "{Subject}: {value}", "- {subject}: {value}"),
    *("{Subject} = {value}", "* {Subject} is {value}", "Remember: the {subject} is {value}.", "{Subject} - {value}"),
    *("The new {subject} is now {value}.", "I set the {subject} to {value}."),
)
FILLERS = (
    *("Call {person} about the {noun}.", "We talked about the {noun} in {city}.", "Buy {thing} and {other}."),
    *("{person} was not there.", "The {noun} can wait.", "Ask {person} for the {noun}.", "- {noun} and {other}"),
    *(
        "It rained in {city}.",
        "# {Noun}",
        "TODO: {verb} the {noun}",
        "See {url} for the {noun}.",
        "Nothing new about the {noun}.",
    ),
)


@dataclass(frozen=True, slots=True)
class Fact:
    """A line of a text that states the value of a subject, such as `alarm code`."""

    subject: str
    value: str
    line: str


@dataclass(frozen=True, slots=True)
class Prose(Artifact):
    """A text with facts among other lines."""

    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class Note(Prose):
    pass


@dataclass(frozen=True, slots=True)
class Mail(Prose):
    sender: str
    address: str
    recipient: str
    subject: str
    date: str


@dataclass(frozen=True, slots=True)
class Event:
    """An entry of an agenda; `person` and `place` may be empty."""

    date: str
    time: str
    title: str
    person: str
    place: str
    line: str


@dataclass(frozen=True, slots=True)
class Agenda(Artifact):
    events: tuple[Event, ...]


def draw_note(draw: Draw) -> Note:
    """Draw a text of three to fourteen lines, one to four of which state a fact."""
    facts = _facts(draw, draw.between(1, 4))
    lines = [*(fact.line for fact in facts), *(filler(draw) for _ in range(draw.between(2, 10)))]
    draw.rng.shuffle(lines)
    if draw.chance(0.4):
        lines.insert(0, f"# {draw.noun().capitalize()}")
    return Note(draw.path(draw.choice(("txt", "md", "txt", "md", "notes"))), "\n".join(lines) + "\n", tuple(facts))


def draw_mail(draw: Draw) -> Mail:
    """Draw a mail with a header, a greeting and one to three facts."""
    sender, recipient = draw.person(), draw.person()
    address = draw.email()
    subject = draw.named(
        draw.phrase("[{a}|{a} {b}|Re: {a} {b}|{a} for {b}|Your {a}]", a=draw.noun().capitalize(), b=draw.noun())
    )
    date = draw.date().isoformat()
    facts = _facts(draw, draw.between(1, 3))
    body = [*(fact.line for fact in facts), *(filler(draw) for _ in range(draw.between(0, 4)))]
    draw.rng.shuffle(body)
    first = recipient.split()[0]
    text = "\n".join(
        [
            f"From: {sender} <{address}>", f"To: {recipient}", f"Date: {date}", f"Subject: {subject}", "",
            draw.phrase("[Hi|Hello|Dear] {first},", first=first), "", *body, "",
            draw.choice(("Best,", "Regards,", "Thanks,", "See you,")), sender.split()[0], "",
        ]
    )  # fmt: skip
    folder = draw.choice(("mail/", "inbox/", "", "Mail/"))
    return Mail(
        f"{folder}{draw.file_stem()}.{draw.choice(('eml', 'txt'))}",
        text,
        tuple(facts),
        sender,
        address,
        recipient,
        subject,
        date,
    )


def draw_agenda(draw: Draw) -> Agenda:
    """Draw two to ten events on different days, one per line, in order of time."""
    events: dict[str, Event] = {}
    titles: set[str] = set()
    form = draw.choice(
        (
            "{date} {time} {title}{rest}",
            "{date}, {time}: {title}{rest}",
            "- {date} {time} {title}{rest}",
            "{date};{time};{title}{rest}",
        )
    )
    for _ in range(draw.between(2, 10)):
        date, time = draw.date().isoformat(), draw.clock()
        title = draw.named(
            draw.phrase("[{a}|{a} {b}|{a} meeting|{a} review|call about {a}]", a=draw.noun(), b=draw.noun())
        )
        person = draw.person() if draw.chance(0.5) else ""
        place = draw.thing("city") if draw.chance(0.5) else ""
        if title in titles:
            continue
        titles.add(title)
        rest = (f" with {person}" if person else "") + (f" in {place}" if place else "")
        events[date] = Event(
            date, time, title, person, place, form.format(date=date, time=time, title=title, rest=rest)
        )
    ordered = tuple(events[date] for date in sorted(events))
    path = (
        draw.path(draw.choice(("txt", "md")))
        if draw.chance(0.6)
        else draw.choice(("calendar.txt", "agenda.md", "schedule.txt", "events.txt"))
    )
    return Agenda(path, "".join(f"{event.line}\n" for event in ordered), ordered)


def filler(draw: Draw) -> str:
    """Draw a line that states no fact."""
    template = draw.choice(FILLERS)
    noun = draw.noun()
    return template.format(
        noun=noun, Noun=noun.capitalize(), other=draw.noun(), verb=draw.verb(), city=draw.thing("city"),
        person=draw.thing("first_name"), thing=draw.thing("fruit"), url=draw.thing("hostname"),
    )  # fmt: skip


def fact(draw: Draw) -> Fact:
    """Draw a subject and its value."""
    subject = draw.named(
        draw.choice(SUBJECTS).format(
            noun=draw.noun(), unit=draw.choice(UNITS), adjective=draw.adjective(), other=draw.noun(),
            person=draw.thing("first_name"), city=draw.thing("city"),
        )
    )  # fmt: skip
    value = draw.value() if draw.chance(0.75) else draw.words_value()
    line = draw.choice(LINES).format(subject=subject, Subject=subject[0].upper() + subject[1:], value=value)
    return Fact(subject, value, line)


def _facts(draw: Draw, count: int) -> list[Fact]:
    found: dict[str, Fact] = {}
    for _ in range(count):
        one = fact(draw)
        if not any(one.subject in other or other in one.subject for other in found):
            found[one.subject] = one
    return list(found.values())
