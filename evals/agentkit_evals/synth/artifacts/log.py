"""Logs of applications, web servers and machines, in the usual formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.world import Artifact

LEVELS = ("DEBUG", "INFO", "WARN", "ERROR", "FATAL")
_FIRST = datetime(2021, 1, 1)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a log, and its fields, such as `level`, `user` or `status`."""

    text: str
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Log(Artifact):
    """A log. `columns` are shell commands, without the file, that print one field of every line."""

    format: str
    entries: tuple[Entry, ...]
    columns: Mapping[str, str]
    level: str  # the text that marks a level, with `{}` for its name

    @property
    def shape(self) -> str:
        """The format and fields: what makes a task over this log differ from others."""
        return " ".join([self.format, *self.entries[0].fields])

    def values(self, field: str) -> list[str]:
        """Return a field of all lines that have it, from top to bottom."""
        return [entry.fields[field] for entry in self.entries if field in entry.fields]

    def count(self, text: str) -> int:
        """Return the number of lines that contain a text."""
        return sum(text in entry.text for entry in self.entries)


@dataclass(frozen=True, slots=True)
class LogFormat:
    """The form of a line, the commands that print its columns, the mark of a level, and the style of levels."""

    line: str
    columns: Mapping[str, str]
    level: str
    time: str
    style: Callable[[str], str] = str


def _awk(column: int) -> str:
    return f"awk '{{print ${column}}}'"


FORMATS: Mapping[str, LogFormat] = {
    "iso": LogFormat("{time} {level} {component} {message}", {"component": _awk(3)}, "{}", "%Y-%m-%dT%H:%M:%SZ"),
    "python": LogFormat(
        "{time} {level} {component}: {message}", {"component": _awk(4)}, "{}", "%Y-%m-%d %H:%M:%S", lambda text: text
    ),
    "dash": LogFormat(
        "{time} - {component} - {level} - {message}", {"component": _awk(4)}, "{}", "%Y-%m-%d %H:%M:%S,%f"
    ),
    "bracket": LogFormat("[{time}] [{level}] {message}", {}, "[{}]", "%Y-%m-%d %H:%M:%S", str.lower),
    "first": LogFormat("[{level}] {time} {message}", {}, "[{}]", "%H:%M:%S"),
    "short": LogFormat("{time} {level} {message}", {}, "{}", "%H:%M:%S"),
    "logfmt": LogFormat(
        'time={time} level={level} component={component} msg="{message}"',
        {"component": "grep -o 'component=[^ ]*'"},
        "level={}",
        "%Y-%m-%dT%H:%M:%S",
        str.lower,
    ),
    "syslog": LogFormat("{time} {host} {component}[{pid}]: {message}", {"host": _awk(4)}, "", "%b %d %H:%M:%S"),
    "access": LogFormat(
        '{ip} - - [{time} +0000] "{method} {page} HTTP/1.1" {status} {size}',
        {"ip": _awk(1), "page": _awk(7), "status": _awk(9)},
        "",
        "%d/%b/%Y:%H:%M:%S",
    ),
}
_TAGS = {"user": "grep -o 'user=[^ ]*'", "status": "grep -o 'status=[^ ]*'"}

MESSAGES: Mapping[str, tuple[str, ...]] = {
    "DEBUG": ("cache miss for {noun}", "loaded {noun} in {n} ms", "checking {noun}", "{noun} is up to date"),
    "INFO": (
        *("request finished in {n} ms", "{noun} started", "{noun} stopped", "connected to {hostname}", "saved {noun}"),
        *("order created", "payment received", "{n} rows written", "listening on port {n}", "job {noun} done"),
        *("logged in", "logged out", "upload of {noun} finished", "sent mail to {first_name}", "backup of {noun} done"),
    ),
    "WARN": (
        *("slow query on {noun}: {n} ms", "disk {n}% full", "retry {n} for {noun}", "{noun} is deprecated"),
        *("password expires soon", "queue {noun} has {n} jobs", "certificate of {hostname} expires in {n} days"),
    ),
    "ERROR": (
        *("could not open {noun}", "connection to {hostname} refused", "timeout after {n} s", "{noun} not found"),
        *(
            "login failed",
            "payment declined",
            "invalid value for {noun}",
            "permission denied: {noun}",
            "{noun} is locked",
        ),
    ),
    "FATAL": ("out of memory", "cannot bind to port {n}", "database {noun} is gone", "disk full"),
}
_COMPONENTS = "auth|api|db|web|worker|cache|mailer|payment|scheduler|sync|search|gateway|kernel|cron|sshd|nginx|backup"
_NAMES = ("app", "server", "error", "system", "debug", "worker", "service", "events", "build", "output", "access")


