"""The model card's tables match the measured files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_evals.card import everyday_tables, filled, main, measured_tables, read_log, training_table
from agentkit_evals.suite import HAND_WRITTEN

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "evals/results"
EVERYDAY = RESULTS / "everyday-tiny.json"


def score(mean: float, n: int) -> dict[str, object]:
    part = {"mean": mean, "stderr": 0.05, "n": n}
    return {**part, "trained_phrasings": part, "held_out_phrasings": {"n": 0}}


ALL = {"mean": 0.375, "stderr": 0.05, "n": 8}
SUITES = {
    "suites": {
        "impossible": {"all": ALL, "pairs": {"mean": 0.25, "stderr": 0.05, "n": 4}, "kinds": {"beyond": ALL}},
        "readme": {"all": ALL, "pairs": {"n": 0}, "kinds": {"stock": ALL}},
    }
}


def test_the_hand_written_suites_and_their_kinds_have_rows() -> None:
    tables = dict(everyday_tables(SUITES))
    assert tables["suites"].splitlines()[2:] == [
        "| impossible | 37.5 ± 5.0 | 8 | 25.0 ± 5.0 | 4 |",
        "| readme | 37.5 ± 5.0 | 8 | – | 0 |",
    ]
    assert "| impossible | beyond | 37.5 ± 5.0 | 8 |" in tables["kinds"]


def test_measured_tables_have_a_row_per_operation() -> None:
    results = {"operations": {"count_rows": score(0.5, 4), "far_name": score(0.25, 4)}, "all": score(0.375, 8)}
    nop = {"operations": {"count_rows": score(0, 4), "far_name": score(0, 4)}, "all": score(0, 8)}
    far = {"operations": {"far_name": score(0, 4)}}
    guided = {"operations": {"count_rows": score(0.75, 4)}, "all": score(0.75, 4)}
    tables = dict(
        measured_tables(
            {"results": results, "with_grammar": guided, "baselines": {"nop": nop}, "ablations": {"csa": far}}
        )
    )
    assert "| count_rows | 50.0 ± 5.0 | 4 | 50.0 ± 5.0 | 4 | – | 0 |" in tables["operations"]
    assert "| all | 37.5 ± 5.0 | 8 |" in tables["operations"]
    assert tables["grammar"].splitlines()[2:] == [
        "| count_rows | 50.0 ± 5.0 | 75.0 ± 5.0 |",
        "| all | 37.5 ± 5.0 | 75.0 ± 5.0 |",
    ]
    assert tables["baselines"].splitlines()[0] == "| operation | nop, % |"
    assert tables["ablations"].splitlines()[2:] == ["| far_name | 25.0 ± 5.0 | 0.0 ± 5.0 |"]


def test_tables_replace_the_sections_of_a_card() -> None:
    card = "# Card\n\n<!-- suites -->\nold\n<!-- end -->\n\ntext\n\n<!-- kinds -->\n<!-- end -->\n"
    once = filled(card, {"suites": "| a |", "kinds": "| b |"})
    assert once == (
        "# Card\n\n<!-- suites -->\n\n| a |\n\n<!-- end -->\n\ntext\n\n<!-- kinds -->\n\n| b |\n\n<!-- end -->\n"
    )
    assert filled(once, {"suites": "| a |", "kinds": "| b |"}) == once
    with pytest.raises(typer.BadParameter, match="the card has the sections kinds, suites; the files give suites"):
        filled(card, {"suites": "| a |"})


def test_training_tokens_are_multiplied_by_processes() -> None:
    entries: list[dict[str, Any]] = [
        {"config": {"steps": 7}, "workers": 2, "rows": 1500},
        {"step": 6, "loss": 0.1234, "tokens": 1_000_000, "written": 250_000, "s": 120.0},
        {"step": 7, "token_accuracy": 0.98, "row_accuracy": 0.5},
    ]
    text = training_table([entries])
    assert "| steps | 7, 2 processes" in text
    entries[0]["config"] = {"steps": 9}
    assert "| steps | 7 of 9, 2 processes" in training_table([entries])
    assert "| tokens | 2.0 M, 0.5 M of them the assistant's |" in text
    assert "| time | 2 minutes |" in text
    assert "| held-out trajectories right to the last token | 50.0 % |" in text
    assert "| steps | 7 of 9, 2 processes of one thread | 7 of 9, 2" in training_table([entries, entries])


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"results": {"operations": 3, "all": {}}}'])
def test_another_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    right, other = tmp_path / "right.json", tmp_path / "other.json"
    right.write_text(json.dumps(SUITES))
    other.write_text(text)
    log = tmp_path / "training.jsonl"
    log.write_text(
        '{"config": {"steps": 1}, "workers": 1, "rows": 1}\n{"step": 0, "loss": 1, "tokens": 1, "written": 1, "s": 1}\n'
    )
    for everyday, measured in ((other, right), (right, other)):
        with pytest.raises(typer.BadParameter, match=r"expected the output of .*; got .*other\.json"):
            main(everyday, [log], measured, tmp_path / "MODEL_CARD.md")


def test_the_packaged_model_card_matches_the_measurements() -> None:
    everyday = json.loads(EVERYDAY.read_text())
    logs = [read_log(path) for path in sorted((ROOT / "engine/results").glob("tiny-training-*.jsonl"))]
    measured = json.loads((RESULTS / "measure-tiny.json").read_text())
    tables = {**dict(everyday_tables(everyday)), "training": training_table(logs), **dict(measured_tables(measured))}
    card = (PACKAGED_MODELS["tiny"] / "MODEL_CARD.md").read_text()
    assert filled(card, tables) == card
    assert list(everyday["suites"]) == list(HAND_WRITTEN)
    for name, found in json.loads((EVERYDAY.parent / "bfcl-tiny.json").read_text())["suites"].items():
        mean, stderr = 100 * found["all"]["mean"], 100 * found["all"]["stderr"]
        assert f"`{name.removeprefix('BFCL_v4_')}` | {mean:.1f} ± {stderr:.1f} | {found['all']['n']}" in card
    readme, score = (ROOT / "README.md").read_text(), everyday["suites"]["everyday"]["all"]
    mean, stderr = 100 * score["mean"], 100 * score["stderr"]
    assert f"{mean:.1f} % ± {stderr:.1f} of {score['n']} everyday tasks" in readme
