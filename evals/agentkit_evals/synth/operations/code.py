"""Work on Python code: fix a bug that a test shows, run a script, rename an identifier."""

from __future__ import annotations

import posixpath
import re
import shlex

from agentkit_evals.synth.artifacts.code import Module
from agentkit_evals.synth.checks import same_files
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention, mention_value
from agentkit_evals.synth.operations.steps import run
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.shell import replace_in_file
from agentkit_evals.synth.task import Draft, Operation
from agentkit_evals.synth.world import World

TEST = """\
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, {folder!r})
from {module} import {names}

for function, given, expected in [{cases}]:
    got = function(*given)
    if got != expected:
        sys.exit(f"FAIL {{function.__name__}}{{given}} is {{got!r}}, not {{expected!r}}")
print("OK")
"""


class FixBug(Operation):
    """One wrong line in a module: run the test, read, edit, run again."""

    name = "fix_bug"
    phrasings = phrasings(
        train=(
            "The tests in {test} fail. [Fix the bug in {path}|Fix {path}].",
            "{path} has a bug. Fix it so that {test} passes.",
            "Fix {path}. [Its|The] tests are in {test}.",
            "Run {test} and fix the bug in {path}.",
            "There is a bug in {path}. {test} shows it. [Fix it|Please fix it].",
            "[Please fix|Fix] the bug in {path}. Use {test} to [check|test] it.",
            "Make [the tests in |]{test} pass: one line of {path} is wrong.",
            "Something in {path} is [broken|wrong]. Run {test} [to see what|and repair it].",
            "python3 {test} fails. [Find and fix the bug in {path}|Can you repair {path}?]",
            "{name} in {path} gives wrong results. [The test is|See] {test}. Fix it.",
            "Why does {test} fail? Fix [the code in |]{path}.",
        ),
        held_out=(
            "Get {test} to pass again; the mistake is in {path}.",
            "A line in {path} is wrong. Find it with {test} and correct it.",
            "My test {test} is red because of {path}. Repair the function.",
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        if not (modules := world.all(Module)):
            return None
        module = draw.choice(modules)
        function = draw.choice(module.functions)
        broken = module.text.replace(function.line, function.wrong)
        if module.text.count(function.line) != 1 or broken.count(function.wrong) != 1:
            return None
        folder, file = posixpath.split(module.path)
        test = draw.choice((f"test_{file}", f"tests/test_{file}" if not folder else f"test_{file}", f"check_{file}"))
        if test in world.files:
            return None
        edit = {"path": module.path, "old": function.wrong, "new": function.line}
        test_run = run(f"python3 {shlex.quote(test)}")
        return Draft(
            instruction=draw.phrase(
                phrasing.text,
                path=mention(draw, module.path),
                test=mention_value(draw, test),
                name=f"`{function.name}`",
            ),
            steps=[
                lambda results: Act(f"I run `{test}` to see what fails.", [test_run]),
                lambda results: Act(f"A test fails. I read `{module.path}`.", [("read_file", {"path": module.path})]),
                lambda results: Act(f"`{function.wrong}` is wrong.", [("edit_file", edit)]),
                lambda results: Act("I run the tests again.", [test_run]),
                lambda results: submit("The tests pass."),
            ],
            files={module.path: broken, test: write_test(module, folder, shown=slice(0, 3))},
            verifier='python3 "$AGENTKIT_VERIFIER_DIR/hidden.py"',
            verifier_files={"hidden.py": write_test(module, folder, shown=slice(0, 6))},
            solution=replace_in_file(module.path, function.wrong, function.line),
            about=[broken],
            difficulty=5,
        )


class RunScript(Operation):
    """Run a script and report what it prints."""

    name = "run_script"
    phrasings = phrasings(
        train=(
            "Run {path} and tell me [what it prints|the output|the result].",
            "What does {path} print?",
            "[Execute|Start|Run] {path}. What is the output?",
            "[Please run|Run] {path} and [submit|report|give me] its output.",
            "What is the output of {path}?",
            "python3 {path}: what comes out?",
            "Tell me what happens when {path} runs.",
        ),
        held_out=("I want to see the output of {path}.", "Launch {path} and show what it prints."),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        path = draw.path("py", depth=draw.choice((0, 0, 1)))
        if path in world.files or posixpath.dirname(path) in world.files:
            return None
        output, source = _script(draw)
        command = f"python3 {shlex.quote(path)}"
        return Draft(
            instruction=draw.phrase(phrasing.text, path=mention(draw, path)),
            steps=[
                lambda results: Act(f"I run `{path}`.", [run(command)]),
                lambda results: submit("This is the output.", results[0].strip()),
            ],
            files={path: source},
            answer=output,
            about=[source],
        )


class RenameIdentifier(Operation):
    """Rename a function in a module and wherever it is used."""

    name = "rename_identifier"
    phrasings = phrasings(
        train=(
            "Rename {old} to {new} in all [Python|.py] files.",
            "[In all .py files|In the Python code], rename {old} to {new}.",
            "The function {old} should be called {new}. [Change it everywhere|Rename it in every .py file].",
            "Change the name {old} to {new} in [every|each] Python file.",
            "{old} has a new name: {new}. Use it in all .py files.",
            "Replace {old} by {new} in the Python files.",
            "I want to rename {old} to {new} [in the whole project|in all Python files].",
            "[Please rename|Rename] {old} to {new} [in all the code|everywhere in the code].",
        ),
        held_out=("Call {old} {new} from now on, in every Python file.", "In the code, {old} must become {new}."),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        if not (modules := world.all(Module)):
            return None
        module = draw.choice(modules)
        old, new = draw.choice(module.functions).name, draw.identifier("snake", parts=2)
        code = {path: text for path, text in world.files.items() if path.endswith(".py")}
        if any(re.search(rf"\b{new}\b", text) for text in code.values()) or len(old) < 4:
            return None
        user = f"use_{draw.noun()}.py"
        files = {} if user in world.files else {user: f"from {module.name} import {old}\n\nprint({old}.__name__)\n"}
        changed = {path: re.sub(rf"\b{old}\b", new, text) for path, text in {**code, **files}.items()}
        command = f"find . -name '*.py' -exec sed -i 's/\\b{old}\\b/{new}/g' {{}} +"
        return Draft(
            instruction=draw.phrase(phrasing.text, old=mention_value(draw, old), new=mention_value(draw, new)),
            steps=[
                lambda results: Act(f"I rename `{old}` to `{new}` in all Python files.", [run(command)]),
                lambda results: submit("It is renamed."),
            ],
            files=files,
            solution=command,
            about=[module.text],
            difficulty=2,
            **same_files(changed),
        )


def write_test(module: Module, folder: str, *, shown: slice) -> str:
    """Return a test file that compares calls of the module's functions with their results."""
    cases = [(one.name, given, value) for one in module.functions for given, value in one.cases[shown]]
    return TEST.format(
        folder=folder or ".",
        module=module.name,
        names=", ".join(one.name for one in module.functions),
        cases=", ".join(f"({name}, {given!r}, {value!r})" for name, given, value in cases),
    )


def _script(draw: Draw) -> tuple[str, str]:
    """Draw what a script prints, and its source."""
    word, other = draw.word(), draw.value().replace('"', "")
    a, b = draw.between(2, 99), draw.between(2, 99)
    scripts = [
        (word, f'print("{word}")\n'),
        (f"{word} {other}", f'{word[0]} = "{other}"\nprint("{word}", {word[0]})\n'),
        (str(a * b), f"a = {a}\nb = {b}\nprint(a * b)\n"),
        (str(a + b), f"print({a} + {b})\n"),
        (f"{word}: {a - b}", f'print(f"{word}: {{{a} - {b}}}")\n'),
        (word.upper(), f'text = "{word}"\nprint(text.upper())\n'),
        (str(len(word)), f'print(len("{word}"))\n'),
        ("\n".join(f"{word} {n}" for n in range(3)), f'for n in range(3):\n    print("{word}", n)\n'),
    ]
    return draw.choice(scripts)