def draw_log(draw: Draw, *, formats: Sequence[str] = tuple(FORMATS), ids: bool = False) -> Log:
    """Draw a log of 6 to 60 lines (one of twelve has 90 to 200); with `ids`, one whose lines have ids."""
    name = draw.choice([name for name in formats if not ids or name != "access"])
    form = FORMATS[name]
    inner = Draw(str(draw.rng.random()))  # a request names few of the words in a log: only those are recorded
    access = name == "access"
    users = [inner.thing("first_name").lower() for _ in range(inner.between(3, 8))]
    components = inner.some(_COMPONENTS.split("|"), inner.between(3, 6))
    nouns = [inner.noun() for _ in range(8)]
    pages = ["/", "/login", *(f"/{noun}" for noun in nouns[:3]), *(f"/api/{noun}" for noun in nouns[3:5])]
    addresses = [_address(inner) for _ in range(inner.between(3, 9))]
    hosts = [inner.identifier("kebab") for _ in range(inner.between(1, 4))]
    shares = {level: inner.choice((1, 2, 3, 5)) for level in LEVELS if level == "ERROR" or inner.chance(0.75)}
    tags = (
        [] if access else [tag for tag, share in (("user", 0.5), ("id", 0.4), ("status", 0.15)) if inner.chance(share)]
    )
    if ids and "id" not in tags:
        tags.append("id")
    now = _FIRST + timedelta(minutes=inner.between(0, 2_500_000))
    levels, weights = list(shares), list(shares.values())
    pools: Mapping[str, Sequence[str]] = {
        "component": components,
        "host": hosts,
        "ip": addresses,
        "page": pages,
        "status": STATUSES,
        "user": users,
        "method": ("GET", "GET", "GET", "POST", "PUT", "DELETE"),
    }
    drawn = [name for name in pools if f"{{{name}}}" in form.line or name in tags]
    numbers = _ids(inner) if "id" in tags else iter(())
    line = form.line + "".join(f" {tag}={{{tag}}}" for tag in tags)
    entries: list[Entry] = []
    for _ in range(inner.weighted({inner.between(6, 20): 5, inner.between(21, 60): 4, inner.between(90, 200): 0.8})):
        now += timedelta(seconds=inner.between(1, 900), milliseconds=inner.between(1, 999))
        level = inner.rng.choices(levels, weights)[0]
        fields = {name: inner.choice(pools[name]) for name in drawn}
        fields["time"] = now.strftime(form.time).removesuffix("000")
        if "{level}" in line:
            fields["level"] = form.style(level)
        if "{message}" in line:
            message = inner.choice(MESSAGES[level])
            if "{" in message:
                message = message.format(
                    noun=inner.choice(nouns), n=inner.between(1, 99), hostname=hosts[0], first_name=inner.choice(users)
                )
            fields["message"] = message
        if "id" in tags:
            fields["id"] = next(numbers)
        text = line.format_map({**fields, "pid": 100 + len(entries) * 7, "size": inner.between(90, 90000)})
        entries.append(Entry(text, fields))
    columns = {**form.columns, **{tag: _TAGS[tag] for tag in tags if tag in _TAGS}}
    text = "".join(f"{entry.text}\n" for entry in entries)
    ending = draw.weighted({"log": 8, "txt": 1, "out": 0.6, "log.1": 0.4})
    path = draw.usual_path(ending, ("access", "requests") if access else _NAMES)
    return Log(path, text, name, tuple(entries), columns, form.level)


STATUSES = ("200", "200", "200", "200", "304", "301", "404", "404", "403", "500", "502", "401")


def _address(draw: Draw) -> str:
    return f"{draw.choice(('10.0', '192.168', '172.16', '85.14'))}.{draw.between(0, 40)}.{draw.between(1, 254)}"


def _ids(draw: Draw) -> Iterator[str]:
    """Draw ids that differ, in one style: `REQ-2041`, `a41f09c2` or `53817`."""
    style = draw.choice(("letters", "hex", "digits"))
    letters = draw.noun()[:3].upper()
    seen: set[int] = set()
    while True:
        number = draw.rng.getrandbits(23)
        if number not in seen:
            seen.add(number)
            yield {"letters": f"{letters}-{number}", "hex": f"{number:06x}", "digits": str(number)}[style]
