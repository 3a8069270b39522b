"""Answers with an output schema: the schema is in the prompt, and its grammar allows what the oracle writes."""

from __future__ import annotations

import json

import jsonschema
import pytest

from agentkit.messages import to_openai_all
from agentkit_engine.chat import Tokenizer
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_engine.grammar import Grammars
from agentkit_evals.synth.operations import OPERATIONS
from agentkit_evals.synth.operations.json_answers import JSON_ANSWERS
from agentkit_evals.synth.sandbox import OracleSandbox
from agentkit_evals.synth.task import SynthTask
from agentkit_evals.synth.training import session_ids

TOKENIZER = Tokenizer.from_dir(PACKAGED_MODELS["tiny"])
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size)
every_operation = pytest.mark.parametrize("operation", [operation.name for operation in JSON_ANSWERS])


def drawn(operation: str, worlds: int) -> list[SynthTask]:
    return list(filter(None, (OPERATIONS[operation].sample(world, 0, "train") for world in range(worlds))))


@pytest.mark.anyio
@every_operation
async def test_the_schema_is_in_the_prompt_and_its_grammar_allows_the_row(operation: str) -> None:
    async with OracleSandbox("unsafe-local") as sandbox:
        for synth in drawn(operation, 4):
            messages, _ = await sandbox.solve(synth, thinking="auto")
            row = {"task": synth.task.model_dump(mode="json"), "messages": to_openai_all(messages)}
            ids, mask = session_ids(row, TOKENIZER)
            schema = synth.task.output_schema
            assert json.dumps(schema, ensure_ascii=False) in TOKENIZER.decode(ids)
            matcher = GRAMMARS.answer(schema, tools=[tool.spec for tool in synth.task.build_tools()]).matcher()
            for place, (token_id, own) in enumerate(zip(ids, mask, strict=True)):
                if own:
                    matcher.follow(ids[:place])
                    allowed = matcher.mask()
                    assert allowed is None or allowed[token_id] == 0


@every_operation
def test_answers_fit_schemas_of_every_type(operation: str) -> None:
    kinds: set[str] = set()
    sizes: set[int] = set()
    for synth in drawn(operation, 40):
        schema = synth.task.output_schema
        assert schema is not None and "submit" not in synth.task.tools
        steps = synth.oracle().args[0]  # type: ignore[attr-defined]
        jsonschema.validate(json.loads(steps[-1]([]).content), schema)
        kinds |= {"enum" if "enum" in each else each["type"] for each in schema["properties"].values()}
        sizes.add(len(schema["properties"]))
    assert kinds == {"string", "integer", "number", "boolean", "array", "enum"} and sizes == {1, 2, 3, 4}
