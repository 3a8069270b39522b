"""The catalog: each entry draws requests that fit it, and faulty entries are refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from agentkit_evals.synth import catalog
from agentkit_evals.synth.catalog import (
    KnownCommand,
    KnownComputation,
    KnownFile,
    KnownFunction,
    commands,
    computations,
    files,
)
from agentkit_evals.synth.catalog.inputs import INPUTS, InputFile
from agentkit_evals.synth.catalog.slots import SLOTS
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.parameters import series

FUNCTIONS = [(domain, known) for domain, found in catalog.functions_by_domain().items() for known in found]
every_domain = pytest.mark.parametrize("domain", catalog.functions_by_domain())


@every_domain
def test_arguments_fit_the_schema_and_are_said_in_the_request(domain: str) -> None:
    for number, known in enumerate(catalog.functions_by_domain()[domain]):
        draw = Draw(f"{domain}/{number}")
        for _ in range(3):
            function = known.draw(draw)
            request = known.call(draw, function)
            schema = function.tool["parameters"]
            jsonschema.Draft202012Validator.check_schema(schema)
            jsonschema.validate(request.arguments, schema)
            assert [name for name in schema["properties"] if name in request.arguments] == [*request.arguments]
            for parameter in known.parameters.values():
                assert parameter.enum is None or len(parameter.enum) > 1
            for value in request.arguments.values():
                if isinstance(value, list) and all(isinstance(each, str) for each in value) and len(set(value)) > 1:
                    assert all(each.lower() in request.text.lower() for each in value)


def test_a_request_with_several_values_needs_a_call_for_each() -> None:
    found = 0
    for domain, known in FUNCTIONS:
        draw = Draw(f"{domain}/{known.names}")
        function = known.draw(draw)
        if (drawn := known.call_each(draw, function)) is None:
            continue
        found += 1
        text, calls = drawn
        assert 2 <= len(calls) <= 3
        for arguments in calls:
            jsonschema.validate(arguments, function.tool["parameters"])
        [several] = [name for name, value in calls[0].items() if value != calls[1][name]]
        assert len({arguments[several] for arguments in calls}) == len(calls)
        assert all({**arguments, several: None} == {**calls[0], several: None} for arguments in calls)
        assert all(arguments[several].lower() in text.lower() for arguments in calls), (text, calls)
    assert found > len(FUNCTIONS) / 3


def test_functions_have_different_names() -> None:
    names = [name for _, known in FUNCTIONS for name in known.names]
    assert len(FUNCTIONS) > 200
    assert len(names) - len(set(names)) < len(names) / 50


def test_each_slot_has_its_type() -> None:
    for name, slot in SLOTS.items():
        for seed in range(20):
            value = slot.draw(Draw(f"{name}/{seed}"))
            jsonschema.validate(value.argument, {"type": slot.type})
            assert value.said
            assert str(value.argument) == value.digits.replace(",", "").strip("\"'") or slot.type == "number"


def test_each_computation_prints_what_its_expression_gives() -> None:
    for number, known in enumerate(computations()):
        for seed in range(3):
            script, result = known.solve(known.request(Draw(f"{number}/{seed}")).arguments)
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(script, {})
            assert printed.getvalue().strip() == result.strip() != "", known.expression


def test_each_file_states_its_path_and_its_content_has_every_argument() -> None:
    for number, known in enumerate(files()):
        draw = Draw(str(number))
        path = known.draw_path(draw)
        request = known.request(draw, path=path)
        assert path in request.text and path.endswith(known.name or f".{known.ending}")
        content = known.text(request.arguments)
        assert not content or content.endswith("\n")
        for value in request.arguments.values():
            assert isinstance(value, (list, bool, int)) or str(value) in content or json.dumps(value)[1:-1] in content


def test_each_command_does_what_its_expression_says(tmp_path: Path) -> None:
    for number, known in enumerate(commands()):
        draw = Draw(str(number))
        file = INPUTS[known.input][0](draw)
        keys = {*file.variables, "path", *(["out"] if known.writes else [])}
        assert set(catalog.KEY.findall(" ".join(known.requests))) <= keys
        assert known.request(draw, file, path="data.txt", out="new.txt")
        assert_as_said(known, file, tmp_path / str(number))


def test_commands_over_lines_work_with_every_script(tmp_path: Path) -> None:
    names = ["Vincenzo Gamble", "Иуда Лапутин", "Δούκισσα Δαγκλή", "Ersan Uzunoğlu", "희솔 청", "Иуда Лапутин"]
    variables = {"lines": names, "item": names[1], "other": "Рикарда Савкин", "n": 2}
    file = InputFile("".join(f"{name}\n" for name in names), variables)
    for number, known in enumerate(known for known in commands() if known.input == "lines"):
        assert_as_said(known, file, tmp_path / str(number))


def assert_as_said(known: KnownCommand, file: InputFile, folder: Path) -> None:
    """Run a command over a file, and compare its result with that of its expression."""
    folder.mkdir()
    source, out = folder / "in put.txt", folder / "out put.txt"
    source.write_text(file.content, encoding="utf-8")
    tool, arguments = known.call(file, path=str(source), out=str(out))
    program = ["sh", "-c", arguments["command"]] if tool == "bash" else [sys.executable, "-c", arguments["code"]]
    environ = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(program, cwd=folder, capture_output=True, encoding="utf-8", check=False, env=environ)
    found = done.stdout if known.answer else (out if known.writes else source).read_text(encoding="utf-8")
    assert found.strip() == known.result(file).strip(), (arguments, done.stderr)


def test_a_number_next_to_a_letter_is_not_a_word() -> None:
    known = KnownComputation.model_validate(
        {"expression": "{a} * {b}", "parameters": _slots(a="count", b="count"), "requests": ["{a}x times {b}, please"]}
    )
    texts = [known.request(Draw(str(seed))).text for seed in range(60)]
    assert all(text.split("x times")[0].isdigit() for text in texts)
    assert any(not text.split("times ")[1].split(",")[0].isdigit() for text in texts)


def test_a_text_in_quotation_marks_gets_no_others() -> None:
    known = KnownComputation.model_validate(
        {"expression": "{a}", "parameters": _slots(a="title"), "requests": ["Say '{a}', {a}"]}
    )
    texts = [known.request(Draw(str(seed))).text for seed in range(30)]
    assert not any("'\"" in text or "''" in text for text in texts)


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        ("", 7, "7"),
        ("json", "a", '"a"'),
        ("count", 3, "1\n2\n3"),
        ("commas", ["a", "b"], "a, b"),
        ("lines", ["a", "b"], "a\nb"),
        ("bullets", ["a", "b"], "- a\n- b"),
        ("numbered", ["a", "b"], "1. a\n2. b"),
    ],
)
def test_forms_of_arguments_in_a_file(form: str, value: Any, text: str) -> None:
    known = KnownFile.model_validate(
        {
            "ending": "txt",
            "content": f"{{v:{form}}}\n" if form else "{v}\n",
            "parameters": _slots(v="noun"),
            "requests": ["{v} to {path}"],
        }
    )
    assert known.text({"v": value}) == f"{text}\n"


FUNCTION = {"names": ["f"], "descriptions": ["F."], "parameters": {"a": {"slot": "city"}}, "requests": ["In {a}"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests": ["In {b}"]}, "has b, which is no parameter"),
        ({"requests": ["In {a}, see {path}"]}, "has path, which is no parameter"),
        ({"requests": ["In [{a}|Rome]"]}, "does not always state a"),
        ({"requests": ["In {a} [b [c|d]]"]}, "alternatives inside alternatives"),
        ({"requests": []}, "at least 1 item"),
        ({"names": ["f.g"]}, "should match pattern"),
        ({"parameters": {"a": {"slot": "planet"}}}, "no slot 'planet'; expected one of city"),
        ({"parameters": {"a": {}}}, "needs one of slot, values, enum, flag, list, object, not none"),
        ({"parameters": {"a": {"slot": "city", "values": ["b"]}}}, "not slot, values"),
        ({"parameters": {"a": {"object": {"b": {"slot": "city"}}, "said": ""}}}, "must state each of b"),
        ({"parameters": {"a": {"slot": "city", "kind": "b"}}}, "Extra inputs"),
    ],
)
def test_faulty_functions_are_refused(change: dict[str, Any], message: str) -> None:
    KnownFunction.model_validate(FUNCTION)
    with pytest.raises(ValidationError, match=message):
        KnownFunction.model_validate(FUNCTION | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests": ["{a}"]}, "does not state {path}"),
        ({"ending": ""}, "needs an ending or a name"),
        ({"name": "Makefile"}, "needs an ending or a name"),
    ],
)
def test_faulty_files_are_refused(change: dict[str, Any], message: str) -> None:
    entry = {"ending": "txt", "content": "{a}", "parameters": _slots(a="noun"), "requests": ["{a} to {path}"]}
    KnownFile.model_validate(entry)
    with pytest.raises(ValidationError, match=message):
        KnownFile.model_validate(entry | change)


def test_an_error_names_the_file_and_the_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "computations").mkdir()
    (tmp_path / "computations" / "sums.yaml").write_text("- {expression: '1', parameters: {}, requests: []}\n")
    monkeypatch.setattr(catalog, "FOLDER", tmp_path)
    computations.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"(?s)sums\.yaml, entry 1: .*requests"):
            computations()
    finally:
        computations.cache_clear()


def test_series_is_how_lists_are_said() -> None:
    assert series(["a", "b", "c"]) == "a, b and c"


def _slots(**slots: str) -> dict[str, Any]:
    return {key: {"slot": slot} for key, slot in slots.items()}
