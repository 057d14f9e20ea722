"""The audit in several processes: blocks of a file are checked side by side and put together in their order.

The result is that of one process, to the last byte of the Arrow file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.config import DataConfig, TaskName
from labeltune.data.audit import Audit, add_records, finished
from labeltune.data.blocks import Block, cut_file, read_block
from labeltune.data.columns import FileColumns
from labeltune.data.formats import find_format
from labeltune.errors import printable
from labeltune.io.processes import mapped

if TYPE_CHECKING:
    import pyarrow

_ROWS = 8192
_BYTES = 4 << 20
#: Smaller files are checked before other processes would have started.
ENOUGH_BYTES = 8 << 20


@dataclass(frozen=True)
class _Check:
    """What a process does with a block: (what it found, usable rows as an Arrow stream)."""

    path: Path
    task: TaskName
    data: DataConfig
    columns: FileColumns
    token_counts: Callable[[list[str]], list[int]] | None
    schema: Any

    def __call__(self, block: Block) -> tuple[Audit, bytes]:
        import pyarrow as pa

        audit = Audit(self.path, self.task, length_unit="tokens" if self.token_counts else "characters")
        rows: list[dict[str, Any]] = []
        with self.path.open("rb") as file:
            records = islice(read_block(block, file), block.rows)
            add_records(
                audit,
                records,
                block.first,
                self.data,
                self.columns,
                token_counts=self.token_counts,
                write=lambda e: rows.append(e.to_row()),
            )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=self.schema))
        return audit, sink.getvalue().to_pybytes()


def can_be_cut(path: Path, encoding: str) -> bool:
    """Whether blocks of this file can be read by themselves; a csv field may hold line breaks, so those cannot."""
    with path.open("rb") as file:
        form = find_format(path.name, file, encoding)
    return form.plain or (form.kind == "parquet" and not form.problem)


def audit_blocks(
    path: Path,
    task: TaskName,
    data: DataConfig,
    columns: FileColumns,
    *,
    schema: pyarrow.Schema,
    write_table: Callable[[pyarrow.Table], None],
    workers: int,
    token_counts: Callable[[list[str]], list[int]] | None = None,
    max_rows: int | None = None,
) -> Audit:
    """`audit_file` by several processes.

    Args:
        schema: Arrow schema of the columns of `Example.to_row`.
        write_table: called with tables of the usable rows, in order.

    Raises:
        pyarrow.ArrowException: a parquet file is damaged; `audit_file` says where.
    """
    import pyarrow as pa

    audit = Audit(path, task, length_unit="tokens" if token_counts else "characters")
    check = _Check(path, task, data, columns, token_counts, schema)
    with closing(mapped(check, _blocks(path, max_rows), workers)) as found:
        for part, rows in found:
            audit.extend(part)
            write_table(pa.ipc.open_stream(rows).read_all())
    return finished(audit, data, columns)


def _blocks(path: Path, max_rows: int | None) -> Iterator[Block]:
    with path.open("rb") as file:
        for block in cut_file(printable(str(path)), file, _ROWS, most_bytes=_BYTES):
            if max_rows is not None and block.first + block.rows >= max_rows:
                if block.first < max_rows:
                    yield replace(block, rows=max_rows - block.first)
                return
            yield block
