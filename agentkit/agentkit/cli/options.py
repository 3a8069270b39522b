"""Options shared by several commands, and the location of run directories."""

from __future__ import annotations

import math
import os
import re
import secrets
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from agentkit.task import Task


class Env(StrEnum):
    """Sandbox backends, named as in `agentkit_environments.open_environment`."""

    AUTO = "auto"
    DOCKER = "docker"
    PROCESS = "process"
    UNSAFE_LOCAL = "unsafe-local"


class EffortChoice(StrEnum):
    """Reasoning efforts, named as in `agentkit.Agent`."""

    NONE = "none"
    LOW = "low"
    HIGH = "high"
    MAX = "max"


class GrammarChoice(StrEnum):
    """When a grammar constrains calls to the schemas of their tools."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


API_NAMES = re.compile(
    r"(gpt|chatgpt|o\d|claude|gemini|mistral|grok|command|deepseek-(chat|reasoner|coder|v\d))\b.*", re.I
)
"""Model names that suggest an API."""
API_OWNERS = {"claude": "anthropic", "deepseek": "deepseek"}
GIVEN = ("COMMANDLINE", "ENVIRONMENT")
"""Sources of parameters that a user sets, as typer names them."""
API_PROVIDERS = ("openai", "anthropic", "deepseek")
"""The providers in `agentkit.models.remote.resolve.PROVIDERS`, repeated to avoid the import."""


def _model(name: str) -> str:
    """Check a model's name before any heavy import. Raises BadParameter with the available models."""
    packaged = packaged_models()
    provider, colon, model = name.partition(":")
    if name in packaged or Path(name).is_dir() or (provider in API_PROVIDERS and model.strip()):
        return name
    if Path(name).exists():
        why = f"{name} is a file; give the folder with config.json and the safetensors files"
    elif provider in API_PROVIDERS and colon:
        why = f"give the model's name after {provider}:"
    elif colon:
        why = (
            f"there is no provider {provider!r}, only {', '.join(API_PROVIDERS)}; any server that speaks OpenAI's "
            "protocol is `openai:MODEL` with --base-url"
        )
    elif API_NAMES.fullmatch(name):
        owner = next((each for start, each in API_OWNERS.items() if name.lower().startswith(start)), "openai")
        why = f"a model behind an API is named with its provider: `{owner}:{name}`"
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        why = (
            "there is no such folder, and agentkit does not download models: download the checkpoint (config.json, "
            "tokenizer.json, *.safetensors in the official DeepSeek-V4 layout) and give its folder"
        )
    else:
        why = "it is neither a packaged model nor an existing folder"
    raise typer.BadParameter(
        f'no model "{name}": {why}. Available: {", ".join(packaged)}, the path of a folder with config.json and '
        "safetensors files, or a model behind an API as "
        f"{', '.join(f'{each}:MODEL' for each in API_PROVIDERS)}"
    )


def packaged_models() -> list[str]:
    """Return the names of the packaged models without importing the engine (and torch with it)."""
    engine = find_spec("agentkit_engine")
    places = engine.submodule_search_locations if engine else None
    return sorted(config.parent.name for place in places or () for config in Path(place).glob("*/config.json"))


def given_parameters(ctx: typer.Context) -> set[str]:
    """Return the names of the parameters that the user gave, on the command line or in the environment."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name for name, source in sources.items() if source is not None and source.name in GIVEN}


def no_such_option(*names: str, instead: str) -> Any:
    """Return a hidden option that fails with a hint. For options that people expect but that do not exist."""

    def refuse(value: str | None) -> None:
        if value is not None:
            raise typer.BadParameter(f"there is no such option: {instead}")

    return Annotated[str | None, typer.Option(*names, hidden=True, callback=refuse)]


NoKeyFlag = no_such_option(
    "--api-key",
    instead="keys come from the environment: set OPENAI_API_KEY, ANTHROPIC_API_KEY or DEEPSEEK_API_KEY",
)
NoProviderFlag = no_such_option(
    *("--provider", "--endpoint"), instead="give the provider with the model, as in `-m openai:MODEL --base-url URL`"
)
BaseUrlFlag = Annotated[
    str | None,
    typer.Option(
        "--base-url",
        "--api-base",
        help="URL of the API, for example of a vLLM server: `http://localhost:8000/v1`. Default: the provider's own.",
    ),
]
ModelFlag = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        callback=_model,
        help="`tiny`, a checkpoint in the official DeepSeek layout, or a model behind an API: `openai:MODEL`, "
        "`anthropic:MODEL`, `deepseek:MODEL`.",
    ),
]


def _embedded(name: str | None) -> str | None:
    """Check the name of a model in this process. Raises BadParameter."""
    if name is not None and _model(name).partition(":")[0] in API_PROVIDERS and not Path(name).is_dir():
        raise typer.BadParameter(f"{name} is behind an API; give a packaged model or a folder")
    return name


OtherModelFlag = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        callback=_embedded,
        help="`tiny`, or a checkpoint in the official DeepSeek layout. Default: the model of the record.",
    ),
]


def _models(names: list[str]) -> list[str]:
    """Check each model's name. Raises BadParameter for an unknown model, or one that is given twice."""
    checked = [_model(name) for name in names]
    if twice := [name for name in checked if checked.count(name) > 1]:
        raise typer.BadParameter(f'model "{twice[0]}" is given twice; give each model once (`-k` repeats each task)')
    return checked


