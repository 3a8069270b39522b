"""Read one setting of a settings file."""

from __future__ import annotations

from agentkit_evals.synth.artifacts.settings import Settings
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention, mention_value
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.task import Draft, Operation
from agentkit_evals.synth.world import World


class ReadSetting(Operation):
    name = "read_setting"
    phrasings = phrasings(
        train=(
            "What is {key} in {path}?",
            "[What|Which] value does {key} have in {path}?",
            "Tell me the value of {key} in {path}.",
            "[Read|Open|Look at] {path} and [tell me|give me|report] {key}.",
            "[Find|Look up|Get] {key} in {path}.",
            "{path} has a setting called {key}. What is it [set to|]?",
            "I need [to know |]the value of {key} from {path}.",
            "[Check|Look in] {path}: what is {key} [set to|]?",
            "How is {key} [set|configured] in {path}?",
            "[Please submit|Submit] the value of {key} from {path}.",
        ),
        held_out=(
            "Which value is stored under {key} in {path}?",
            "Can you see what {key} is set to in {path}?",
            "What does {path} say about {key}?",
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        files = world.all(Settings)
        if not files:
            return None
        file = draw.choice(files)
        setting = draw.choice(file.settings)
        key = setting.key if not setting.section or draw.chance(0.7) else f"{setting.section}.{setting.key}"

        def answer(results: list[str]) -> Act:
            return submit(f"`{setting.key}` is {setting.value}.", setting.value)

        return Draft(
            instruction=draw.phrase(phrasing.text, key=mention_value(draw, key), path=mention(draw, file.path)),
            steps=[lambda results: Act(f"I read `{file.path}`.", [("read_file", {"path": file.path})]), answer],
            answer=setting.value,
            about=[file.text],
        )
