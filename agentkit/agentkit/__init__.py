"""agentkit: tool-using agents on a model that runs in the same process, or behind an API.

    from agentkit import Agent, tool

    @tool
    def weather(city: str) -> str:
        "Tell the weather in a city."
        return f"It is sunny in {city}."

    print(Agent("tiny", tools=[weather]).run_sync("What is the weather in Paris?").answer)

Submodules are imported on first use of a name, so that the command line can install its signal handlers first.
Importing a name never imports torch; constructing an `EmbeddedModel` does.
"""

TYPE_CHECKING = False  # type checkers recognize the name, and importing `typing` would dominate the import time
if TYPE_CHECKING:
    from agentkit._public import *  # noqa: F403
    from agentkit._public import __all__ as __all__
else:

    def __getattr__(name: str) -> object:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        _public = import_module("agentkit._public")
        globals()["__all__"] = _public.__all__
        globals().update({each: getattr(_public, each) for each in _public.__all__})
        if name in globals():
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        from importlib import import_module

        _public = import_module("agentkit._public")
        return sorted({*globals(), *_public.__all__})
