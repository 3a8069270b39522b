"""Operations over generated worlds: the oracle solves each task, doing nothing does not, and the splits differ."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from agentkit.messages import AssistantMessage
from agentkit.task import VerifierConfig
from agentkit_engine.chat import Tokenizer
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_environments import open_environment
from agentkit_evals.statistics import SOLVED
from agentkit_evals.synth import SPLITS, vocabulary
from agentkit_evals.synth.checks import nothing_to_do, same_files
from agentkit_evals.synth.draw import Draw, joined
from agentkit_evals.synth.find import is_free, new_path
from agentkit_evals.synth.operations import OPERATIONS
from agentkit_evals.synth.oracle import require_solved, transcript
from agentkit_evals.synth.phrasing import WORDINGS
from agentkit_evals.synth.shell import fixed, quote
from agentkit_evals.synth.task import SynthTask, is_held_out, masked
from agentkit_evals.synth.world import Artifact, World, draw_world
from agentkit_evals.verify import verify

WORLDS = 4
every_operation = pytest.mark.parametrize("operation", OPERATIONS)


def tasks(operation: str, worlds: int = WORLDS) -> list[SynthTask]:
    drawn = [OPERATIONS[operation].sample(world, 0, split) for split in SPLITS for world in range(worlds)]
    return [synth for synth in drawn if synth is not None]


@every_operation
@pytest.mark.anyio
async def test_the_oracle_solves_its_task_and_an_idle_agent_does_not(operation: str) -> None:
    drawn = tasks(operation)
    assert len(drawn) >= WORLDS // 2, "most worlds must have a task of every kind"
    await solve(drawn[0])
    await solve(drawn[-1])


@pytest.mark.slow
@every_operation
@pytest.mark.anyio
async def test_the_oracle_solves_every_task_and_an_idle_agent_none(operation: str) -> None:
    for synth in tasks(operation, 15):
        await solve(synth)
        assert synth.task.solution
        async with await open_environment(synth.task.environment.spec(), backend="unsafe-local") as environment:
            await synth.task.prepare(environment)
            printed = await environment.exec(["sh", "-c", synth.task.solution.command])
            after = (await environment.export_dir(environment.spec.workdir)).data
        assert printed.exit_code == 0, printed.stderr
        await require_solved(synth, after, printed.stdout.removesuffix("\n"))


async def solve(synth: SynthTask) -> None:
    """Check that the oracle's run scores 1 and that doing nothing scores less."""
    async with await open_environment(synth.task.environment.spec(), backend="unsafe-local") as environment:
        await synth.task.prepare(environment)
        before = (await environment.export_dir(environment.spec.workdir)).data
        messages, answer = await transcript(synth, environment)
        after = (await environment.export_dir(environment.spec.workdir)).data
    turns = [message for message in messages if isinstance(message, AssistantMessage)]
    assert bool(turns[0].calls) == OPERATIONS[synth.operation].needs_tool
    await require_solved(synth, after, answer)
    idle = await verify(synth.task, archive=before, answer=None, backend="unsafe-local")
    assert idle.reward < SOLVED, synth.task.instruction


def test_a_seed_draws_the_same_task_again() -> None:
    first = [synth.task for operation in OPERATIONS for synth in tasks(operation, 2)]
    draw_world.cache_clear()
    assert [synth.task for operation in OPERATIONS for synth in tasks(operation, 2)] == first


@every_operation
def test_held_out_tasks_have_another_phrasing_or_signature(operation: str) -> None:
    for synth in tasks(operation, 8):
        held_out = synth.task.id.startswith(f"{operation}-heldout-")
        assert held_out == (synth.held_out_phrasing or is_held_out(synth.signature))


@every_operation
def test_every_phrasing_makes_a_request(operation: str) -> None:
    kind = OPERATIONS[operation]
    held_out = sum(each.held_out for each in kind.phrasings)
    assert held_out == 0 or held_out >= 0.15 * len(kind.phrasings)
    for index, phrasing in enumerate(kind.phrasings):
        drawn = (kind.draft(Draw(f"{index}/{world}"), draw_world(world, "train"), phrasing) for world in range(40))
        draft = next(draft for draft in drawn if draft is not None)
        assert "  " not in draft.instruction.replace("\n", " "), draft.instruction


def test_every_file_of_wordings_belongs_to_an_operation() -> None:
    assert {path.stem for path in WORDINGS.iterdir()} <= OPERATIONS.keys()


