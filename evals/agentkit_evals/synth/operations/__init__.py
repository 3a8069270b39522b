"""Kinds of tasks over worlds. To add one: a module with an `Operation`, and an entry here."""

from __future__ import annotations

from agentkit_evals.synth.operations.ask_text import AskAgenda, AskMail, AskNote, ReadSeveral
from agentkit_evals.synth.operations.call_function import (
    CallFunction,
    CallKnownFunction,
    CallKnownTwice,
    CallTwice,
    NoFunction,
    NoKnownFunction,
)
from agentkit_evals.synth.operations.change_setting import ChangeSetting
from agentkit_evals.synth.operations.code import FixBug, RenameIdentifier, RunScript
from agentkit_evals.synth.operations.far import FAR
from agentkit_evals.synth.operations.files import (
    AppendLine,
    CountFiles,
    CreateFile,
    CreateKnownFile,
    FindText,
    ListFiles,
    Missing,
    MoveFile,
    Recover,
)
from agentkit_evals.synth.operations.json_answers import JSON_ANSWERS
from agentkit_evals.synth.operations.known_command import RunKnownCommand
from agentkit_evals.synth.operations.ledgers import LEDGERS
from agentkit_evals.synth.operations.lists import LISTS
from agentkit_evals.synth.operations.lists.ask_items import HasItem, NthItem
from agentkit_evals.synth.operations.lists.change_list import AddItem, CheckItem
from agentkit_evals.synth.operations.lists.count_items import CountItems
from agentkit_evals.synth.operations.logs import LOGS, CountLines, FindLine
from agentkit_evals.synth.operations.read_setting import ReadSetting
from agentkit_evals.synth.operations.replace_word import ReplaceWord
from agentkit_evals.synth.operations.several import FollowFile, TwoRequests
from agentkit_evals.synth.operations.tables import TABLES
from agentkit_evals.synth.operations.tables.change_table import AddRow
from agentkit_evals.synth.operations.tables.count_rows import CountRows
from agentkit_evals.synth.operations.tables.look_up_row import LookUpRow
from agentkit_evals.synth.operations.tables.write_table import ConvertTable
from agentkit_evals.synth.operations.talk import Compute, ComputeKnown, Recall, Repeat, SmallTalk
from agentkit_evals.synth.task import Operation

SIMPLE: tuple[Operation, ...] = (
    *(ReadSetting(), ChangeSetting(), AskNote(), AskMail(), AskAgenda(), CountFiles(), FindText(), CreateFile()),
    *(MoveFile(), AppendLine(), Compute(), RunScript()),
    *(CountRows(), LookUpRow(), AddRow(), ConvertTable(), CountItems(), HasItem(), NthItem(), AddItem(), CheckItem()),
    *(CountLines(), FindLine(), ReplaceWord()),
)
"""Operations that two requests in one, or a file with a request, may contain."""
OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        *(*SIMPLE, ReadSeveral(), ListFiles(), Recover(), Missing(), FixBug(), RenameIdentifier()),
        *(TwoRequests(SIMPLE), FollowFile(SIMPLE)),
        *(CallFunction(), CallTwice(), NoFunction(), CallKnownFunction(), CallKnownTwice(), NoKnownFunction()),
        *(ComputeKnown(), CreateKnownFile(), RunKnownCommand(), Recall(), Repeat(), SmallTalk()),
        *(*TABLES, *LISTS, *LOGS, *LEDGERS, *FAR, *JSON_ANSWERS),
    )
}
