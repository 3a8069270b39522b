"""The text of an issue about a bug: what a user would report, without the place of the fault."""

from __future__ import annotations

import re

from agentkit_evals.synth.bugs.hidden_tests import function_of
from agentkit_evals.synth.bugs.package import Package

MAX_SHOWN = 3
MAX_LINES = 24
MAX_WIDTH = 200
MAX_DOCSTRING = 600


def issue_text(
    package: Package, path: str, function: str, docstring: str | None, failing: list[str], output: str
) -> str:
    """Return an issue in Markdown: a symptom, what the documentation says, and what failing checks print.

    The public name of the function is given; lines, files of the package and frames inside it are not.

    Args:
        package: The package as released.
        path: The changed module.
        function: Qualified name of the changed function, or an empty string.
        docstring: Docstring of that function.
        failing: Names of the failing tests.
        output: Output of the tests.
    """
    module = re.sub(r"/__init__$", "", path.removesuffix(".py").removeprefix("src/")).replace("/", ".")
    public = bool(function) and not any(part.startswith("_") for part in f"{module}.{function}".split("."))
    name = f"`{module}.{function}`" if public else f"`{module.partition('.')[0]}`"
    shown = [*dict.fromkeys(said for test in failing if (said := excerpt(output, test)))][:MAX_SHOWN]
    raised = re.search(r"^(?:E +)?([A-Za-z_.]*(?:Error|Exception|Iteration)\b)", "\n".join(shown), re.MULTILINE)
    symptom = "gives a wrong result"
    if raised and raised[1] not in ("AssertionError", "Failed"):
        symptom = f"raises {raised[1]} unexpectedly"
    parts = [f"# {name} {symptom}", f"Seen with {package.name} {package.version}."]
    if public and docstring:
        first = docstring.strip().split("\n\n")[0][:MAX_DOCSTRING]
        parts += [f"Its documentation says:\n\n{_quoted(first)}"]
    names = sorted({function_of(test) for test in failing})
    listed = ", ".join(f"`{each}`" for each in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    parts.append(f"These checks fail: {listed}.")
    if shown:
        parts.append("They print:\n\n" + "\n\n".join(f"```\n{each}\n```" for each in shown))
    return "\n\n".join(parts) + "\n"


def excerpt(output: str, test: str) -> str:
    """Return what a failing test printed: its own lines and the error, without frames of other files.

    Reads the failure sections of `pytest --tb=short` and of unittest; returns an empty string if the test has none.
    """
    title = ".".join(test.split("::")[1:]) if "::" in test else test
    rule = re.escape(title)
    section = re.search(rf"^_+ {rule} _+$\n(.*?)(?=^_+ .* _+$|^=+|\Z)", output, re.MULTILINE | re.DOTALL)
    if section:
        return _bounded(_of_pytest(section[1]))
    section = re.search(rf"^(?:FAIL|ERROR): {rule}[^\n]*\n-+\n(.*?)(?=^=+$|^-+$|\Z)", output, re.MULTILINE | re.DOTALL)
    return _bounded(_of_unittest(section[1])) if section else ""


def _of_pytest(section: str) -> list[str]:
    kept: list[str] = []
    inside_test = True
    for line in section.splitlines():
        if line.startswith("-----"):  # captured output
            break
        if frame := re.fullmatch(r"(\S+?):\d+: in .*", line):
            inside_test = bool(re.search(r"(^|/)(test[^/]*|[^/]*_test)\.py$|(^|/)tests?/", frame[1]))
        elif line.startswith("E ") or (inside_test and line.strip() and not re.match(r"\s+[\^~]+\s*$", line)):
            kept.append(line)
    return kept


def _of_unittest(section: str) -> list[str]:
    kept: list[str] = []
    inside_test = False
    for line in section.splitlines():
        if frame := re.match(r'  File "(.*)", line \d+, in ', line):
            inside_test = (
                bool(re.search(r"/(test[^/]*|[^/]*_test)\.py$|/tests?/", frame[1])) and "/lib/" not in frame[1]
            )
        elif line.startswith("    "):
            if inside_test and not re.match(r"\s+[\^~]+\s*$", line):
                kept.append(line)
        elif line.strip() and not line.startswith(("Traceback", "Stdout:", "Stderr:")):
            kept.append(line)
    return kept


def _bounded(lines: list[str]) -> str:
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES // 2], "...", *lines[-MAX_LINES // 2 :]]
    return "\n".join(line[:MAX_WIDTH].replace("```", "'''").rstrip() for line in lines)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())
