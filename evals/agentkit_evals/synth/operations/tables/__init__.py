"""Operations over tables: questions, changes and conversions."""

from __future__ import annotations

from agentkit_evals.synth.operations.tables.aggregate_column import AggregateColumn
from agentkit_evals.synth.operations.tables.change_table import AddRow, ChangeCell, RemoveRow
from agentkit_evals.synth.operations.tables.count_rows import CountRows
from agentkit_evals.synth.operations.tables.distinct_values import DistinctValues
from agentkit_evals.synth.operations.tables.end_row import EndRow
from agentkit_evals.synth.operations.tables.filter_rows import FilterRows
from agentkit_evals.synth.operations.tables.join_tables import JoinTables
from agentkit_evals.synth.operations.tables.look_up_row import LookUpRow
from agentkit_evals.synth.operations.tables.top_group import TopGroup
from agentkit_evals.synth.operations.tables.top_rows import TopRows
from agentkit_evals.synth.operations.tables.write_table import ConvertTable, ExtractRows, SortTable
from agentkit_evals.synth.task import Operation

TABLES: tuple[Operation, ...] = (
    *(CountRows(), FilterRows(), AggregateColumn(), TopRows(), TopGroup(), DistinctValues(), LookUpRow()),
    *(EndRow(), JoinTables(), AddRow(), RemoveRow(), ChangeCell(), ConvertTable(), SortTable(), ExtractRows()),
)