ModelsFlag = Annotated[
    list[str],
    typer.Option(
        "--model",
        "-m",
        callback=_models,
        default_factory=lambda: ["tiny"],
        show_default="tiny",
        help="`tiny`, a checkpoint in the official DeepSeek layout, or a model behind an API: `openai:MODEL`, "
        "`anthropic:MODEL`, `deepseek:MODEL`. Repeat it to compare models.",
    ),
]
WorkdirFlag = Annotated[
    Path | None,
    typer.Option(
        "--workdir",
        exists=True,
        file_okay=False,
        help="A folder to work on. The agent cannot change it: you get a diff.",
    ),
]
IncludeIgnoredFlag = Annotated[
    bool, typer.Option("--include-ignored", help="Also show the agent the files of --workdir that git ignores.")
]
CopyFlag = Annotated[
    bool, typer.Option("--copy", help="Copy --workdir, so that the agent does not see what you change meanwhile.")
]
ApplyFlag = Annotated[bool, typer.Option("--apply", help="Apply the changes to --workdir without asking.")]
PatchFlag = Annotated[
    Path | None, typer.Option("--patch", metavar="FILE", help="Write the changes to this new file, for `git apply`.")
]
BranchFlag = Annotated[
    str | None,
    typer.Option("--branch", metavar="NAME", help="Commit the changes to this new branch, which starts from HEAD."),
]
DeviceFlag = Annotated[
    str | None,
    typer.Option("--device", help="The model's device: `cpu`, `cuda`, `cuda:1`. Default: `cpu`."),
]
DevicesFlag = Annotated[
    int | None,
    typer.Option(
        "--devices", min=1, help="The number of devices to compute on: GPUs from `--device` on, or processes on a CPU."
    ),
]
ThreadsFlag = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="Threads that compute on a CPU, in each process with --devices. Default: as many as there are cores.",
    ),
]


class KVCacheDtype(StrEnum):
    """The formats of what a model keeps of earlier tokens."""

    AUTO = "auto"
    FP8 = "fp8"


KVCacheDtypeFlag = Annotated[
    KVCacheDtype | None,
    typer.Option(
        "--kv-cache-dtype",
        help="Format of what the model keeps of earlier tokens: `fp8` takes about a quarter of the memory.",
    ),
]


def parse_bytes(text: str) -> int:
    """Return a number of bytes, given as `1073741824`, `1GiB` or `1.5 GB`. Raises BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]i?B|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f'"{text}" is not a size; give bytes, or a number with a unit such as 4GiB')
    unit = (match[2] or "B").upper()
    size = float(match[1]) * (1024 if "I" in unit else 1000) ** "BKMGT".index(unit[0])
    if not (size >= 1 and size.is_integer()):
        raise typer.BadParameter(f'"{text}" is not a whole number of bytes of at least 1')
    return int(size)


ExpertCacheFlag = Annotated[
    int | None,
    typer.Option(
        "--expert-cache-bytes",
        metavar="SIZE",
        parser=parse_bytes,
        help="Leave packed experts in the checkpoint's files, and keep this much of them in memory, such as `4GiB`.",
    ),
]
EnvFlag = Annotated[
    Env | None, typer.Option("--env", help="The sandbox backend. Default: the task's setting, else `auto`.")
]
EffortFlag = Annotated[
    EffortChoice | None,
    typer.Option("--effort", help="Reasoning effort; `none` never thinks. Default: the task's setting, else `high`."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print only one JSON object on standard output.")]
SeedFlag = Annotated[
    int | None,
    typer.Option("--seed", min=0, max=2**31 - 1, help="Seed for repeatable runs. Default: random."),
]


def finite(value: float | None) -> float | None:
    """Return an option's number. Raises BadParameter for `nan` and `inf`, which bounds do not catch."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def _positive(value: float | None) -> float | None:
    if finite(value) is not None and (value or 0.0) <= 0:
        raise typer.BadParameter(f"{value} is not a positive number")
    return value


