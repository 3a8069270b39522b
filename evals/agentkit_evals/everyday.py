"""Measure a model on the hand-written suites: `python -m agentkit_evals.everyday --model tiny`.

The suites are in `suites/`. None of their tasks is training data; `agentkit_evals.contamination` checks that.

| suite | tasks |
|---|---|
| `everyday` | sixteen kinds of task with the names and words of everyday work |
| `impossible` | pairs of an impossible request and a twin that can be solved; a pair counts if both are right |
| `readme` | the prompts of the READMEs, and the same sentences with other words |
| `own-tools` | questions for a single call of a tool that is defined in the prompt |

Other suites can be named as files, such as BFCL's questions. The model runs as it does for a user: with its own
sampling parameters, and with a grammar for calls where one can be built. The output is one JSON file, written again
after each suite, and a run directory with a report for each suite.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import anyio

from agentkit.model import Model
from agentkit.models.embedded import EmbeddedModel
from agentkit_engine import Engine
from agentkit_evals.measure import Counter, circumstances, numbers, shown
from agentkit_evals.record import RunDirectory, TrialRecord, scores_by_task
from agentkit_evals.report import write_report
from agentkit_evals.run import EvalRun
from agentkit_evals.suite import HAND_WRITTEN, PACKAGED_SUITES, load_suite
from agentkit_evals.verify import Backend


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a model and write `OUT`."""
    options = _options(argv)
    engine = Engine.load(options.model)
    sampling = engine.sampling.override(temperature=options.temperature)
    measured: dict[str, Any] = {
        "model": engine.name,
        "parameters": sum(parameter.numel() for parameter in engine.decoder.parameters()),
        "seed": options.seed,
        "epochs": options.epochs,
        "temperature": sampling.temperature,
        "backend": options.env,
        **circumstances("agentkit_evals.everyday", argv),
        "suites": {},
    }

    async def measure_all() -> None:
        async with EmbeddedModel(engine) as model:
            for name in options.suites:
                started = time.perf_counter()
                run = await _run(name, model, options)
                print(f"\n{name}: {write_report(run, decode=engine.tokenizer.decode)}")
                found = summary(run) | {"seconds": round(time.perf_counter() - started, 1)}
                for kind, scores in found["kinds"].items():
                    print(f"  {kind:14} {shown(scores)}")
                for key in ("all", "pairs"):
                    print(f"  {key:14} {shown(found[key])}")
                measured["suites"][Path(name).stem] = found
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    anyio.run(measure_all)
    print(options.out)


async def _run(name: str, model: Model, options: argparse.Namespace) -> RunDirectory:
    suite = load_suite(str(PACKAGED_SUITES.get(name, name)), limit=options.limit)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    run = EvalRun(
        suite,
        model,
        Path(options.runs, f"{stamp}-{suite.name}"),
        model_name=options.model,
        epochs=options.epochs,
        concurrency=options.concurrency,
        backend=options.env,
        seed=options.seed,
        sampling=model.sampling.override(temperature=options.temperature),
        listener=Counter(suite.name, len(suite.cases) * options.epochs),
    )
    return await run.execute()


def summary(run: RunDirectory) -> dict[str, Any]:
    """Return the scores of a run: of all tasks, per kind, and of its pairs, with the failures and the solved tasks."""
    kinds: dict[str, list[TrialRecord]] = {}
    for trial in run.trials:
        kinds.setdefault(trial.family, []).append(trial)
    failures = ("model", "limit", "task", "infrastructure")
    return {
        "all": numbers(scores_by_task(run.trials)),
        "kinds": {kind: numbers(scores_by_task(trials)) for kind, trials in sorted(kinds.items())},
        "pairs": numbers(pair_scores(run)),
        "failures": {kind: sum(trial.failure == kind for trial in run.trials) for kind in failures},
        "sampled_tokens": sum(trial.usage.sampled_tokens for trial in run.trials),
        "solved": sorted(trial.trial for trial in run.trials if trial.solved),
    }


def pair_scores(run: RunDirectory) -> list[list[float]]:
    """Return 1 or 0 for each epoch of each pair of `metadata.pair`: 1 if all its tasks were solved.

    An epoch in which a task of the pair was not scored is left out.
    """
    pairs: dict[str, list[str]] = {}
    for task in run.lock.tasks:
        if "pair" in task.metadata:
            pairs.setdefault(str(task.metadata["pair"]), []).append(task.id)
    trials = {(trial.task, trial.epoch): trial for trial in run.trials if trial.reward is not None}
    return [
        [
            float(all(trials[task, epoch].solved for task in tasks))
            for epoch in range(run.lock.epochs)
            if all((task, epoch) in trials for task in tasks)
        ]
        for tasks in pairs.values()
    ]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m agentkit_evals.everyday", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="tiny or a model folder")
    parser.add_argument(
        "--suites", nargs="+", default=HAND_WRITTEN, help="names or files (BFCL's, for example) of suites"
    )
    parser.add_argument("--limit", type=int, help="only the first tasks of each suite")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, help="sampling temperature; the model's own by default")
    parser.add_argument("--concurrency", type=int, default=4)
    backends: tuple[Backend, ...] = ("process", "docker", "unsafe-local")
    parser.add_argument("--env", default="process", choices=backends)
    parser.add_argument("--out", type=Path, default=Path("everyday.json"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
