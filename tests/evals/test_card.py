"""The model card's tables match the measured files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_evals.card import main, measured_tables, read_log, training_table
from agentkit_evals.synth import FAMILIES

ROOT = Path(__file__).parents[2]


def score(mean: float, n: int) -> dict[str, object]:
    part = {"mean": mean, "stderr": 0.05, "n": n}
    return {**part, "trained_phrasings": part, "held_out_phrasings": {"n": 0}}


def test_measured_tables_have_a_row_per_family() -> None:
    results = {"families": {"config": score(0.5, 4), "archive": score(0.25, 4)}, "all": score(0.375, 8)}
    nop = {"families": {"config": score(0, 4), "archive": score(0, 4)}, "all": score(0, 8)}
    far = {"families": {"archive": score(0, 4)}}
    guided = {"families": {"config": score(0.75, 4)}, "all": score(0.75, 4)}
    families, grammar, baselines, ablations = measured_tables(
        {"results": results, "with_grammar": guided, "baselines": {"nop": nop}, "ablations": {"csa": far}}
    )
    assert "| config | 50.0 ± 5.0 | 4 | 50.0 ± 5.0 | 4 | – | 0 |" in families
    assert "| all | 37.5 ± 5.0 | 8 |" in families
    assert grammar.splitlines()[2:] == ["| config | 50.0 ± 5.0 | 75.0 ± 5.0 |", "| all | 37.5 ± 5.0 | 75.0 ± 5.0 |"]
    assert baselines.splitlines()[0] == "| family | nop, % |"
    assert ablations.splitlines()[2:] == ["| archive | 25.0 ± 5.0 | 0.0 ± 5.0 |"]


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


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"results": {"families": 3, "all": {}}}'])
def test_another_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    measured = ROOT / "evals/results/measure-tiny.json"
    other = tmp_path / "other.json"
    other.write_text(text)
    for given in ((other, None), (measured, [other])):
        with pytest.raises(typer.BadParameter, match=r"expected the output of .*; got .*other\.json"):
            main(*given)


def test_the_packaged_model_card_matches_the_measurements() -> None:
    measured = json.loads((ROOT / "evals/results/measure-tiny.json").read_text())
    logs = [read_log(ROOT / f"engine/results/tiny-training-{number}.jsonl") for number in (1, 2)]
    card = (PACKAGED_MODELS["tiny"] / "MODEL_CARD.md").read_text()
    for text in (*measured_tables(measured), training_table(logs)):
        assert text in card
    assert set(measured["results"]["families"]) == set(FAMILIES)
    assert all(score["n"] >= 50 for score in measured["results"]["families"].values())
    assert measured["masked_pairs_seen_in_training"] == 0
    whole = measured["results"]["families"]
    for kind, family in (("csa", "archive"), ("csa", "ledger"), ("hca", "poll")):
        left = measured["ablations"][kind]["families"][family]
        assert left["mean"] + 2 * left["stderr"] < whole[family]["mean"], f"{family} does not need {kind}"
    mean, stderr = (100 * measured["results"]["all"][key] for key in ("mean", "stderr"))
    assert (
        f"{mean:.1f} % ± {stderr:.1f} of {measured['results']['all']['n']} held-out tasks"
        in (ROOT / "README.md").read_text()
    )
