"""The grammar of an agent's turns, which constrains calls to the schemas of their tools where possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from agentkit_engine.sampling_params import SamplingParams
from agentkit_tools import Tool

if TYPE_CHECKING:
    from agentkit_engine import Engine
    from agentkit_engine.grammar import Grammar


async def grammar_for(
    engine: Engine, tools: Sequence[Tool], sampling: SamplingParams
) -> tuple[Grammar | None, str | None]:
    """Build the grammar of a session's turns, in a thread so that other sessions are not blocked.

    Returns:
        The grammar, if any, and a description of what is not constrained, for the record.

    Raises:
        GrammarMissingError: `sampling` requires a grammar or has an output schema, and llguidance cannot be
            imported.
        GrammarError: no value fits the output schema.
    """
    specs = [tool.spec for tool in tools]
    make: Callable[[], Grammar]
    if sampling.output_schema is not None:
        make = partial(_answer, engine, sampling.output_schema, specs)
    elif sampling.grammar is False:
        return None, "it is switched off"
    elif not specs:
        return None, "there are no tools"
    else:
        make = partial(_calls, engine, specs, tell_keywords=sampling.grammar is True)
    try:
        grammar = await anyio.to_thread.run_sync(make, limiter=anyio.CapacityLimiter(1))
    except Warning:  # raised where warnings are errors
        raise
    except Exception as error:
        if sampling.output_schema is not None or sampling.grammar is True:
            raise
        return None, f"{type(error).__name__}: {error}"
    return grammar, "; ".join(grammar.unenforced_tools) or None


def _calls(engine: Engine, specs: list[dict[str, object]], *, tell_keywords: bool) -> Grammar:
    return engine.grammars.calls(specs, tell_keywords=tell_keywords)


def _answer(engine: Engine, schema: object, specs: list[dict[str, object]]) -> Grammar:
    return engine.grammars.answer(schema, tools=specs)
