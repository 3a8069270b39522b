"""Training rows: the ids of sessions, packed by split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from agentkit import Agent, ScriptedModel
from agentkit_engine.chat import Tokenizer
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_engine.training.data import Rows
from agentkit_environments import open_environment
from agentkit_evals.synth.operations import OPERATIONS
from agentkit_evals.synth.produce import THINKING, Plan, produce, split_of
from agentkit_evals.synth.training import LONGEST, main, session_ids


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth")
    produce(Plan(environments=10, instructions=40, seed=2, backend="unsafe-local"), out, workers=1)
    return out


@pytest.mark.anyio
async def test_ids_are_those_of_the_agents_session(instructions: Path) -> None:
    tokenizer = Tokenizer.from_dir(PACKAGED_MODELS["tiny"])
    rows = [json.loads(line) for line in (instructions / "shards" / "00000.jsonl").read_text().splitlines()]
    assert len(rows) >= 40 and any(message["role"] == "tool" for row in rows for message in row["messages"])
    for number, row in enumerate(rows):
        seed = row["provenance"]["seed"]
        synth = OPERATIONS[row["operation"]].sample(row["world"], seed, split_of(row["id"]))
        assert synth is not None and synth.task.id == row["id"]
        task = synth.task
        agent = Agent(
            ScriptedModel(synth.oracle(), tokenizer),
            task.build_tools(),
            system=task.system,
            thinking=THINKING[number % len(THINKING)],
            effort=task.agent.effort,
            output_schema=task.output_schema,
        )
        async with await open_environment(task.environment.spec(), backend="unsafe-local") as environment:
            for path, text in task.environment.files.items():
                await environment.write_file(path, text)
            result = await agent.run(task.instruction, environment=environment)
        assert result.status in ("submitted", "answered")
        ids, mask = session_ids(row, tokenizer)
        assert (ids, mask) == (list(result.trajectory.token_ids), list(result.trajectory.loss_mask))


def test_rows_are_packed_by_split(instructions: Path, tmp_path: Path) -> None:
    shutil.copy(PACKAGED_MODELS["tiny"] / "tokenizer.json", tmp_path)
    main(tmp_path, instructions, workers=1)
    tokenizer = Tokenizer.from_dir(tmp_path)
    for split in ("train", "heldout"):
        rows = Rows.load(tmp_path / f"{split}.safetensors")
        lines = (instructions / f"{split}.jsonl").read_text().splitlines()
        first = slice(0, int(rows.offsets[1]))
        assert 1 <= len(rows) <= len(lines) and int(rows.offsets.diff().max()) <= LONGEST
        assert (rows.ids[first].tolist(), rows.mask[first].tolist()) == session_ids(json.loads(lines[0]), tokenizer)


def test_a_tokenizer_is_built_from_the_conversations(instructions: Path, tmp_path: Path) -> None:
    main(tmp_path, instructions, vocab_size=1600, workers=1)
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.vocab_size <= 1600 and len(tokenizer.encode_text("read_file")) < len("read_file")
