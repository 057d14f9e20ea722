"""Files of predicted rows: what stands beside an unfinished one, names of shards, and csv: a column a field, lists as JSON in one cell."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from labeltune.errors import ConfigError

_LABEL = ("id", "label", "confidence", "ranking", "answer", "parsed")
_ENTITIES = ("id", "entities", "answer", "parsed", "truncated")
#: What people call tables that are not written.
_OTHERS = (".tsv", ".xlsx", ".xls", ".parquet", ".arrow")


def unfinished_names(name: str) -> tuple[str, str]:
    """Files beside an output of this name, until it is whole: its rows, and the note of what they belong to."""
    return f".{name}.part", f".{name}.part.json"


def parse_shard(text: str) -> tuple[int, int]:
    """`3/16` -> (3, 16).

    Raises:
        ConfigError: it is not of this form, or there is no such shard.
    """
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--shard={text} must be NUMBER/COUNT, from 1/COUNT to COUNT/COUNT, as in 3/16")
    return int(found[1]), int(found[2])


def shard_output(output: Path, number: int, count: int) -> Path:
    """Where a shard of a file goes: `out.jsonl` -> `out-00003-of-00016.jsonl`; names sort in the order of the rows."""
    return output.with_name(f"{output.stem}-{number:05d}-of-{count:05d}{output.suffix}")


def is_csv(output: Path) -> bool:
    """Whether predictions go there as csv.

    Raises:
        ConfigError: the name promises another kind of table.
    """
    suffix = output.suffix.lower()
    if suffix in _OTHERS:
        raise ConfigError(f"predictions are written as jsonl or csv, not {suffix}; name the output so")
    return suffix == ".csv"


def csv_of(lines: Iterable[str]) -> Iterator[str]:
    """Lines of predicted rows (JSON) as lines of csv, with a header and the byte order mark that spreadsheets look for.

    The columns are those of `Prediction.to_dict`, then `error` and `source` of rows that could not be predicted, then `text`
    where the first row that was predicted has it. `ranking` and `entities` are JSON, true and false are written so.
    """
    source = iter(lines)
    first: list[str] = []
    rows_are_entities = with_text = False
    for line in source:
        first.append(line)
        row = json.loads(line)
        if "error" not in row:
            rows_are_entities, with_text = "entities" in row, "text" in row
            break
    columns = [*(_ENTITIES if rows_are_entities else _LABEL), "error", "source"]
    columns += ["text"] if with_text else []
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    yield "\ufeff"
    writer.writerow(columns)
    for line in chain(first, source):
        row = json.loads(line)
        writer.writerow([_cell(row.get(column)) for column in columns])
        yield held.getvalue()
        held.seek(0)
        held.truncate()
    yield held.getvalue()


def _cell(value: object) -> object:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | bool) else value
