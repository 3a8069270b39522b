"""The `agentkit` command. Each module holds one command that parses its arguments, builds objects and calls one
function.

Signal handlers are installed before any other import. Command modules import nothing heavy at module level, so
`agentkit --help` starts without torch.
"""

from __future__ import annotations

import sys

from agentkit.cli import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agentkit.cli.commands import app as app
else:

    def __getattr__(name: str) -> object:
        if name == "app":
            from agentkit.cli.commands import app

            return app
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Run the `agentkit` script. A defect exits with 3 after its traceback; 1 would mean "not solved"."""
    signals.install()
    from agentkit.cli.commands import app
    from agentkit.cli.ending import ExitCode, leave
    from agentkit.cli.terminal import prepare_streams, show_traceback

    sys.excepthook = show_traceback
    prepare_streams()
    try:
        app(prog_name="agentkit")
    except SystemExit as ending:
        leave(ending.code)
    except Exception as defect:
        sys.excepthook(type(defect), defect, defect.__traceback__)
        leave(ExitCode.INFRASTRUCTURE)
