"""`SamplingParams`: sampling and stopping parameters. This module does not import torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, ConfigDict, PlainSerializer

from agentkit_engine.errors import SamplingParamsError

GrammarMode = Literal["auto"] | bool


def _spell_infinity(bias: Mapping[int, float]) -> dict[int, float | str]:
    """Replace infinities by text: JSON has no infinity, and pydantic would write null."""
    return {token_id: value if math.isfinite(value) else "-Infinity" for token_id, value in bias.items()}


def _read_infinity(bias: object) -> object:
    """Undo `_spell_infinity`, and convert keys, which JSON makes text, to int."""
    if not isinstance(bias, Mapping):
        return bias
    return {
        int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 20 else key: (
            -math.inf if value == "-Infinity" else value
        )
        for key, value in bias.items()
    }


LogitBias = Annotated[
    Mapping[int, float], BeforeValidator(_read_infinity), PlainSerializer(_spell_infinity, when_used="json")
]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters for sampling and stopping. The defaults are those of the V4 model card.

    As in vLLM, penalties and biases change the logits first, then the temperature divides them, then `top_k`, `top_p`
    and `min_p` filter ids, in this order.

    A field that is not given has the default below, not the value of the checkpoint's folder. To change some fields of
    a model's own sampling parameters, use `model.sampling.override(temperature=0, top_k=20)`.

    Attributes:
        temperature: divides the logits; 0 is greedy (the lowest id among ties) and ignores the filters.
        top_p: sample among the fewest most likely ids whose probability reaches this mass.
        top_k: sample among this many most likely ids; `None` for all.
        min_p: sample among ids that are at least this fraction as likely as the most likely one.
        repetition_penalty: above 1, makes prompt and sampled ids less likely: a positive logit is divided by it, a
            negative one multiplied (Keskar et al. 2019, arXiv:1909.05858).
        presence_penalty: subtracted from the logit of each id that was sampled.
        frequency_penalty: subtracted from the logit of each id once for each time it was sampled.
        logit_bias: added to the logits of these ids; `-inf` forbids an id.
        seed: the same seed on the same ids gives the same tokens; `None` draws a new seed for each generation.
        max_tokens: maximum number of sampled ids; `None` continues until a stop id or the end of the context. For an
            agent it limits one turn, like `Limits.max_tokens_per_turn`.
        stop_token_ids: sampling one of these ends the generation; the id itself is yielded and kept in the session. An
            agent adds the end-of-sentence id.
        stop: stop texts. The token that completes one in the sampled text ends the generation and is kept in the
            session. `SampledToken.text` omits the stop text and anything after it; an agent's message includes it,
            because the message is built from the session's ids.
        top_logprobs: number of most likely ids to report with each token.
        grammar: whether to constrain an agent's calls to the schemas of its tools. "auto" does so if there are tools
            and a grammar can be built for them, and otherwise records the reason; True raises if it cannot be built.
        output_schema: a JSON schema; each turn of an agent is then either calls or a JSON value that matches it.

    `grammar` and `output_schema` need the tools and the chat format, so they apply to a `Model`. For a session of the
    engine, pass a grammar from `Engine.grammars` to `generate`.

    Raises:
        SamplingParamsError: a value has the wrong type (a bool is not a number) or is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: LogitBias = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    grammar: GrammarMode = "auto"
    output_schema: Mapping[str, Any] | None = None
    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        for name, (kind, expected, fits) in _CHECKS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                self._set(name, kind(_checked(name, value, Real if kind is float else Integral, expected, fits)))
        bias = _checked("logit_bias", self.logit_bias, Mapping, "a mapping")
        self._set("logit_bias", {_id("logit_bias", key): _bias(value) for key, value in bias.items()})
        stop_ids = _items("stop_token_ids", self.stop_token_ids)
        self._set("stop_token_ids", frozenset(_id("stop_token_ids", token_id) for token_id in stop_ids))
        texts = _items("stop", self.stop)
        self._set("stop", tuple(_checked("stop", text, str, "a tuple of non-empty texts", bool) for text in texts))
        if not isinstance(self.grammar, bool) and self.grammar != "auto":
            raise SamplingParamsError(f'grammar must be "auto", True or False, got {self.grammar!r}')
        if self.output_schema is not None:
            _checked("output_schema", self.output_schema, Mapping, "a mapping")

    def override(self, **changes: Any) -> Self:
        """Return a copy with these fields changed; None leaves a field unchanged.

        Raises:
            SamplingParamsError: see `SamplingParams`.
            TypeError: there is no field of that name.
        """
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    @property
    def needs_past(self) -> bool:
        """True if the logits depend on earlier ids."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def filters(self) -> bool:
        """True if some ids may be dropped before sampling."""
        return (self.top_k, self.top_p, self.min_p) != (None, 1, 0)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # normalise the frozen instance: 0 becomes 0.0, a list becomes a tuple


_CHECKS: Final[dict[str, tuple[type[float], str, Callable[[Any], bool]]]] = {
    "temperature": (float, "a finite number >= 0", lambda x: 0 <= x < math.inf),
    "top_p": (float, "a number in (0, 1]", lambda x: 0 < x <= 1),
    "min_p": (float, "a number in [0, 1]", lambda x: 0 <= x <= 1),
    "repetition_penalty": (float, "a finite number > 0", lambda x: 0 < x < math.inf),
    "presence_penalty": (float, "a finite number", math.isfinite),
    "frequency_penalty": (float, "a finite number", math.isfinite),
    "top_k": (int, "an integer >= 1", lambda x: x >= 1),
    "seed": (int, "an integer", lambda x: True),
    "max_tokens": (int, "an integer >= 1", lambda x: x >= 1),
    "top_logprobs": (int, "an integer >= 0", lambda x: x >= 0),
}
_OPTIONAL: Final = {"top_k", "seed", "max_tokens"}


def _checked(
    name: str, value: Any, kind: type[Any], expected: str, fits: Callable[[Any], bool] = lambda x: True
) -> Any:
    """Return the value, checked to be of this kind, which never includes a bool, and to fit."""
    if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
        raise SamplingParamsError(f"{name} must be {expected}, got {value!r}")
    return value


def _id(name: str, value: object) -> int:
    return int(_checked(f"an id in {name}", value, Integral, "an integer >= 0", lambda x: x >= 0))


def _bias(value: object) -> float:
    return float(_checked("a bias in logit_bias", value, Real, "a number below infinity", lambda x: x < math.inf))


def _items(name: str, value: object) -> Iterable[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise SamplingParamsError(f"{name} must be a collection, such as a tuple; got {value!r}")
    return value
