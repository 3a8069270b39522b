"""The packaged suite of generated tasks is what its command writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentkit.task import Task
from agentkit_evals.selfcheck import selfcheck
from agentkit_evals.suite import Case, load_suite
from agentkit_evals.synth.packaged import CHOSEN, main
from agentkit_evals.synth.vocabulary import versions

MADE_WITH = {"mimesis": "22.2.0", "wonderwords": "3.0.1"}
"""The versions of the packages whose words the committed files have."""


def content(task: Task) -> dict[str, Any]:
    data = task.model_dump(mode="json")
    del data["metadata"]["provenance"]["generator"]  # has the version of agentkit
    return data


@pytest.mark.skipif(versions() != MADE_WITH, reason="other versions of the packages have other words")
def test_the_command_writes_the_committed_files(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("")
    main(tmp_path)
    written = {case.family: content(case.task) for case in load_suite(str(tmp_path)).cases}
    assert written == {case.family: content(case.task) for case in load_suite("generated").cases}


def test_each_operation_has_one_task_and_it_is_held_out() -> None:
    cases = load_suite("generated").cases
    assert sorted(case.family for case in cases) == sorted(CHOSEN)
    assert all(case.task.id.startswith(f"{case.family}-heldout-") for case in cases)


@pytest.mark.parametrize("case", load_suite("generated").cases, ids=lambda case: case.family)
@pytest.mark.anyio
async def test_a_task_is_sound(case: Case) -> None:
    assert (await selfcheck(case.task, backend="unsafe-local")).problems == []