CompactAtFlag = Annotated[
    int | None,
    typer.Option("--compact-at", min=1, max=1 << 31, help="Compact the conversation once it has this many tokens."),
]
MaxCostFlag = Annotated[
    float | None,
    typer.Option(
        "--max-cost",
        metavar="USD",
        callback=_positive,
        help="Start no further turn once this many US dollars are spent. Needs a model whose price is known.",
    ),
]
TemperatureFlag = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0.0,
        callback=finite,
        help="Sampling temperature; 0 is greedy. Default: the model's own setting.",
    ),
]
TopPFlag = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        callback=finite,
        help="Sample from the likeliest tokens up to this probability.",
    ),
]
TopKFlag = Annotated[int | None, typer.Option("--top-k", min=1, help="Sample from this many of the likeliest tokens.")]
MinPFlag = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        min=0.0,
        max=1.0,
        callback=finite,
        help="Sample from tokens at least this fraction as likely as the likeliest one.",
    ),
]
PenaltyFlag = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", min=0.01, callback=finite, help="Above 1, repeated tokens become less likely."
    ),
]
GrammarFlag = Annotated[
    GrammarChoice | None,
    typer.Option(
        "--grammar",
        help="Constrain calls to the schemas of the tools: `on` fails if no grammar can be built, "
        "`auto` then goes without. Default: the model's own setting.",
    ),
]
NoGrammarFlag = Annotated[bool, typer.Option("--no-grammar", help="Same as `--grammar off`.")]
CacheFlag = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        envvar="AGENTKIT_CACHE_DIR",
        file_okay=False,
        help="A folder that keeps the prefix cache on disk for later commands.",
    ),
]
SUITE = typer.Argument(
    metavar="SUITE",
    help="A folder of tasks, a Harbor task directory, a suite or task file, rows of BFCL or SWE-bench (.jsonl), "
    "`synth`, `synth:FAMILY,FAMILY`, or a packaged suite (`everyday`, `impossible`, `readme`, `own-tools`).",
)
SuiteArgument = Annotated[str, SUITE]


def _new_folder(path: Path | None) -> Path | None:
    if path is not None and path.exists():
        raise typer.BadParameter(f"{path} already exists; a run is never overwritten. Give a new path")
    return path


def output_file(path: Path | None) -> Path | None:
    """Check that a file can be written at `path` before hours of work. Raises BadParameter."""
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; give the name of a file")
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist; make it, or give another path")
    return path


SnapshotsFlag = Annotated[
    bool,
    typer.Option(
        "--snapshots",
        help="Save the sandbox's files after each turn, so that --resume goes on after the last complete turn.",
    ),
]


def with_snapshots(task: Task) -> Task:
    """Return a task with `environment.snapshots`. Raises BadParameter if its sandbox cannot be captured."""
    from pydantic import ValidationError

    from agentkit.task import Task, explain

    fields = task.model_dump()
    fields["environment"]["snapshots"] = True
    try:
        return Task.model_validate(fields)
    except ValidationError as exc:
        raise typer.BadParameter(f"task {task.id}: {explain(exc.errors()[0], Task)}", param_hint="--snapshots") from exc


OutFlag = Annotated[
    Path | None,
    typer.Option("--out", callback=_new_folder, help="A new run directory. Default: one in `runs`."),
]


@dataclass(frozen=True, slots=True)
class SamplingFlags:
    """The sampling options of a command; None keeps the model's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    grammar: bool | str | None = None

    @classmethod
    def of(cls, grammar: GrammarChoice | None, no_grammar: bool, **given: Any) -> SamplingFlags:
        """Collect the given options. Raises BadParameter if two contradict each other."""
        if no_grammar and grammar not in (None, GrammarChoice.OFF):
            raise typer.BadParameter("--no-grammar contradicts --grammar; give only one", param_hint="--grammar")
        if given.get("top_p") == 0:
            raise typer.BadParameter(
                "0 leaves no token; give more than 0, or use --temperature 0", param_hint="--top-p"
            )
        modes = {None: None, GrammarChoice.AUTO: "auto", GrammarChoice.ON: True, GrammarChoice.OFF: False}
        return cls(grammar=False if no_grammar else modes[grammar], **given)

    def changes(self) -> dict[str, Any]:
        """Return the given options as keyword arguments of `SamplingParams.override`."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def foreign_tasks(path: Path) -> str | None:
    """Return a hint if a path is not that of a task, but belongs to one, or holds tasks in another format."""
    if path.name == "task.toml":
        return f"give the folder of a Harbor task: {path.parent}"
    if path.suffix in (".parquet", ".csv", ".arrow"):
        return f"a data set must be JSON Lines, not {path.suffix}; export it as JSONL (with `datasets`: `to_json(...)`)"
    if path.suffix == ".jsonl":
        return "a data set has many tasks; `agentkit eval` runs them"
    return None


def refuse_foreign_suite(suite: str) -> None:
    """Raise BadParameter with a remedy if a file is not a suite, but belongs to a task, or is in another format."""
    path = Path(suite)
    if path.is_file() and path.suffix != ".jsonl" and (hint := foreign_tasks(path)):
        raise typer.BadParameter(f"{suite}: {hint}", param_hint="SUITE")


def is_solved(reward: float) -> bool:
    """Return whether a reward is the full reward."""
    from agentkit_evals.statistics import SOLVED

    return reward >= SOLVED


def seed_or_random(seed: int | None) -> int:
    """Return the given seed, or a random one that the run can record."""
    return secrets.randbelow(2**31) if seed is None else seed


def run_directory(out: Path | None, name: str) -> Path:
    """Return `out`, or a new path in `runs`, which is in AGENTKIT_HOME if set, otherwise in the current folder."""
    if out is not None:
        return out
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")[:100]  # a model may be a long path
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(os.environ.get("AGENTKIT_HOME", "."), "runs", f"{stamp}-{label}-{secrets.token_hex(2)}")
