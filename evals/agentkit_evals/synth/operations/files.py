"""Work with files and folders: list, find, create, move, copy, delete, append, and recover from a wrong name."""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Sequence
from typing import Any

from agentkit_evals.synth.artifacts.settings import Settings
from agentkit_evals.synth.artifacts.texts import Note, fact, filler
from agentkit_evals.synth.catalog import files
from agentkit_evals.synth.checks import same_files
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention, mention_value
from agentkit_evals.synth.operations.steps import run
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.task import Draft, Operation
from agentkit_evals.synth.world import Artifact, World

MANY = 30  # entries of a listing that an oracle still reads


def entries(world: World, folder: str) -> list[str]:
    """Return the entries of a folder as `list_dir` lists them: sorted, with a slash after folders."""
    inside = [path.removeprefix(f"{folder}/") for path in world.files if folder == "." or path.startswith(f"{folder}/")]
    return sorted({name.split("/")[0] + ("/" if "/" in name else "") for name in inside})


def folders(world: World) -> list[str]:
    """Return the folders of a world, with the work directory as `.`."""
    found = {"."}
    for path in world.files:
        while (path := posixpath.dirname(path)) and path not in found:
            found.add(path)
    return sorted(found)


class ListFiles(Operation):
    """The files in a folder."""

    name = "list_files"
    phrasings = (
        *phrasings(
            ".",
            train=(
                "[Which|What] files are [here|there|in this folder|in the current directory]?",
                "List [the|all|my] files[| here| in this directory].",
                "[Show|Tell] me [what is|which files are] here.",
                "What [do I have|is] in [this folder|the work directory|here]?",
                "ls",
                "What's in here?",
                "[Please list|Give me a list of] [all files|everything] in the current folder.",
            ),
            held_out=("Can you see which files I have here?", "What does this directory contain?"),
        ),
        *phrasings(
            "folder",
            train=(
                "[Which|What] files are in {folder}?",
                "List [the files in |]{folder}.",
                "What is in [the folder |]{folder}?",
                "[Show|Tell] me what {folder} contains.",
                "ls {folder}",
                "Look into {folder} and [list|tell me] what is there.",
            ),
            held_out=("What does the folder {folder} contain?", "Name everything in {folder}."),
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        choices = [folder for folder in folders(world) if (folder == ".") == (phrasing.kind == ".")]
        choices = [folder for folder in choices if 0 < len(entries(world, folder)) <= MANY]
        if not choices:
            return None
        folder = draw.choice(choices)
        names = entries(world, folder)
        answer = "\n".join(names)
        return Draft(
            instruction=draw.phrase(phrasing.text, folder=mention_value(draw, folder + draw.choice(("", "/")))),
            steps=[
                lambda results: Act("I list the files.", [("list_dir", {"path": folder})]),
                lambda results: submit("These are the entries.", results[0].strip()),
            ],
            answer="\n".join(name.rstrip("/") for name in names),
            about=[answer],
        )


class CountFiles(Operation):
    """The number of files with one ending."""

    name = "count_files"
    phrasings = phrasings(
        train=(
            "How many {ending} files [are there|are here|do I have]?",
            "Count the {ending} files[ here|, in subfolders too|].",
            "[Tell me|I need] the number of {ending} files[| in this directory and below].",
            "How many files [end with|end in|have the ending] {ending}?",
            "[What is the|Give me the] number of files with the ending {ending}?",
        ),
        held_out=("Count all files that end in {ending}.", "Number of {ending} files?"),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        endings = sorted(
            {name.rpartition(".")[2] for path in world.files if "." in (name := posixpath.basename(path)).strip(".")}
        )
        if not endings:
            return None
        ending = draw.choice(endings)
        count = str(sum(path.endswith(f".{ending}") for path in world.files))
        command = f"find . -name '*.{ending}' | wc -l"
        return Draft(
            instruction=draw.phrase(phrasing.text, ending=draw.choice((f".{ending}", f"`.{ending}`", f".{ending}"))),
            steps=[
                lambda results: Act(f"I count the files that end in .{ending}.", [run(command)]),
                lambda results: submit(f"There are {results[0].strip()}.", results[0].strip()),
            ],
            answer=count,
            about=[count],
        )


class FindText(Operation):
    """The file that contains a text."""

    name = "find_text"
    phrasings = phrasings(
        train=(
            "[Which|What] file [mentions|contains] {text}?",
            "[In which file|Where] is {text} [mentioned|set|written]?",
            "Find the file [that contains|with] {text}.",
            "Where does {text} [occur|appear]? [Tell me|Submit|Give me] the file.",
            "I am looking for {text}. [Which|What] file is it in?",
            "[Search|Look] for {text} and tell me [the|which] file.",
            "Which of my files has {text} in it?",
            "grep {text}: which file?",
        ),
        held_out=("Locate {text}: I need the name of the file.", "{text} is in one of these files. Which one?"),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        lines = [
            *((note.path, one.subject) for note in world.all(Note) for one in note.facts),
            *((file.path, one.key) for file in world.all(Settings) for one in file.settings),
        ]
        texts = list(world.files.values())
        choices = [(path, text) for path, text in lines if sum(text in other for other in texts) == 1 and len(text) > 3]
        if not choices:
            return None
        path, text = draw.choice(choices)
        return Draft(
            instruction=draw.phrase(phrasing.text, text=mention_value(draw, text)),
            steps=[
                lambda results: Act(f"I search for {text}.", [("search", {"pattern": text})]),
                lambda results: submit(f"It is in `{path}`.", path),
            ],
            answer=path,
            about=[world.files[path]],
        )


class CreateFile(Operation):
    """Write a new file with a given text."""

    name = "create_file"
    phrasings = (
        *phrasings(
            "line",
            train=(
                "[Create|Make|Write|Add] a file [called |named |]{path} with the text {text}.",
                "Write {text} to {path}.",
                "[Create|Make] {path} with the content {text}.",
                "Save {text} [as|in|to] {path}.",
                "Put {text} into a new file {path}.",
                "I need a file {path} that [says|contains] {text}.",
                "[Please create|Create] {path}. [It should|It must] contain {text}.",
                "Store the line {text} in {path}.",
            ),
            held_out=("Make a new file, {path}, whose only line is {text}.", "{path} should exist and say {text}."),
        ),
        *phrasings(
            "list",
            train=(
                "[Create|Make|Write] {path} with the lines {items}, one per line.",
                "Write {items} to {path}, each on its own line.",
                "[Make|Create] a list {path} with {items}, one [per line|in each line].",
                "Save the names {items} in {path}, one per line.",
            ),
            held_out=("Put {items} in {path}, one on each line.",),
        ),
        *phrasings(
            "script",
            train=(
                "[Write|Create] a [Python |]script {path} that prints {text}.",
                "[Make|Create] {path}, a program that prints {text}.",
                "I need a Python file {path} that prints {text}.",
            ),
            held_out=("{path} should be a Python script that prints {text}.",),
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        ending = "py" if phrasing.kind == "script" else draw.choice(("txt", "md", "txt", "log", "csv", "notes"))
        path = draw.path(ending)
        if path in world.files or any(part in world.files for part in _parents(path)):
            return None
        words = [draw.word() for _ in range(draw.between(1, 5))]
        text = draw.named(
            draw.choice(
                (" ".join(words), " ".join(words).capitalize(), draw.words_value(), draw.value(), fact(draw).line)
            )
        )
        items = [draw.choice((draw.word, draw.value, draw.words_value))() for _ in range(draw.between(2, 5))]
        if "'" in text or '"' in text:
            return None
        content = f"{text}\n"
        if phrasing.kind == "list":
            content = "".join(f"{item}\n" for item in items)
        if phrasing.kind == "script":
            content = f'print("{text}")\n'
        quoted = draw.choice((f'"{text}"', f"'{text}'", f"`{text}`", f'"{text}"'))
        folder = shlex.quote(posixpath.dirname(path) or ".")
        return Draft(
            instruction=draw.phrase(phrasing.text, path=mention(draw, path), text=quoted, items=", ".join(items)),
            steps=[
                lambda results: Act(f"I write `{path}`.", [("write_file", {"path": path, "content": content})]),
                lambda results: submit("The file is there."),
            ],
            solution=f"mkdir -p {folder} && printf %s {shlex.quote(content)} > {shlex.quote(path)}",
            **same_files({path: content}),
        )


class CreateKnownFile(Operation):
    """Write a new file of the catalog."""

    name = "create_known_file"
    phrasings = phrasings(train=("{request}",), held_out=())

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        known = draw.choice(files())
        path = known.draw_path(draw)
        if path in world.files or any(part in world.files for part in _parents(path)):
            return None
        request = known.request(draw, path=mention(draw, path))
        content = known.text(request.arguments)
        folder = shlex.quote(posixpath.dirname(path) or ".")
        return Draft(
            instruction=request.text,
            steps=[
                lambda results: Act(f"I write `{path}`.", [("write_file", {"path": path, "content": content})]),
                lambda results: submit("The file is there."),
            ],
            solution=f"mkdir -p {folder} && printf %s {shlex.quote(content)} > {shlex.quote(path)}",
            **same_files({path: content}),
        )


class MoveFile(Operation):
    """Move, rename, copy or delete a file, or make a folder."""

    name = "move_file"
    phrasings = (
        *phrasings(
            "mv",
            train=(
                "Rename {path} to {new}.",
                "[Move|Rename] {path} to {new}.",
                "{path} should be called {new}. [Rename it|Please rename it].",
                "Give {path} the new name {new}.",
                "Change the name of {path} to {new}.",
                "mv {path} {new}",
                "I want {path} to be at {new}.",
            ),
            held_out=("The file {path} needs a new name: {new}.", "Call {path} {new} from now on."),
        ),
        *phrasings(
            "cp",
            train=(
                "Copy {path} to {new}.",
                "[Make|Create] a copy of {path} [called|named|at] {new}.",
                "[Back up|Save a copy of|Duplicate] {path} [as|to] {new}.",
                "cp {path} {new}",
            ),
            held_out=("{new} should be a copy of {path}.",),
        ),
        *phrasings(
            "rm",
            train=(
                "[Delete|Remove] {path}.",
                "I don't need {path} [any more|anymore]. [Delete|Remove] it.",
                "[Please delete|Get rid of] {path}.",
                "rm {path}",
            ),
            held_out=("{path} can go.", "Throw {path} away."),
        ),
        *phrasings(
            "mkdir",
            train=(
                "[Create|Make|Add] a [folder|directory] [called |named |]{folder}.",
                "I need a [folder|directory] {folder}.",
                "mkdir {folder}",
            ),
            held_out=("There should be a folder {folder}.",),
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        path = draw.choice(list(world.files))
        stem, dot, ending = posixpath.basename(path).rpartition(".")
        folder = posixpath.dirname(path)
        new = f"{draw.file_stem()}.{ending}" if dot and stem else draw.file_stem()
        if folder and draw.chance(0.6):
            new = f"{folder}/{new}"
        elif draw.chance(0.3):
            new = f"{draw.choice([one for one in folders(world) if one != '.'] or ['.'])}/{new}".removeprefix("./")
        made = draw.folder()
        if new in world.files or made in world.files or any(name.startswith(f"{made}/") for name in world.files):
            return None
        source, target = shlex.quote(path), shlex.quote(new)
        command = {
            "mv": f"mv {source} {target}",
            "cp": f"cp {source} {target}",
            "rm": f"rm {source}",
            "mkdir": f"mkdir {shlex.quote(made)}",
        }
        text = world.files[path]
        expected = {new: text} if phrasing.kind == "mv" else {path: text, new: text}
        made_it = {"verifier": f"test -d {shlex.quote(made)}"}
        state: dict[str, Any] = same_files(expected) if phrasing.kind in ("mv", "cp") else made_it
        if phrasing.kind in ("mv", "rm"):
            gone = f"test ! -e {source}"
            kept = "".join(f" && test -e {shlex.quote(other)}" for other in world.files if other != path)
            state["verifier"] = f"{gone} && {state['verifier']}" if phrasing.kind == "mv" else gone + kept
        done = {
            "mv": "It has its new name.",
            "cp": "The copy is there.",
            "rm": "It is deleted.",
            "mkdir": "The folder is there.",
        }
        return Draft(
            instruction=draw.phrase(
                phrasing.text,
                path=mention_value(draw, path),
                new=mention_value(draw, new),
                folder=mention_value(draw, made),
            ),
            steps=[
                lambda results: Act("I use a shell command.", [run(command[phrasing.kind])]),
                lambda results: submit(done[phrasing.kind]),
            ],
            solution=command[phrasing.kind],
            about=[phrasing.kind],
            **state,
        )


class AppendLine(Operation):
    """Add a line to the end of a text."""

    name = "append_line"
    phrasings = phrasings(
        train=(
            "Add {text} to [the end of |]{path}.",
            "Append {text} to {path}.",
            "[Write|Put] {text} at the end of {path}.",
            "[Add|Append] the line {text} to {path}.",
            "{path} needs one more line: {text}.",
            "Note {text} in {path}[, at the end|, as the last line].",
            "The last line of {path} should be {text}. Add it.",
        ),
        held_out=("Extend {path} by a line that says {text}.", "Put one more line into {path}: {text}."),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        notes = world.all(Note)
        if not notes:
            return None
        note = draw.choice(notes)
        text = filler(draw) if draw.chance(0.5) else fact(draw).line
        if "'" in text or '"' in text:
            return None
        command = f"echo '{text}' >> {shlex.quote(note.path)}"
        return Draft(
            instruction=draw.phrase(
                phrasing.text, path=mention(draw, note.path), text=draw.choice((f'"{text}"', f"`{text}`", f"'{text}'"))
            ),
            steps=[
                lambda results: Act(f"I append the line to `{note.path}`.", [run(command)]),
                lambda results: submit("The line is added."),
            ],
            solution=command,
            about=[note.text],
            **same_files({note.path: f"{note.text}{text}\n"}),
        )


class Recover(Operation):
    """The file has a slightly different name: list, find it, read it."""

    name = "recover"
    phrasings = phrasings(
        train=(
            "What is the {subject} [according to|in] {path}?",
            "[Read|Open] {path} and tell me the {subject}.",
            "[Find|Look up] the {subject} in {path}. [The name may be a little wrong.|]",
            "Tell me the {subject} from {path}. [The file may have moved.|It may be somewhere else.|]",
            "I need the {subject}. It is in {path}[, or in a file with a name like it|].",
            "Which {subject} does {path} [have|state]? [Look around if it is not there.|]",
        ),
        held_out=("What did I write in {path} as the {subject}?", "The {subject} should be in {path}; what is it?"),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        choices = [(note, one) for note in world.all(Note) for one in note.facts]
        if not choices:
            return None
        note, one = draw.choice(choices)
        folder, name = posixpath.split(note.path)
        stem, _, ending = name.rpartition(".")
        wrong = draw.choice(
            (
                *(f"{stem}.{draw.choice(('txt', 'md', 'log', 'json', 'doc'))}", f"{stem}s.{ending}", stem, name),
                *(f"{stem.replace('_', '-')}.{ending}", f"{stem.capitalize()}.{ending}", f"{stem}_old.{ending}"),
            )
        )
        asked = wrong if draw.chance(0.5) or not folder else f"{folder}/{wrong}"
        if (
            asked in world.files
            or asked == note.path
            or not stem
            or asked.lower() == note.path.lower()
            or asked in folders(world)
        ):
            return None
        where = posixpath.dirname(asked) or "."
        if len(entries(world, where)) > MANY or len(entries(world, folder or ".")) > MANY:
            return None
        draw.names.add(asked)

        def look(results: list[str]) -> Act:
            return Act(f"`{asked}` is not there. I list the files.", [("list_dir", {"path": where})])

        def find(results: list[str]) -> Act:
            command = f"find . -name '*{stem.split('-')[0].split('_')[0]}*'"
            return Act(f"I look for `{stem}` in all folders.", [run(command)])

        moved = where != (folder or ".")
        return Draft(
            instruction=draw.phrase(phrasing.text, subject=one.subject, path=mention(draw, asked)),
            steps=[
                lambda results: Act(f"I read `{asked}`.", [("read_file", {"path": asked})]),
                look,
                *([find] if moved else []),
                lambda results: Act(f"`{note.path}` must be the file.", [("read_file", {"path": note.path})]),
                lambda results: submit(f"The {one.subject} is {one.value}.", one.value),
            ],
            answer=one.value,
            about=[note.text],
            difficulty=4,
        )


class Missing(Operation):
    """A request for a thing that does not exist; the answer must say so."""

    name = "missing"
    phrasings = (
        *phrasings(
            "setting",
            train=(
                "What is {key} in {path}?",
                "Tell me the value of {key} in {path}.",
                "[Find|Look up|Get] {key} in {path}.",
                "How is {key} [set|configured] in {path}?",
                "[Set|Change] {key} to {new} in {path}. Do not add it if it is not there.",
                "[Check|Look in] {path}: what is {key} [set to|]?",
            ),
            held_out=("What does {path} say about {key}?",),
        ),
        *phrasings(
            "fact",
            train=(
                "What is the {subject} [according to|in] {path}?",
                "[Read|Open|Look at] {path} and tell me the {subject}.",
                "[Find|Look up|Get] the {subject} in {path}.",
                "Which {subject} is [written|noted] in {path}?",
            ),
            held_out=("The {subject} should be somewhere in {path}; what is it?",),
        ),
        *phrasings(
            "file",
            train=(
                "What is the {subject} [according to|in] {absent}?",
                "[Read|Open|Look at] {absent} and tell me the {subject}.",
                "[Find|Look up|Get] the {subject} in {absent}.",
                "What is {key} in {absent}?",
                "[Delete|Remove|Show me] {absent}.",
                "[Copy|Rename|Move] {absent} to {new}.",
            ),
            held_out=("What did I write in {absent} as the {subject}?",),
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        files: Sequence[Artifact] = world.all(Settings if phrasing.kind == "setting" else Note)
        if not files or len(entries(world, ".")) > MANY:
            return None
        file = draw.choice(files)
        key, subject, absent = (
            draw.identifier(),
            fact(draw).subject,
            draw.path(draw.choice(("txt", "md", "csv", "json")), depth=0),
        )
        near = key.split("_")[0] if phrasing.kind == "setting" else subject
        if (
            near in file.text
            or absent in world.files
            or any(absent[:4].lower() in path.lower() for path in world.files)
        ):
            return None
        what = {"setting": f"`{key}`", "fact": f"the {subject}", "file": f"`{absent}`"}[phrasing.kind]
        said = (
            f"{what} does not exist: there is no such file."
            if phrasing.kind == "file"
            else f"There is no {what.removeprefix('the ')} in {file.path}."
        )
        path = absent if phrasing.kind == "file" else file.path

        def look(results: list[str]) -> Act:
            return Act(f"`{path}` is not there. I list the files.", [("list_dir", {"path": "."})])

        return Draft(
            instruction=draw.phrase(
                phrasing.text, key=mention_value(draw, key), subject=subject, absent=mention(draw, absent),
                path=mention(draw, file.path), new=mention_value(draw, draw.word()),
            ),
            steps=[
                lambda results: Act(f"I read `{path}`.", [("read_file", {"path": path})]),
                *([look] if phrasing.kind == "file" else []),
                lambda results: submit(f"I do not find {what}.", said),
            ],
            verifier='printf %s "$AGENTKIT_ANSWER" | grep -Eqi "no such|does not exist|there is no|not found|no .* in"',
            solution=f"echo {shlex.quote(said)}",
            about=[file.text if phrasing.kind != "file" else ""],
            difficulty=2,
        )  # fmt: skip


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]
