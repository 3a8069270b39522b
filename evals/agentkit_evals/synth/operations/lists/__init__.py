"""Operations over lists: questions, changes, sorting and comparison."""

from __future__ import annotations

from agentkit_evals.synth.operations.lists.ask_items import HasItem, ListItems, NthItem
from agentkit_evals.synth.operations.lists.change_list import AddItem, CheckItem, RemoveItem
from agentkit_evals.synth.operations.lists.compare_lists import CompareLists
from agentkit_evals.synth.operations.lists.count_items import CountItems
from agentkit_evals.synth.operations.lists.sort_lines import SortLines
from agentkit_evals.synth.task import Operation

LISTS: tuple[Operation, ...] = (
    *(CountItems(), ListItems(), NthItem(), HasItem(), AddItem(), RemoveItem(), CheckItem(), SortLines()),
    CompareLists(),
)
