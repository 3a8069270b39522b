"""Measure a model on generated tasks for its card: `python -m agentkit_evals.measure --model tiny --per-operation 50`.

All runs use the same held-out tasks of every operation: the model, the model with a grammar (`--grammar`), and the
baselines. The ablations run only the operations whose facts are far back in the context, each with the compressed
entries of one attention kind zeroed. Scores on phrasings that training never used are also listed separately. The
output is one JSON file, and a run directory with a report for each run. It needs the `synth` extra;
`python -m agentkit_evals.everyday` measures the hand-written suites.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import anyio
import torch

from agentkit.model import Model
from agentkit.models.embedded import EmbeddedModel
from agentkit.models.scripted import Policy, ScriptedModel
from agentkit.version import agentkit_version
from agentkit_engine import Engine
from agentkit_engine.chat import Tokenizer
from agentkit_evals.baselines import BASELINES
from agentkit_evals.record import RunDirectory, TrialRecord, scores_by_task
from agentkit_evals.report import write_report
from agentkit_evals.run import EvalRun, TrialFinished, Update
from agentkit_evals.statistics import estimate
from agentkit_evals.suite import Suite, SynthSelection, load_operations, synth_suite
from agentkit_evals.verify import Backend

Attention = Literal["csa", "hca"]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a model and write `OUT/measure-MODEL.json`."""
    options = _options(argv)
    engine = Engine.load(options.model)
    selection = SynthSelection(operations=options.operations, per_operation=options.per_operation)
    suite = synth_suite(selection, seed=options.seed)
    operations = load_operations()
    cases = tuple(case for case in suite.cases if operations[case.family].far_fact)
    far = Suite("synth-far", cases) if cases else None
    session = _Session(options, engine.tokenizer)
    started = time.perf_counter()
    measured: dict[str, Any] = {
        "model": engine.name,
        "parameters": sum(parameter.numel() for parameter in engine.decoder.parameters()),
        "per_operation": options.per_operation,
        "seed": options.seed,
        "temperature": engine.sampling.temperature if options.temperature is None else options.temperature,
        "top_p": engine.sampling.top_p,
        "backend": options.env,
        **circumstances("agentkit_evals.measure", argv),
        "signatures_seen_in_training": leaks(suite, options.training_worlds),
        "results": session.embedded(engine, suite, "model"),
    }
    if options.grammar:
        measured["with_grammar"] = session.embedded(engine, suite, "with a grammar", grammar=True)
    if options.baselines:
        measured["baselines"] = {name: session.scripted(policy, suite, name) for name, policy in BASELINES.items()}
    if options.ablations and far:
        measured["ablations"] = {
            kind: session.embedded(without_entries(Engine.load(options.model), kind), far, f"without {kind}")
            for kind in ("csa", "hca")
        }
    measured["seconds"] = round(time.perf_counter() - started, 1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"measure-{engine.name}.json"
    path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(path)


def without_entries(engine: Engine, attention: Attention) -> Engine:
    """Zero every compressed entry of one attention kind, in place, and return the engine.

    An entry is the output of its compressor's norm, so zeroing the norm's weight zeros the entries.

    Raises:
        ValueError: no layer has that attention kind.
    """
    layers = [layer.index for layer in engine.spec.layers if layer.attention == attention]
    if not layers:
        raise ValueError(f"model {engine.name} has no {attention} layer")
    parameters = dict(engine.decoder.named_parameters())
    with torch.no_grad():
        for index in layers:
            parameters[f"layers.{index}.attn.compressor.norm.weight"].zero_()
    return engine


def leaks(suite: Suite, worlds: int) -> int:
    """Count the suite's tasks with the signature of a training task, of the same operation over the first worlds."""
    from agentkit_evals.synth.world import world_seed

    operations = load_operations()
    seen: dict[str, set[str]] = {}
    for name in {case.family for case in suite.cases}:
        drawn = (operations[name].sample(world_seed(0, index), 0, "train") for index in range(worlds))
        seen[name] = {made.signature for made in drawn if made is not None}
    return sum(case.signature in seen[case.family] for case in suite.cases)


def summary(run: RunDirectory) -> dict[str, Any]:
    """Return a run's scores, in total and per operation, each also split into trained and held-out phrasings."""
    operations: dict[str, list[TrialRecord]] = {}
    for trial in run.trials:
        operations.setdefault(trial.family, []).append(trial)
    kinds = ("model", "limit", "task", "infrastructure")
    return {
        "all": _scores(run.trials),
        "operations": {name: _scores(trials) for name, trials in sorted(operations.items())},
        "failures": {kind: sum(trial.failure == kind for trial in run.trials) for kind in kinds},
        "sampled_tokens": sum(trial.usage.sampled_tokens for trial in run.trials),
        "forced_tokens": sum(trial.usage.forced_tokens for trial in run.trials),
        "agent_seconds": round(sum(trial.agent_s for trial in run.trials), 1),
    }


def _scores(trials: Sequence[TrialRecord]) -> dict[str, Any]:
    groups = {
        "": list(trials),
        "trained_phrasings": [trial for trial in trials if not trial.held_out_phrasing],
        "held_out_phrasings": [trial for trial in trials if trial.held_out_phrasing],
    }
    result: dict[str, Any] = {}
    for name, group in groups.items():
        result |= {name: numbers(scores_by_task(group))} if name else numbers(scores_by_task(group))
    return result


def circumstances(module: str, argv: Sequence[str] | None) -> dict[str, Any]:
    """Return versions, threads, platform, date and command of a measurement by `python -m MODULE`."""
    return {
        "agentkit": agentkit_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", module, *(sys.argv[1:] if argv is None else argv)],
    }


def numbers(scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return mean, standard error and n, rounded to four digits; only `{"n": 0}` if nothing was scored."""
    found = estimate(scores)
    if found is None:
        return {"n": 0}
    error = None if found.stderr is None else round(found.stderr, 4)
    return {"mean": round(found.mean, 4), "stderr": error, "n": found.n}


class _Session:
    """Options and tokenizer shared by all runs of one measurement."""

    def __init__(self, options: argparse.Namespace, tokenizer: Tokenizer) -> None:
        self.options = options
        self.tokenizer = tokenizer

    def embedded(self, engine: Engine, suite: Suite, name: str, *, grammar: bool = False) -> dict[str, Any]:
        """Run the suite on an engine and return the summary."""

        async def execute() -> RunDirectory:
            async with EmbeddedModel(engine) as model:
                return await self._run(model, suite, name, grammar=grammar).execute()

        return self._summary(anyio.run(execute), name)

    def scripted(self, policy: Policy, suite: Suite, name: str) -> dict[str, Any]:
        """Run the suite on a policy and return the summary."""
        run = self._run(ScriptedModel(policy, self.tokenizer, name=name), suite, name)
        return self._summary(anyio.run(run.execute), name)

    def _run(self, model: Model, suite: Suite, name: str, *, grammar: bool = False) -> EvalRun:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        label = "".join(c if c.isalnum() else "-" for c in name)
        return EvalRun(
            suite,
            model,
            Path(self.options.runs, f"{stamp}-measure-{label}"),
            model_name=name if name != "model" else self.options.model,
            concurrency=self.options.concurrency,
            backend=self.options.env,
            seed=self.options.seed,
            sampling=model.sampling.override(temperature=self.options.temperature, grammar=grammar),
            listener=Counter(name, len(suite.cases)),
        )

    def _summary(self, run: RunDirectory, name: str) -> dict[str, Any]:
        report = write_report(run, decode=self.tokenizer.decode)
        found = summary(run)
        print(f"\n{name}: {report}")
        for label, scores in {**found["operations"], "all": found["all"]}.items():
            apart = [scores[key].get("mean") for key in ("trained_phrasings", "held_out_phrasings")]
            print(f"  {label:16} {shown(scores)}  trained phrasings {apart[0]}, held-out phrasings {apart[1]}")
        return found


class Counter:
    """A listener of a run that prints one line of progress to standard error."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.done = self.solved = 0

    def __call__(self, update: Update) -> None:
        if isinstance(update, TrialFinished):
            self.done += 1
            self.solved += update.record.solved
            print(f"\r{self.name}: {self.solved}/{self.done} of {self.total}", end="", file=sys.stderr, flush=True)


def shown(scores: dict[str, Any]) -> str:
    """Return the result of `numbers` as text."""
    if not scores["n"]:
        return "not scored"
    error = "" if scores["stderr"] is None else f" ± {scores['stderr']:.3f}"
    return f"{scores['mean']:.3f}{error} (n = {scores['n']})"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m agentkit_evals.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="tiny or a model folder")
    parser.add_argument("--per-operation", type=int, default=50, help="held-out tasks of each operation")
    parser.add_argument("--operations", nargs="*", default=[], help="operations to measure; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, help="sampling temperature; the model's own by default")
    parser.add_argument("--concurrency", type=int, default=4)
    backends: tuple[Backend, ...] = ("process", "docker", "unsafe-local")
    parser.add_argument("--env", default="process", choices=backends)
    parser.add_argument("--training-worlds", type=int, default=200, help="training worlds to check for leaks")
    parser.add_argument("--grammar", action="store_true", help="also measure with a grammar; needs llguidance")
    parser.add_argument("--baselines", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ablations", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("evals/results"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
