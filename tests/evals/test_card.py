"""The model card's tables say what the measured files say."""

from __future__ import annotations

from typing import Any

from agentkit_evals.card import measured_tables, training_table


def score(mean: float, n: int) -> dict[str, object]:
    part = {"mean": mean, "stderr": 0.05, "n": n}
    return {**part, "trained_phrasings": part, "held_out_phrasings": {"n": 0}}


def test_every_family_baseline_and_ablation_has_its_row() -> None:
    results = {"families": {"config": score(0.5, 4), "archive": score(0.25, 4)}, "all": score(0.375, 8)}
    nop = {"families": {"config": score(0, 4), "archive": score(0, 4)}, "all": score(0, 8)}
    far = {"families": {"archive": score(0, 4)}}
    families, baselines, ablations = measured_tables(
        {"results": results, "baselines": {"nop": nop}, "ablations": {"csa": far}}
    )
    assert "| config | 50.0 ± 5.0 | 4 | 50.0 ± 5.0 | 4 | – | 0 |" in families
    assert "| all | 37.5 ± 5.0 | 8 |" in families
    assert baselines.splitlines()[0] == "| family | nop, % |"
    assert ablations.splitlines()[2:] == ["| archive | 25.0 ± 5.0 | 0.0 ± 5.0 |"]


def test_training_counts_every_process() -> None:
    entries: list[dict[str, Any]] = [
        {"config": {"steps": 7}, "workers": 2, "rows": 1500},
        {"step": 6, "loss": 0.1234, "tokens": 1_000_000, "written": 250_000, "s": 120.0},
        {"step": 7, "token_accuracy": 0.98, "row_accuracy": 0.5},
    ]
    text = training_table(entries)
    assert "| tokens | 2.0 M, 0.5 M of them the assistant's |" in text
    assert "| time | 2 minutes |" in text
    assert "| held-out trajectories right to the last token | 50.0 % |" in text
