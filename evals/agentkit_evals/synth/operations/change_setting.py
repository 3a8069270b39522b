"""Change one setting of a settings file, and nothing else."""

from __future__ import annotations

from agentkit_evals.synth.artifacts.settings import Settings, new_value
from agentkit_evals.synth.checks import same_files
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention, mention_value
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.shell import replace_in_file
from agentkit_evals.synth.task import Draft, Operation
from agentkit_evals.synth.world import World


class ChangeSetting(Operation):
    name = "change_setting"
    phrasings = phrasings(
        train=(
            "Set {key} to {new} in {path}.",
            "In {path}, [set|change] {key} to {new}.",
            "[Change|Update] {key} in {path} to {new}.",
            "[Please change|Change] the value of {key} to {new} in {path}.",
            "{key} in {path} [should|must] be {new}. [Change|Fix] it.",
            "{path} has [a wrong|the wrong] value for {key}. [Set it to|It should be] {new}.",
            "Edit {path} so that {key} is {new}.",
            "I need {key} to be {new} in {path}.",
            "[Open|Edit] {path} and [set|change] {key} to {new}.",
            "Give {key} the value {new} in {path}.",
            "[Switch|Turn] {key} [from {old} |]to {new} in {path}.",
        ),
        held_out=(
            "In the file {path} the value of {key} must be {new}.",
            "Make {new} the value of {key} in {path}.",
            "We want {key} = {new} in {path}; please edit it.",
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        choices = [
            (file, one) for file in world.all(Settings) for one in file.settings if file.text.count(one.line) == 1
        ]
        if not choices:
            return None
        file, setting = draw.choice(choices)
        new = new_value(draw, setting)
        changed = file.changed(setting, new)

        def edit(results: list[str]) -> Act:
            arguments = {"path": file.path, "old": setting.line, "new": changed}
            return Act(f"I change `{setting.line}` to `{changed}`.", [("edit_file", arguments)])

        return Draft(
            instruction=draw.phrase(
                phrasing.text,
                key=mention_value(draw, setting.key),
                old=mention_value(draw, setting.value),
                new=mention_value(draw, new),
                path=mention(draw, file.path),
            ),
            steps=[
                lambda results: Act(f"I read `{file.path}`.", [("read_file", {"path": file.path})]),
                edit,
                lambda results: submit("The file is changed."),
            ],
            about=[file.text],
            **same_files({file.path: file.text.replace(setting.line, changed)}),
            solution=replace_in_file(file.path, setting.line, changed),
            difficulty=2,
        )
