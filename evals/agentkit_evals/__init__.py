"""Evaluation: load a suite of tasks, run a model on it, score the results and report them.

    suite = load_suite("tasks/")                    # or "synth", generated tasks
    async with EmbeddedModel("tiny") as model:
        run = await EvalRun(suite, model, Path("runs/first"), model_name="tiny").execute()
    print(estimate(scores_by_task(run.trials)))     # mean ± standard error, clustered by task
    write_report(run)

`load_suite` reads or generates tasks. `EvalRun` runs them and returns a `RunDirectory`. `agentkit_evals.verify.verify`
scores one trial. `compare` compares two runs task by task. `SuiteError`, `VerifierError`, `RunDirectoryError`
and `ComparisonError` are all `EvalError`.
"""

from agentkit_evals.compare import Comparison, compare
from agentkit_evals.errors import ComparisonError, EvalError, RunDirectoryError, SuiteError, VerifierError
from agentkit_evals.record import RunDirectory, RunLock, TrialRecord, scores_by_task
from agentkit_evals.report import render_comparison, render_report, write_report
from agentkit_evals.run import EvalRun, TrialActed, TrialFinished, TrialStarted, agent_for
from agentkit_evals.statistics import (
    Difference,
    Estimate,
    PassRate,
    estimate,
    paired_difference,
    pass_at_k,
    pass_hat_k,
)
from agentkit_evals.suite import Case, Suite, SynthSelection, load_suite, synth_suite
from agentkit_evals.verify import Verdict

__all__ = [
    "Case",
    "Comparison",
    "ComparisonError",
    "Difference",
    "Estimate",
    "EvalError",
    "EvalRun",
    "PassRate",
    "RunDirectory",
    "RunDirectoryError",
    "RunLock",
    "Suite",
    "SuiteError",
    "SynthSelection",
    "TrialActed",
    "TrialFinished",
    "TrialRecord",
    "TrialStarted",
    "Verdict",
    "VerifierError",
    "agent_for",
    "compare",
    "estimate",
    "load_suite",
    "paired_difference",
    "pass_at_k",
    "pass_hat_k",
    "render_comparison",
    "render_report",
    "scores_by_task",
    "synth_suite",
    "write_report",
]