@every_operation
def test_no_phrasing_occurs_twice(operation: str) -> None:
    counts = Counter((each.kind, each.text) for each in OPERATIONS[operation].phrasings)
    assert [text for text, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("operation", [name for name, operation in OPERATIONS.items() if operation.far_fact])
def test_a_far_fact_is_more_than_a_window_back(operation: str) -> None:
    folder = PACKAGED_MODELS["tiny"]
    window = json.loads((folder / "config.json").read_text())["sliding_window"]
    tokenizer = Tokenizer.from_dir(folder)
    for synth in tasks(operation, 3):
        texts = (synth.task.instruction, *synth.task.environment.files.values())
        assert max(len(tokenizer.encode_text(text)) for text in texts) > window


def test_a_shell_word_is_quoted_if_it_has_to_be() -> None:
    assert [quote(text) for text in ("a/b-1.csv", "Straße.txt", "my file.txt", "it's", "$x")] == [
        *("a/b-1.csv", "Straße.txt", "'my file.txt'", "'it'\"'\"'s'", "'$x'"),
    ]
    assert [fixed(text) for text in ("ERROR", "[error]", "10.0.0.1", "- milk")] == [
        *("ERROR", "-F '[error]'", "-F 10.0.0.1", "-e '- milk'"),
    ]


def test_a_new_file_is_no_file_or_folder_of_the_world() -> None:
    world = World(0, (Artifact("a/b.txt", ""), Artifact("c", "")), frozenset())
    assert [is_free(path, world) for path in ("a/b.txt", "a", "c/d.txt", "a/b.txt/e", "d.txt")] == [False] * 4 + [True]
    assert not is_free("d.txt", world, ["d.txt"])
    for seed in range(50):
        path = new_path(Draw(str(seed)), world, "a/b.txt", "txt")
        assert path.endswith(".txt")
        assert is_free(path, world)


def test_names_and_numbers_are_masked_in_signatures() -> None:
    text = "Set `max_size` to 7 in app/budget.txt, not max_size_old, 12 times"
    assert masked(text, {"max_size", "7", "app/budget.txt"}) == "Set `N` to N in N, not max_size_old, 0 times"


def test_words_are_plain_and_many() -> None:
    for kind, least in (("noun", 5000), ("verb", 900), ("adjective", 800)):
        words = vocabulary.words(kind)
        assert len(words) >= least
        assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
    assert len(vocabulary.common_nouns()) >= 1500
    assert "Oslo" not in vocabulary.words("noun")
    with pytest.raises(ValueError, match=r"no pool .*gemstone.*; expected one of first_name"):
        vocabulary.pool("gemstone")


def test_styles_of_names() -> None:
    written = [
        joined(["max", "open", "files"], style) for style in ("snake", "kebab", "camel", "pascal", "upper", "space")
    ]
    assert written == [
        "max_open_files",
        "max-open-files",
        "maxOpenFiles",
        "MaxOpenFiles",
        "MAX_OPEN_FILES",
        "max open files",
    ]


def test_a_phrasing_draws_one_option_of_nested_choices() -> None:
    drawn = {Draw(str(seed)).phrase("[a|b [c|d]] {x}", x="1") for seed in range(60)}
    assert drawn == {"a 1", "b c 1", "b d 1"}


def test_a_request_that_would_change_nothing_is_not_drawn() -> None:
    synth = OPERATIONS["run_known_command"].sample(9000189, 6, "heldout")  # it was to capitalise lines that were
    assert synth is not None and isinstance(synth.task.verifier, VerifierConfig)
    assert not nothing_to_do(synth.task.verifier.files, synth.task.environment.files)
    expected = same_files({"a.json": '{"x": 1}', "notes.txt": "One\n"})["verifier_files"]
    assert nothing_to_do(expected, {"a.json": '{ "x":1 }', "notes.txt": "'One'\n\n", "other.txt": ""})
    assert not nothing_to_do(expected, {"a.json": '{"x": 2}', "notes.txt": "One\n"})
    assert not nothing_to_do(expected, {"notes.txt": "One\n"}) and not nothing_to_do({"hidden.py": ""}, {})


def test_a_request_whose_answer_is_empty_is_not_drawn() -> None:
    synth = OPERATIONS["run_known_command"].sample(9000388, 22, "train")  # it asked for repeated lines; there were none
    assert synth is not None and isinstance(synth.task.verifier, VerifierConfig) and synth.task.verifier.command
