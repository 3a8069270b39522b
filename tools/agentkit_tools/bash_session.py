"""`bash_session`: shell commands that share a directory, variables, functions and options, as in one terminal.

No process lives between calls. Each call starts bash, loads what the call before it saved to a file, and saves it again
when the command ends, by `exit` too. The state is part of the sandbox's files, so forks and resumed runs have it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from agentkit_tools.function import tool
from agentkit_tools.shell import check_command, run_command
from agentkit_tools.tool import ToolContext, ToolOutput

STATE = "/tmp/.agentkit-bash-session"
START = f"""\
if ! command -v bash >/dev/null; then
    echo 'this sandbox has no bash; the tool bash runs sh instead' >&2
    exit 127
fi
if test "$3"; then rm -f {STATE}; fi
exec bash -c "$1" bash "$2"
"""
# Names begin with __agentkit, so that none of them is saved or hides one of the command's. A variable that each call is
# given, such as a secret of the task, is saved only if the command has changed it.
SESSION = f"""\
__agentkit_save() {{
    if [[ -v __agentkit_saved ]]; then return; fi
    __agentkit_saved=yes
    local __agentkit_options __agentkit_readonly __agentkit_name __agentkit_place=$PWD
    case $PWD/ in "$__agentkit_workdir"/*) __agentkit_place=.${{PWD#"$__agentkit_workdir"}}; esac
    __agentkit_options=$(set +o; shopt -p; alias -p)
    set +eux
    __agentkit_readonly=" $(readonly -p | while IFS=" " read -r _ _ name; do printf %s "${{name%%=*}} "; done)"
    {{
        printf 'cd -- %q 2>/dev/null || echo %q >&2\\n' "$__agentkit_place" "the directory $PWD is gone"
        while IFS= read -r __agentkit_name; do
            [[ $__agentkit_name == __agentkit* ]] || declare -f -- "$__agentkit_name"
        done <<<"$(compgen -A function)"
        while IFS= read -r __agentkit_name; do
            case $__agentkit_name in
                __agentkit*|BASH*|COMP_*|DIRSTACK|EPOCH*|FUNCNAME|GROUPS|HISTCMD|LINENO) ;;
                PIPESTATUS|PWD|RANDOM|SECONDS|SHLVL|SRANDOM|_) ;;
                *)
                    [[ $__agentkit_readonly == *" $__agentkit_name "* ]] ||
                        [[ -v __agentkit_given[$__agentkit_name] &&
                            ${{__agentkit_given[$__agentkit_name]}} == "${{!__agentkit_name}}" ]] ||
                        declare -p -- "$__agentkit_name"
            esac
        done <<<"$(compgen -v)"
        echo "$__agentkit_options"
    }} >{STATE} 2>/dev/null
}}
__agentkit_workdir=$PWD
declare -A __agentkit_given
while IFS= read -r __agentkit_name; do
    __agentkit_given[$__agentkit_name]=${{!__agentkit_name}}
done <<<"$(compgen -e)"
if [[ -f {STATE} ]]; then . {STATE}; fi
trap __agentkit_save EXIT
eval "$1"
__agentkit_status=$?
__agentkit_save  # here, too, because the command may have set another trap
exit "$__agentkit_status"
"""


@tool(
    description="Run a bash command in a session. The directory, variables and functions stay for the next command.",
    barrier=True,
)
async def bash_session(
    command: str,
    context: ToolContext,
    restart: Annotated[bool, Field(description="Forget the session first.")] = False,
) -> ToolOutput:
    """Run `command` in the session of the sandbox; `restart` begins a new one.

    Raises:
        ToolError: the command is too long or timed out. After a timeout, the session is as it was before the command.
    """
    check_command(command)
    shell = ["/bin/sh", "-c", START, "sh", SESSION, command, "restart" if restart else ""]
    return await run_command(shell, context, name="bash_session")
