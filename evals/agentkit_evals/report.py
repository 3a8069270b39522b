"""HTML reports: one self-contained file per run, with scores, distributions and every trajectory.

A report loads nothing from elsewhere: styles, scripts and data are in the file. Output of models and tools is only
shown as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from agentkit.errors import TrajectoryError
from agentkit.events import (
    CallDecided,
    CallFinished,
    CallStarted,
    Compacted,
    LimitReached,
    MessageAdded,
    Outcome,
    TurnFinished,
    TurnStarted,
)
from agentkit.messages import AssistantMessage, SystemMessage, UserMessage
from agentkit.model import CallMalformed, ThoughtCut, TokenSegment, Usage, total_usage
from agentkit.prices import dollars
from agentkit.task import Task, VerifierConfig
from agentkit.trajectory import Trajectory
from agentkit_evals.compare import Comparison, Row
from agentkit_evals.expected import expected_of
from agentkit_evals.record import RunDirectory, TrialRecord, scores_by_task
from agentkit_evals.statistics import Estimate, PassRate, estimate, pass_at_k, pass_hat_k

LEGEND = {
    "solved": "solved",
    "model": "model failure",
    "limit": "limit reached",
    "task": "task defect",
    "infrastructure": "infrastructure",
}
MAX_TOKENS = 2_000_000
"""Maximum number of token ids in one report. Later trials are shown without their token view, with a note."""

Decode = Callable[[Sequence[int]], str]


def write_report(run: RunDirectory, path: Path | None = None, *, decode: Decode | None = None) -> Path:
    """Write the report of a run, finished or not, into its directory or to `path`, and return the path.

    `decode` turns token ids into text for the token view; without it, the view shows ids.
    """
    path = path or run.path / "report.html"
    path.write_text(render_report(run, decode=decode), encoding="utf-8")
    return path


def render_report(run: RunDirectory, *, decode: Decode | None = None) -> str:
    """Return the report of a run as HTML. `decode` is as for `write_report`."""
    trials = sorted(run.trials, key=lambda trial: (trial.family, trial.task, trial.epoch))
    tasks = {task.id: task for task in run.lock.tasks}
    budget = MAX_TOKENS
    views: list[dict[str, Any]] = []
    fed = FedIds()
    for trial in trials:
        view = _trial_view(run, trial, tasks[trial.task], fed, with_tokens=budget > 0)
        budget -= trial.usage.prompt_tokens + trial.usage.sampled_tokens
        views.append(view)
    ids = {i for view in views for turn in view["turns"] or () for _, chunk, _ in turn["segments"] for i in chunk}
    pieces = {i: decode([i]) for i in sorted(ids)} if decode else {}
    kinds = [_kind(trial) for trial in trials]
    about = run.lock.model_dump(include={"name", "model", "seed", "epochs", "created", "agentkit"}, mode="json")
    return _page(
        "report.html.j2",
        lock=run.lock,
        complete=run.complete,
        stopped=_stopped(run),
        costs=any(trial.usage.cost_usd is not None for trial in trials),
        trials=len(trials),
        planned=len(run.lock.tasks) * run.lock.epochs,
        backends=", ".join(sorted({trial.backend for trial in trials if trial.backend})),
        solved=sum(trial.solved for trial in trials),
        scored=sum(trial.reward is not None for trial in trials),
        outcomes=[(kind, kinds.count(kind)) for kind in LEGEND],
        legend=LEGEND,
        facts=_facts(run, trials, len(fed)),
        families=_family_rows(trials),
        charts=_charts(trials),
        command=shlex.join(run.lock.command),
        data=_script_json({"trials": views, "pieces": pieces, "legend": LEGEND, "about": about}),
    )


def render_trajectory(trajectory: Trajectory, name: str, *, decode: Decode | None = None) -> str:
    """Return one trajectory as an HTML page in the style of a report."""
    turns, notes = _turns(trajectory, with_tokens=True)
    ids = {i for turn in turns for _, chunk, _ in turn["segments"] for i in chunk}
    said = [record.message for record in trajectory.records if isinstance(record, MessageAdded)]
    outcome = trajectory.outcome
    status = outcome.status if outcome else "cut off"
    kind = {
        "submitted": "solved",
        "answered": "solved",
        "limit": "limit",
        "invalid_output": "model",
        "no_answer": "model",
    }.get(status, "task")
    view = {
        "id": name,
        "kind": kind,
        "task": name,
        "epoch": 0,
        "family": None,
        "phrasing": "",
        "held_out": False,
        "instruction": next((message.content for message in said if isinstance(message, UserMessage)), ""),
        "system": next((message.content for message in said if isinstance(message, SystemMessage)), None),
        "files": {},
        "expected": None,
        "verifier": None,
        "status": status,
        "reward": None,
        "answer": outcome.answer if outcome else None,
        "error": outcome.error if outcome else None,
        "agent_s": outcome.usage.wall_time_s if outcome else max(trajectory.times_s, default=0.0),
        "usage": asdict(trajectory.usage),
        "cost": _cost(trajectory.usage),
        "turns": turns,
        "notes": notes,
    }
    header = trajectory.header
    data = {
        "trials": [view],
        "pieces": {i: decode([i]) for i in sorted(ids)} if decode else {},
        "legend": {kind: status},
        "about": {"name": name, "model": header.model, "created": header.created},
    }
    return _page("trajectory.html.j2", name=name, header=header, data=_script_json(data))


def render_index(name: str, runs: Sequence[tuple[RunDirectory, str]], problems: Sequence[str] = ()) -> str:
    """Return an HTML table of (run, link to its report) pairs, newest first."""
    rows: list[dict[str, Any]] = []
    for run, report in sorted(runs, key=lambda each: each[0].lock.created, reverse=True):
        mean = estimate(scores_by_task(run.trials))
        planned = len(run.lock.tasks) * run.lock.epochs
        rows.append(
            {
                "run": run.path.name,
                "report": report,
                "created": run.lock.created,
                "suite": run.lock.name,
                "model": run.lock.model,
                "mean": mean.mean if mean else None,
                "score": str(mean) if mean else "–",
                "solved": sum(trial.solved for trial in run.trials),
                "trials": len(run.trials),
                "tokens": sum(trial.usage.sampled_tokens for trial in run.trials),
                "state": "complete" if run.complete else f"{len(run.trials)} of {planned} trials",
            }
        )
    data = _script_json({"runs": rows, "about": {"name": f"runs-{name}"}})
    return _page("index.html.j2", name=name, problems=problems, data=data)


def render_comparison(comparison: Comparison) -> str:
    """Return a comparison of two runs as an HTML page in the style of a report."""
    total = comparison.total
    families = comparison.families if len(comparison.families) > 1 else ()
    return _page(
        "compare.html.j2",
        first=comparison.first,
        second=comparison.second,
        total=total,
        left=str(comparison.left),
        settings=comparison.settings,
        facts=_comparison_facts(total),
        rows=[_comparison_row(row) for row in (*families, total)],
        first_better=comparison.first_better,
        second_better=comparison.second_better,
        data=_script_json({"comparison": comparison.as_json(), "about": {"name": "comparison"}}),
    )


def _comparison_facts(total: Row) -> list[tuple[str, str, str]]:
    found, sides = total.difference, (("A", total.first), ("B", total.second))
    facts = [
        (f"mean reward of {name}", f"{side.mean:.3f}", f"{side.solved}/{side.trials} trials") for name, side in sides
    ]
    facts.append(("B − A", str(found), "± standard error of paired differences"))
    if found.low is not None and found.high is not None:
        facts.append(("95 % interval", f"{found.low:+.3f} to {found.high:+.3f}", "paired bootstrap over tasks"))
    if found.p_value is not None:
        facts.append(("McNemar's exact test", f"p = {found.p_value:.3g}", "two-sided"))
    for name, side in sides:
        facts.append((f"tokens of {name}", f"{side.tokens:,.0f}", f"sampled; {side.prompt_tokens:,.0f} fed; per trial"))
    return facts


def _comparison_row(row: Row) -> dict[str, Any]:
    found, sides = row.difference, (row.first, row.second)
    interval = "–" if found.low is None or found.high is None else f"{found.low:+.3f} to {found.high:+.3f}"
    return {
        "name": "all" if row.family is None else row.family,
        "total": row.family is None,
        "tasks": found.tasks,
        "means": [(_percent(side.mean), f"{side.mean:.3f}") for side in sides],
        "cells": [
            str(found),
            interval,
            *(f"{side.tokens:,.0f}" for side in sides),
            *(f"{side.seconds:.1f}" for side in sides),
            *("–" if side.cost_usd is None else dollars(side.cost_usd) for side in sides),
        ],
    }


def _page(template: str, **values: Any) -> str:
    """Render a page. Its Content-Security-Policy forbids all loading and every script except the viewer's own."""
    viewer = files("agentkit_evals") / "viewer"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    script = (viewer / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sources = {"default": "'none'", "script": f"'sha256-{digest}'", "style": "'unsafe-inline'"}
    policy = "; ".join(f"{kind}-src {allowed}" for kind, allowed in sources.items())
    policy += "; base-uri 'none'; form-action 'none'"
    return environment.from_string((viewer / template).read_text(encoding="utf-8")).render(
        **values,
        policy=policy,
        css=Markup((viewer / "report.css").read_text(encoding="utf-8")),
        js=Markup(script),
    )


def _script_json(data: object) -> Markup:
    """Return JSON in which no text can close the surrounding script element."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _stopped(run: RunDirectory) -> str:
    """Return the reason why a run has fewer trials than planned."""
    return f"stopped at the cost limit of {dollars(run.lock.max_cost_usd)}" if run.out_of_budget else "interrupted"


def _cost(usage: Usage) -> str | None:
    return None if usage.cost_usd is None else dollars(usage.cost_usd)


def _kind(trial: TrialRecord) -> str:
    return trial.failure or "solved"


class FedIds:
    """Counts fed ids over several runs, shared prefixes once: the minimum that any prefix cache must compute."""

    def __init__(self) -> None:
        self._prefixes: set[int] = set()

    def add(self, ids: Sequence[int], sampled: Sequence[int]) -> None:
        """Add a run: its ids, and a 1 for each sampled id or a 0 for each fed one."""
        prefix = 0
        for token_id, mine in zip(ids, sampled, strict=True):
            prefix = hash((prefix, token_id))
            if not mine:
                self._prefixes.add(prefix)

    def __len__(self) -> int:
        return len(self._prefixes)


def _facts(run: RunDirectory, trials: Sequence[TrialRecord], unique: int) -> list[tuple[str, str, str]]:
    scores = run.scores()
    mean = estimate(scores)
    planned = len(run.lock.tasks) * run.lock.epochs
    sampled = sum(trial.usage.sampled_tokens for trial in trials)
    agent_s = sum(trial.agent_s for trial in trials)
    tool_s = sum(trial.usage.tool_time_s for trial in trials)
    thinking = sum(trial.usage.thinking_tokens for trial in trials)
    facts = [
        ("mean reward", str(mean) if mean else "–", _of(mean, planned, len(scores)) if mean else "no scored trials"),
        ("turns", str(sum(trial.usage.turns for trial in trials)), ""),
        ("tool calls", str(sum(trial.usage.calls for trial in trials)), f"{tool_s:.1f} s in tools"),
        ("tokens sampled", f"{sampled:,}", f"{thinking:,} of them thinking"),
        ("tokens fed", f"{sum(trial.usage.prompt_tokens for trial in trials):,}", "prompts and tool results"),
        ("forced ids", f"{sum(trial.usage.forced_tokens for trial in trials):,}", "inserted by the harness, mask 0"),
        ("agent time", f"{agent_s:.1f} s", "summed over trials"),
    ]
    hits = sum(trial.usage.cache_hit_tokens for trial in trials)
    misses = sum(trial.usage.cache_miss_tokens for trial in trials)
    if misses:
        ratio = f"; computed ÷ unique: {misses / unique:.2f}" if unique else ""  # an API may report no ids
        facts.insert(-2, ("prefix cache hits", f"{100 * hits / (hits + misses):.1f} %", f"of tokens fed{ratio}"))
    if repeated := sum(trial.attempt - 1 for trial in trials):
        facts.append(("attempts repeated", str(repeated), "interrupted, or not scored; kept in attempts/"))
    if agent_s:
        facts.append(("tokens per second", f"{sampled / agent_s:.0f}", "per trial, including tools"))
    facts.extend(cost_facts(run))
    k = run.lock.epochs
    at, hat = pass_at_k(scores, k), pass_hat_k(scores, k)
    if k > 1 and at is not None and hat is not None:
        facts[1:1] = [(f"pass@{k}", f"{at.value:.3f}", f"at least one epoch{_share(at)}")]
        facts[2:2] = [(f"pass^{k}", f"{hat.value:.3f}", f"every epoch{_share(hat)}")]
    elif k > 1:
        facts[1:1] = [(f"pass@{k}, pass^{k}", "–", f"no task has {k} scored epochs")]
    return facts


def cost_facts(run: RunDirectory) -> list[tuple[str, str, str]]:
    """Return names, values and notes on the cost of a run, and on what its embedded model's trials would have cost."""
    if run.lock.list_price is None:  # the run was recorded by a version without costs
        return []
    usage = run.usage
    facts = []
    if usage.cost_usd is not None or any(_of_unknown_cost(trial) for trial in run.trials):
        notes = [f"at list prices of {run.lock.prices_as_of}"] if run.lock.prices_as_of else []
        recorded = total_usage(trial.usage for trial in run.trials).cost_usd or 0.0
        if usage.cost_usd is not None and usage.cost_usd > recorded:
            notes.append(f"{dollars(usage.cost_usd - recorded)} of it in unfinished trials")
        facts.append(("cost", dollars(usage.cost_usd), ", ".join(notes)))
    embedded = [trial.list_cost_usd for trial in run.trials if trial.list_cost_usd is not None]
    if embedded:
        facts.append(("would have cost", dollars(sum(embedded)), f"at {run.lock.list_price}"))
    return facts


def _of_unknown_cost(trial: TrialRecord) -> bool:
    used = trial.usage.prompt_tokens or trial.usage.sampled_tokens
    return bool(used) and trial.usage.cost_usd is None and trial.list_cost_usd is None


def _of(mean: Estimate, trials: int, tasks: int) -> str:
    if (mean.n, mean.tasks) == (trials, tasks):
        return f"{mean.n} trials, {mean.tasks} tasks"
    return f"only {mean.n} of {trials} trials, {mean.tasks} of {tasks} tasks"


def _share(rate: PassRate) -> str:
    return "" if rate.complete else f"; only {rate.tasks} of {rate.of} tasks"


def _family_rows(trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    families: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        families.setdefault(trial.family, []).append(trial)
    rows = [_family_row(name, members) for name, members in families.items()]
    if len(rows) > 1:
        rows.append({**_family_row("all", trials), "total": True, "squares": []})
    return rows


def _family_row(name: str, trials: Sequence[TrialRecord]) -> dict[str, Any]:
    scored = [trial for trial in trials if trial.reward is not None]
    held_out = [trial for trial in scored if trial.held_out_phrasing]
    mean = estimate(scores_by_task(trials))
    stderr = mean.stderr if mean else None
    return {
        "name": name,
        "total": False,
        "mean": str(mean) if mean else "–",
        "percent": _percent(mean.mean) if mean else 0,
        "low": _percent(mean.mean - stderr) if mean and stderr is not None else None,
        "high": _percent(mean.mean + stderr) if mean and stderr is not None else None,
        "solved": sum(trial.solved for trial in scored),
        "scored": len(scored),
        "held_out": f"{sum(trial.solved for trial in held_out)}/{len(held_out)}" if held_out else "–",
        "turns": _mean([trial.usage.turns for trial in scored], 1),
        "tokens": _mean([trial.usage.sampled_tokens for trial in scored], 0),
        "seconds": _mean([trial.agent_s for trial in scored], 2),
        "cost": dollars(total_usage(trial.usage for trial in trials).cost_usd),
        "squares": [{"id": trial.trial, "kind": _kind(trial)} for trial in trials],
    }


def _percent(share: float) -> float:
    return round(100 * min(max(share, 0.0), 1.0), 2)


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{statistics.fmean(values):,.{digits}f}" if values else "–"


def _charts(trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    ran = [trial for trial in trials if trial.status is not None]
    measures: Mapping[str, Callable[[TrialRecord], float]] = {
        "turns per trial": lambda trial: trial.usage.turns,
        "tokens sampled per trial": lambda trial: trial.usage.sampled_tokens,
        "seconds per trial": lambda trial: trial.agent_s,
    }
    return [_chart(title, [(measure(t), t.solved) for t in ran]) for title, measure in measures.items() if ran]


def _chart(title: str, values: Sequence[tuple[float, bool]], bins: int = 16) -> dict[str, Any]:
    """Return a histogram with at most `bins` bins, solved trials below the others."""
    numbers = [value for value, _ in values]
    low, high = min(numbers), max(numbers)
    if all(isinstance(number, int) for number in numbers):
        bins = min(bins, round(high - low) + 1)
        width = -(-(high - low + 1) // bins)
    else:
        width = (high - low) / bins or 1.0
    counts = [[0, 0] for _ in range(bins)]
    for value, solved in values:
        counts[min(bins - 1, int((value - low) / width))][not solved] += 1
    scale = 84 / max(sum(count) for count in counts)
    return {
        "title": title,
        "median": _number(statistics.median(numbers)),
        "first": _number(low),
        "last": _number(low + width * bins if width % 1 else max(high, low + width * bins - 1)),
        "bars": [
            {
                "label": f"from {_number(low + i * width)}",
                "solved": solved,
                "other": other,
                "solved_height": round(solved * scale, 2),
                "other_height": round(other * scale, 2),
            }
            for i, (solved, other) in enumerate(counts)
        ],
    }


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.2f}"


def _trial_view(run: RunDirectory, trial: TrialRecord, task: Task, fed: FedIds, *, with_tokens: bool) -> dict[str, Any]:
    notes: list[str] = []
    turns: list[dict[str, Any]] | None = None
    try:
        trajectory = run.trajectory(trial)
        if trajectory is not None:
            turns, notes = _turns(trajectory, with_tokens=with_tokens)
            fed.add(trajectory.token_ids, trajectory.loss_mask)
    except TrajectoryError as exc:
        notes.append(str(exc))
    return {
        "id": trial.trial,
        "kind": _kind(trial),
        "held_out": trial.held_out_phrasing,
        "instruction": task.instruction,
        "system": task.system,
        "files": task.environment.files,
        "verifier": task.verifier.command if isinstance(task.verifier, VerifierConfig) else "",
        "expected": expected_of(task),
        "turns": turns,
        "notes": notes,
        **trial.model_dump(
            include={"task", "family", "phrasing", "epoch", "status", "reward", "answer", "error", "verifier_output"}
            | {"backend", "setup_s", "agent_s", "verify_s"}
        ),
        "usage": asdict(trial.usage),
        "cost": _cost(trial.usage),
    }


def _turns(trajectory: Trajectory, *, with_tokens: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the turns of a trajectory as the viewer draws them, and notes on other events."""
    turns: list[dict[str, Any]] = []
    notes: list[str] = (
        [] if with_tokens else [f"A report shows at most {MAX_TOKENS:,} ids; the ids of this trial are not shown."]
    )
    calls: dict[str, dict[str, Any]] = {}
    spent = 0.0
    for time_s, record in zip(trajectory.times_s, trajectory.records, strict=True):
        if isinstance(record, TurnStarted):
            turn = _new_turn(record, time_s)
            turns.append(turn)
        if not turns:
            continue
        turn = turns[-1]
        turn["end"] = max(turn["end"], time_s)
        match record:
            case TokenSegment():
                turn["tokens"][record.kind] += len(record.ids)
                if with_tokens:
                    turn["segments"].append([record.kind, record.ids, _rounded(record.logprobs) or None])
            case MessageAdded(AssistantMessage() as message):
                turn["generated"] = time_s
                turn["reasoning"], turn["text"] = message.reasoning, message.content
                for call in message.calls:
                    _call(turn, calls, call.id, call.name, call.arguments)
            case CallMalformed():
                turn["notes"].append(f"Malformed call{f' of {record.name}' if record.name else ''}: {record.error}")
            case CallDecided(decision="refused" | "modified"):
                what = f"{record.name} was {record.decision} by {record.policy}"
                turn["notes"].append(f"{what}: {record.reason or record.modified}")
            case CallStarted():
                view = _call(turn, calls, record.call.id, record.call.name, record.call.arguments)
                view["start"], view["early"] = time_s, record.early
            case CallFinished() if record.result.call_id in calls:
                result = record.result
                calls[result.call_id] |= {"end": time_s, "result": result.content, "failed": result.is_error}
                calls[result.call_id]["duration"] = result.duration_s
            case ThoughtCut():
                turn["notes"].append("The thinking budget ran out: a forced id closed the thought.")
            case Compacted():
                turn["notes"].append(
                    f"The conversation was compacted from {record.tokens_before:,} to {record.tokens_after:,} tokens: "
                    f"{len(record.cleared)} results cleared, {record.turns_left_out} turns left out."
                )
            case LimitReached():
                notes.append(f"Limit reached: {record.limit}.")
            case TurnFinished(usage=Usage(cost_usd=float() as cost)):
                turn["cost"], spent = dollars(cost - spent), cost
            case Outcome():
                spent = 0.0  # the next run of the session counts from 0
                if record.error is not None:
                    notes.append(record.error)
    return turns, notes


def _new_turn(record: TurnStarted, time_s: float) -> dict[str, Any]:
    return {
        "turn": record.turn,
        "think": record.think,
        "start": time_s,
        "generated": time_s,
        "end": time_s,
        "reasoning": None,
        "text": "",
        "calls": [],
        "notes": [],
        "cost": None,
        "tokens": {"prompt": 0, "sampled": 0, "forced": 0},
        "segments": [],
    }


def _call(
    turn: dict[str, Any], calls: dict[str, dict[str, Any]], call_id: str, name: str, arguments: str
) -> dict[str, Any]:
    """Return the view of a call, adding it if needed. An early call starts before its message is complete."""
    if call_id not in calls:
        calls[call_id] = {"name": name, "arguments": arguments, "start": None, "end": None, "early": False}
        calls[call_id] |= {"result": None, "failed": False, "duration": None}
        turn["calls"].append(calls[call_id])
    return calls[call_id]


def _rounded(logprobs: Sequence[float | None]) -> list[float | None]:
    return [None if value is None or not math.isfinite(value) else round(value, 4) for value in logprobs]
