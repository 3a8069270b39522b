"""Go back to a turn and take the best of three branches. Run it with `python examples/fork_and_best_of_n.py`."""

from collections.abc import Sequence

from agentkit import Agent, AssistantTurn, Message, RunResult, ScriptedModel
from agentkit_environments import Environment

commands = iter(["sort -n", "sort", "sort -r", "sort -rn"])


def plan(messages: Sequence[Message], think: bool) -> AssistantTurn:
    """Stand in for a large model, which would sample another command in each branch."""
    turn = sum(message.role == "assistant" for message in messages)
    if turn == 0:
        return AssistantTurn(calls=[("write_file", {"path": "numbers", "content": "9\n100\n10\n"})])
    if turn == 1:
        return AssistantTurn(calls=[("bash", {"command": f"{next(commands)} numbers | tee sorted"})])
    return AssistantTurn(content="Sorted.")


async def judge(result: RunResult, environment: Environment) -> float:
    """Score the files that a branch has left in its own sandbox."""
    return await environment.read_file("sorted") == b"100\n10\n9\n"


result = Agent(ScriptedModel(plan)).run_sync("Sort the numbers, largest first.", snapshots=True)
choice = result.best_of_sync(3, judge, at_turn=1)  # the file is written already
print(f"{sum(choice.scores):g} of {len(choice.scores)} is right:", *choice.best.trajectory.results[-1].content.split())
