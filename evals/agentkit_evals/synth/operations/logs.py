"""Questions about logs: counts, single lines, and the most frequent or different values of a field."""

from __future__ import annotations

import re
from collections import Counter

from agentkit_evals.synth.answers import names_are, number_is
from agentkit_evals.synth.artifacts.log import FORMATS, Entry, Log, draw_log
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention, mention_value
from agentkit_evals.synth.operations.steps import look, look_and_run, run
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.shell import fixed, quote
from agentkit_evals.synth.task import Draft, Operation, OperationOver
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World

EVENTS = {
    "DEBUG": ("debug", "debug lines|DEBUG lines|debug messages|DEBUG entries"),
    "INFO": ("info", "info lines|INFO lines|info messages|INFO entries"),
    "WARN": ("warning", "warnings|warnings|WARN lines|warning messages|WARN entries|warning lines"),
    "ERROR": ("error", "errors|errors|errors|ERROR lines|error messages|ERROR entries|error lines"),
    "FATAL": ("fatal", "fatal errors|FATAL lines|fatal messages|FATAL entries"),
}
FIELDS = {
    "component": ("component", "components"),
    "user": ("user", "users"),
    "ip": ("[IP address|IP|address|client]", "[IP addresses|IPs|addresses|clients]"),
    "page": ("[page|path|URL]", "[pages|paths|URLs]"),
    "status": ("[status|status code]", "[status codes|statuses]"),
    "host": ("host", "hosts"),
}


def marked_levels(log: Log) -> dict[str, str]:
    """Return the text that marks each level of a log, if no other line contains it."""
    counts = Counter(log.values("level"))
    marks = {name.upper(): log.level.format(name) for name in counts}
    return {name: mark for name, mark in marks.items() if log.count(mark) == counts[mark.strip("[]").split("=")[-1]]}


def draw_word(draw: Draw, log: Log) -> str | None:
    """Draw a word that a request can search a log for: in 1 to 40 lines, and never within another word."""
    for _ in range(20):
        found = re.findall(r"[A-Za-z]{4,}", draw.choice(log.entries).text)
        if found:
            word: str = draw.choice(found)
            count = sum(re.search(rf"(?<![A-Za-z]){word}(?![A-Za-z])", entry.text) is not None for entry in log.entries)
            if count == log.count(word) <= 40:
                return draw.named(word)
    return None


class LogOperation(OperationOver[Log]):
    """An operation over a log."""

    artifact = Log

    def new(self, draw: Draw, kind: str) -> Log:
        return draw_log(draw)


class CountLines(LogOperation):
    """The number of lines with a level, a status or a word, or of all lines."""

    name = "count_lines"
    phrasings = (
        *phrasings(
            "level",
            train=(
                "How many {events} are [there |]in {path}?",
                "How many {events} does {path} [have|contain|show]?",
                "Count the {events} in {path}.",
                "[Number|Count] of {events} in {path}?",
                "{events} in {path}?",
                "{path}: how many {events}?",
                "[Tell me|I need|Give me|Submit|Report] the number of {events} in {path}.",
                "[Check|Look at|Go through|Open] {path} and count the {events}.",
                "[Could you|Can you|Would you] count the {events} in {path}[, please|]?",
                "How often [do|did] we [get|have] {events} in {path}?",
                "In {path}, [count|how many are there of] the {events}.",
                "Are there many {events} in {path}? [Give me the number|How many exactly|Count them].",
                "how many {events} in {path}",
                "What is the [number|count] of {events} in {path}?",
                "I want to know how many {events} [were logged|there were] in {path}.",
                "How many lines of {path} are {events}?",
            ),
            held_out=(
                "How many times was something of the kind `{level}` logged in {path}?",
                "Find the number of {events} that {path} records.",
                "{path} worries me. How many {events} does it show?",
                "Please do a count of {events} over {path}.",
            ),
        ),
        *phrasings(
            "status",
            train=(
                "How many requests [ended with|had|returned|got] [status |]{status} in {path}?",
                "How many {status}s are [there |]in {path}?",
                "Count the {status} [responses|errors|answers|lines] in {path}.",
                "[Number of|How many] [requests with status|lines with status] {status} in {path}?",
                "In {path}, count the requests with [the |][status|code|status code] {status}.",
                "[Tell me|I need|Give me] the number of {status} responses in {path}.",
                "{path}: how many {status}s?",
                "How often did the server [answer|respond with|return] {status}[, according to|? See|? Check] {path}?",
            ),
            held_out=(
                "How many hits with code {status} does {path} record?",
                "Work out how many times {status} was returned in {path}.",
            ),
        ),
        *phrasings(
            "word",
            train=(
                "How many lines [of|in] {path} [contain|mention|have|include] {word}?",
                "Count the lines [of|in] {path} [that contain|with|that mention] {word}.",
                "[Number of|How many] lines with {word} in {path}?",
                "In how many lines of {path} does {word} [appear|occur|come up]?",
                "How often is {word} mentioned in {path}? Count the lines.",
                "[Tell me|I need|Give me] the number of lines with {word} in {path}.",
                "{path}: how many lines [have|mention] {word}?",
                "[Search|Grep] {path} for {word} and [count|tell me the number of] the matching lines.",
                "grep {word} in {path}: how many hits?",
                "[Could you|Can you] count how many lines mention {word} in {path}?",
                "How many entries [of|in] {path} are about {word}?",
                "In {path}, count every line that [contains|has] {word}.",
            ),
            held_out=(
                "How many of the lines in {path} include the word {word}?",
                "Look for {word} in {path}; on how many lines is it?",
                "Lines of {path} where {word} comes up: how many?",
            ),
        ),
        *phrasings(
            "total",
            train=(
                "How many lines [does {path} have|are in {path}|has {path}]?",
                "Count [the|all] lines [of|in] {path}.",
                "[Number of|How many] lines in {path}?",
                "[Tell me|I need|Give me] the [number of lines|line count] of {path}.",
                "How [long|big] is {path}, in lines?",
                "{path}: how many lines?",
                "What is the line count of {path}?",
                "How many [log lines|log entries|entries] are in {path}?",
            ),
            held_out=("What is the length of {path} in lines?", "Please determine how many lines make up {path}."),
        ),
    )

    def new(self, draw: Draw, kind: str) -> Log:
        return draw_log(draw, formats=["access"] if kind == "status" else [*FORMATS])

    def fits(self, log: Log, kind: str) -> bool:
        return bool(marked_levels(log)) if kind == "level" else kind != "status" or log.format == "access"

    def draft_over(self, log: Log, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        kind = phrasing.kind
        slots, path, said = {"path": mention(draw, log.path)}, quote(log.path), ""
        if kind == "level":
            marks = marked_levels(log)
            level = draw.choice(sorted({*marks, *(["ERROR"] if "ERROR" in marks else [])}))
            pattern = marks[level]
            slots |= {"events": draw.choice(EVENTS[level][1].split("|")), "level": EVENTS[level][0]}
            command, count, thought = f"grep -c {fixed(pattern)} {path}", log.count(pattern), f"count `{pattern}`"
        elif kind == "status":
            said = draw.named(draw.choice(sorted({*log.values("status")})))
            slots["status"] = said
            count = log.values("status").count(said)
            command, thought = f"grep -c '\" {said} ' {path}", f"count the lines with status {said}"
            if log.count(f'" {said} ') != count:
                return None
        elif kind == "word":
            word = draw_word(draw, log)
            if word is None:
                return None
            said = word
            slots["word"] = mention_value(draw, said)
            command, count, thought = f"grep -c {fixed(said)} {path}", log.count(said), f"count the lines with {said}"
        else:
            command, count, thought = f"wc -l < {path}", len(log.entries), "count the lines"
        request = ask(draw, phrasing, "number", **slots)
        steps = look_and_run(log.path, f"I {thought}.", command, "That is the number.")
        return Draft(
            instruction=request.text,
            steps=steps[1:] if kind in ("word", "total") else steps,
            about=[log.shape],
            difficulty=1 if kind in ("word", "total") else 2,
            **number_is(count, layout=request.layout, ignored=[log.path, said]),
        )


class FindLine(LogOperation):
    """A field of the line with an id, or that line's number."""

    name = "find_line"
    phrasings = (
        *phrasings(
            "message",
            train=(
                "What [happened|went on] with {id} in {path}?",
                "What does the line with {id} in {path} say?",
                "[Find|Look up|Search for|Get] {id} in {path} and [tell me|submit|report] the message.",
                "[What|Which] message belongs to {id} in {path}?",
                "[Show|Give|Read] me the message [of|for|with] {id} in {path}.",
                "{path}: what is the message of {id}?",
                "I need the log message [for|with id] {id}. [It's in|See|Look in] {path}.",
                "[Could you|Can you] look up {id} in {path} and tell me what [it says|was logged]?",
                "In {path}, find the entry {id}. What [is the message|does it say]?",
                "[grep|search] {id} in {path}: what is the message?",
            ),
            held_out=(
                "What was logged in {path} under {id}?",
                "{path} has an entry {id}; which message is it?",
                "Tell me the text that goes with {id} in {path}.",
            ),
        ),
        *phrasings(
            "field",
            train=(
                "[Which|What] {field} [belongs to|does the line have with] {id} in {path}?",
                "What is the {field} of {id} in {path}?",
                "[Find|Look up|Search for|Get] {id} in {path} and [tell me|submit|report] the {field}.",
                "[Tell|Give] me the {field} of the line with {id} in {path}.",
                "{path}: {field} of {id}?",
                "In {path}, [which|what] {field} is [on|in] the line with {id}?",
                "I need the {field} [for|of] {id}. [It's in|See|Check] {path}.",
                "The line with {id} in {path}: [which|what] {field} does it [have|show]?",
            ),
            held_out=(
                "Under which {field} was {id} logged in {path}?",
                "Look at {path} and find out the {field} for {id}.",
            ),
        ),
        *phrasings(
            "number",
            train=(
                "On which line of {path} is {id}?",
                "[Which|What] line of {path} has {id}? [I need the line number.|Give me its number.]",
                "[Find|Give me|Tell me|Submit] the line number of {id} in {path}.",
                "What is the line number of {id} in {path}?",
                "In {path}, on which line [is|do I find] {id}?",
                "{path}: line number of {id}?",
                "At which line does {id} [appear|occur|come up] in {path}?",
            ),
            held_out=("Which line number does {id} have in {path}?", "How far down in {path} is {id}, in lines?"),
        ),
    )

    def new(self, draw: Draw, kind: str) -> Log:
        return draw_log(draw, ids=True)

    def fits(self, log: Log, kind: str) -> bool:
        return "id" in log.entries[0].fields and (kind != "field" or bool(_named_fields(log)))

    def draft_over(self, log: Log, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        kind = phrasing.kind
        at = draw.between(0, len(log.entries) - 1)
        entry = log.entries[at]
        key = draw.named(entry.fields["id"])
        if log.count(key) != 1 or log.text.count(key) != 1:
            return None
        path, slots = quote(log.path), {"path": mention(draw, log.path), "id": mention_value(draw, key)}
        name = draw.choice(_named_fields(log)) if kind == "field" else kind
        request = ask(
            draw, phrasing, "number" if kind == "number" else "value", field=name if kind == "field" else "", **slots
        )
        command = f"grep {'-n ' if kind == 'number' else ''}{fixed(key)} {path}"
        if kind == "number":
            answer = str(at + 1)
            check = number_is(at + 1, layout=request.layout, ignored=[log.path, key])
        else:
            answer = entry.fields[name]
            check = names_are([answer], layout=request.layout)
        return Draft(
            instruction=request.text,
            steps=[
                lambda results: Act(f"I look for {key} in `{log.path}`.", [run(command)]),
                lambda results: submit(f"The {name} is {answer}.", answer),
            ],
            about=[log.shape, name],
            difficulty=2,
            **check,
        )


class EndLine(LogOperation):
    """The message or time of the first or last line, of all or of a level."""

    name = "end_line"
    phrasings = (
        *phrasings(
            "message",
            train=(
                "What is the {end} {event} in {path}?",
                "What does the {end} {event} [of|in] {path} say?",
                "[Show|Give|Tell|Read] me the message of the {end} {event} in {path}.",
                "[Find|Look up|Get] the {end} {event} in {path} and [submit|report|tell me] its message.",
                "[Which|What] message does the {end} {event} [of|in] {path} have?",
                "{path}: what is the {end} {event}?",
                "In {path}, what [was|is] the {end} {event}?",
                "What was the {end} {event} [we got|logged|recorded] in {path}?",
                "[Check|Open|Look at] {path}: what is the message of the {end} {event}?",
            ),
            held_out=(
                "Which message came with the {end} {event} of {path}?",
                "I'm curious about the {end} {event} in {path}; what does it say?",
            ),
        ),
        *phrasings(
            "time",
            train=(
                "When [was|did] the {end} {event} in {path}[ happen|]?",
                "At what time was the {end} {event} [logged|recorded] in {path}?",
                "[Tell me|Give me|I need|Submit] the [time|timestamp] of the {end} {event} in {path}.",
                "What is the timestamp of the {end} {event} in {path}?",
                "[Time|Timestamp] of the {end} {event} in {path}?",
                "{path}: when was the {end} {event}?",
                "[Find|Look up] the {end} {event} in {path}. When was it?",
                "In {path}, when [did we get|was] the {end} {event}?",
            ),
            held_out=(
                "Which timestamp does the {end} {event} of {path} carry?",
                "Find out when the {end} {event} turned up in {path}.",
                "How late was it when the {end} {event} of {path} came in?",
            ),
        ),
    )

    def fits(self, log: Log, kind: str) -> bool:
        return bool(marked_levels(log))

    def draft_over(self, log: Log, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        kind = phrasing.kind
        marks, path = marked_levels(log), quote(log.path)
        end = draw.choice(("first", "last", "last"))
        part = "head -n 1" if end == "first" else "tail -n 1"
        if draw.chance(0.75):
            level = "ERROR" if "ERROR" in marks and draw.chance(0.5) else draw.choice(sorted(marks))
            mark = marks[level]
            event = (
                EVENTS[level][0]
                if level in ("ERROR", "WARN")
                else draw.choice(("{} line", "{} message")).format(EVENTS[level][0])
            )
            command = f"grep {fixed(mark)} {path} | {part}"
            entries: list[Entry] = [entry for entry in log.entries if mark in entry.text]
        else:
            event, command, entries = draw.choice(("line", "entry", "message")), f"{part} {path}", [*log.entries]
        entry = entries[0] if end == "first" else entries[-1]
        answer = entry.fields[kind]
        request = ask(draw, phrasing, "value", path=mention(draw, log.path), end=end, event=event)
        return Draft(
            instruction=request.text,
            steps=[
                lambda results: look(log.path),
                lambda results: Act(f"I print the {end} {event}.", [run(command)]),
                lambda results: submit(f"The {kind} is {answer}.", answer),
            ],
            about=[log.shape],
            difficulty=2,
            **names_are([answer], layout=request.layout),
        )


class LogField(LogOperation):
    """The most frequent value of a field, or the number of its different values."""

    name = "log_field"
    phrasings = (
        *phrasings(
            "most",
            train=(
                "Which {field} [appears|occurs|shows up|comes up] most often in {path}?",
                "Which {field} has the most lines in {path}?",
                "What is the most [common|frequent] {field} in {path}?",
                "[Find|Tell me|Give me|I need] the {field} that [appears|occurs] most often in {path}.",
                "[Most common|Most frequent|Top] {field} in {path}?",
                "{path}: which {field} [is the most frequent|comes up most]?",
                "In {path}, which {field} [is the busiest|has the most entries]?",
                "Which {field} [logged|is responsible for|causes] the most [lines|entries] in {path}?",
                "[Count|Group] the lines of {path} by {field}; which {field} has the most?",
                "[Could you|Can you] see which {field} is most [common|frequent] in {path}?",
                "I wonder which {field} [dominates|fills] {path}. [Submit|Give me] the most frequent one.",
            ),
            held_out=(
                "Which {field} do we see most in {path}?",
                "Name the {field} with the highest number of lines in {path}.",
                "For which {field} does {path} have more lines than for any other?",
            ),
        ),
        *phrasings(
            "different",
            train=(
                "How many [different|distinct|unique] {fields} are [there |]in {path}?",
                "How many [different|distinct|unique] {fields} [appear|occur|show up] in {path}?",
                "Count the [different|distinct|unique] {fields} in {path}.",
                "[Number of|How many] [distinct|unique] {fields} in {path}?",
                "[Tell me|I need|Give me] the number of [different|unique] {fields} in {path}.",
                "{path}: how many [different|unique] {fields}?",
                "In {path}, how many {fields} are there[, each counted once|, without repetitions]?",
                "[Could you|Can you] count the [unique|different] {fields} [of|in] {path}?",
            ),
            held_out=(
                "Not counting repeats, how many {fields} does {path} mention?",
                "What number of separate {fields} do we have in {path}?",
            ),
        ),
    )

    def fits(self, log: Log, kind: str) -> bool:
        return bool(_counted_fields(log, kind))

    def draft_over(self, log: Log, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        most = phrasing.kind == "most"
        name = draw.choice(_counted_fields(log, phrasing.kind))
        one, many = (draw.phrase(text) for text in FIELDS[name])
        request = ask(
            draw, phrasing, "value" if most else "number", path=mention(draw, log.path), field=one, fields=many
        )
        column = f"{log.columns[name]} {quote(log.path)}"
        if not most:
            count = len({*log.values(name)})
            return Draft(
                instruction=request.text,
                steps=look_and_run(
                    log.path, f"I count the {name} values.", f"{column} | sort -u | wc -l", "That is the number."
                ),
                about=[log.shape, name],
                difficulty=3,
                **number_is(count, layout=request.layout, ignored=[log.path]),
            )
        answer = _first(log, name) or ""
        return Draft(
            instruction=request.text,
            steps=[
                lambda results: look(log.path),
                lambda results: Act(
                    f"I count each {name}.", [run(f"{column} | sort | uniq -c | sort -rn | head -n 3")]
                ),
                lambda results: submit(f"The most frequent one is {answer}.", answer),
            ],
            about=[log.shape, name],
            difficulty=3,
            **names_are(
                [answer], others=[value for value in log.values(name) if value != answer], layout=request.layout
            ),
        )


def _named_fields(log: Log) -> list[str]:
    return [name for name in ("level", "component", "user", "host") if name in log.entries[0].fields]


def _counted_fields(log: Log, kind: str) -> list[str]:
    """Return the fields whose values can be counted or, for "most", of which one value is the most frequent."""
    return [name for name in log.columns if kind != "most" or _first(log, name) is not None]


def _first(log: Log, name: str) -> str | None:
    """Return the most frequent value of a field, or None if two are equally frequent."""
    ranked = Counter(log.values(name)).most_common(2)
    return ranked[0][0] if len(ranked) == 2 and ranked[0][1] > ranked[1][1] else None


LOGS: tuple[Operation, ...] = (CountLines(), FindLine(), EndLine(), LogField())
