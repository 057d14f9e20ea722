"""Checked rows -> token ids on disk, once for the same rows, prompt and tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import pyarrow as pa
from filelock import FileLock

from labeltune.errors import OutputError
from labeltune.io.outputs import writing
from labeltune.io.processes import mapped, worker_count
from labeltune.io.progress import row_progress
from labeltune.models.pocket import cache_folder
from labeltune.prompts.builder import PromptBuilder
from labeltune.types import Example

if TYPE_CHECKING:
    from datasets import Dataset


#: Part of the cache key; raised when the same rows are tokenized differently.
VERSION = 5
#: Rows of a token file. Each file is held open while it is mapped, and 1,024 open files are a usual limit.
SHARD_ROWS = 131_072
#: Rows that a process tokenizes at once.
_UNIT_ROWS = 2_048
#: Fewer rows are tokenized before other processes would have started.
ENOUGH_ROWS = 8_192
#: Token files that no run has used for this long are removed.
KEPT_SECONDS = 30 * 24 * 3600
#: Tokens that a tokenizer may add where an answer begins and ends.
_MARGIN = 16
_BATCH_ROWS = 1_000
#: Kinds of rows whose tokens are remembered.
_KEPT_KEYS = 10_000
_OTHER_CACHE = "set LABELTUNE_CACHE to a folder that can be written"


@dataclass(frozen=True)
class TokenAccount:
    """Where the tokens of a data set go.

    Attributes:
        rows: number of rows.
        tokens: all tokens.
        answer_tokens: tokens that are trained on.
        shortened: rows whose text was shortened to fit.
        cut_entities: NER entities that lie in the part that was cut away.
    """

    rows: int
    tokens: int
    answer_tokens: int
    shortened: int
    cut_entities: int


def tokenize_rows(
    dataset: Dataset, builder: PromptBuilder, workers: int | Literal["auto"] = "auto"
) -> tuple[Dataset, TokenAccount]:
    """What training reads of `token_columns`, and where the tokens go.

    Columns of the result: `input_ids`, `answer_start`, `answer_end`, `weight`, `others` and `length`, as there.

    Raises:
        PromptError: a row's instruction, candidates and answer do not fit the budget.
        OutputError: the cache folder cannot be written.
    """
    tokens = token_columns(dataset, builder, workers)
    spans = tokens.with_format("numpy")
    account = TokenAccount(
        rows=len(tokens),
        tokens=int(spans["length"][:].sum()) if len(tokens) else 0,
        answer_tokens=int(spans["answer_tokens"][:].sum()) if len(tokens) else 0,
        shortened=int(spans["shortened"][:].sum()) if len(tokens) else 0,
        cut_entities=int(spans["cut_entities"][:].sum()) if len(tokens) else 0,
    )
    return tokens.select_columns(
        ["input_ids", "answer_start", "answer_end", "weight", "others", "length"]
    ), account


def token_columns(
    dataset: Dataset, builder: PromptBuilder, workers: int | Literal["auto"] = "auto"
) -> Dataset:
    """Token ids of every row, and which part stands where, in Arrow files of the cache folder, one for `SHARD_ROWS` rows.

    A file is named by everything its tokens follow from: rows, task, prompt and tokenizer, but not the rows' places, so that a
    run on the same rows reads it, on any machine that shares the folder. Processes that want the same file wait for the first to
    write it.

    Columns of the result: of an example's first question `input_ids` list of int32, `answer_start`, `answer_end` (where the answer stands in
    them, end exclusive) and `weight` of its loss; `others`, for each further question {`begin`, `ids`, `start`, `weight`}: it reads the first
    `begin` of `input_ids` and then `ids`, of which those from `start` on are its answer; int32 each `text_start`, `text_end`
    (positions of tokens), `length` and `answer_tokens` (of all questions, the prompt once), `excess` (tokens that the whole document has beyond the budget) and
    `cut_entities`; `shortened` bool; `cut_characters` int32, characters of the document that were cut away.

    Args:
        workers: processes; never the result. `auto`: one a core where there are many rows.

    Raises:
        PromptError: a row's instruction, candidates and answer do not fit the budget.
        OutputError: the cache folder cannot be written.
    """
    folder = _token_folder()
    _remove_unused(folder)
    count = worker_count(workers, len(dataset) >= ENOUGH_ROWS)
    shards = range(0, max(len(dataset), 1), SHARD_ROWS)
    ends = [min(start + SHARD_ROWS, len(dataset)) for start in shards]
    parts = []
    with row_progress(len(dataset), "tokenize", len(dataset) >= ENOUGH_ROWS, last_line=False) as advance:
        for start, end, name in zip(shards, ends, _shard_keys(dataset, builder, count), strict=True):
            file = folder / f"{name}.arrow"
            with writing(folder, _OTHER_CACHE), FileLock(folder / f"{name}.lock"):
                if not file.exists():
                    _write_tokens(file, dataset, builder, range(start, end), count, advance)
                os.utime(file)
            parts.append(datasets.Dataset.from_file(str(file)))
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def rows_that_cannot_fit(dataset: Dataset, builder: PromptBuilder) -> dict[int, int]:
    """Rows whose instruction, candidates and answer alone are longer than `prompt.max_length`: number -> tokens they need."""
    limit = builder.task.prompt.max_length
    known: dict[Any, int] = {}
    found: dict[int, int] = {}
    without = 0  # tokens of a row of entities without its answer; 0 when that is not known yet
    first = 0
    columns = dataset.select_columns(["candidates", "label", "labels", "entities", "shares"]).with_format(
        "arrow"
    )
    for batch in columns.iter(batch_size=_BATCH_ROWS):
        rows = batch.to_pylist()
        for number, row in enumerate(rows, start=first):
            example = Example.from_row({**row, "id": "", "text": "", "source": ""})
            room = 0
            if row["entities"] is None:
                key: Any = example.candidates
                room = builder.room(example)
            else:
                key = builder.least_answer(example)
                without = without or builder.least(replace(example, entities=()))
                # A token stands for a byte at least, so most answers need not be tokenized.
                if without + len(key.encode()) + _MARGIN <= limit:
                    continue
            if key not in known:
                if len(known) >= _KEPT_KEYS:
                    known.clear()
                known[key] = builder.without_text(example) if room else builder.least(example)
            if known[key] + room > limit:
                found[number] = known[key] + room
        first += len(rows)
    return found


def _features() -> Any:
    integer = datasets.Value("int32")
    return datasets.Features(
        {
            "input_ids": datasets.List(integer),
            "text_start": integer,
            "text_end": integer,
            "answer_start": integer,
            "answer_end": integer,
            "weight": datasets.Value("float32"),
            "others": datasets.List(
                {
                    "begin": integer,
                    "ids": datasets.List(integer),
                    "start": integer,
                    "weight": datasets.Value("float32"),
                }
            ),
            "length": integer,
            "answer_tokens": integer,
            "shortened": datasets.Value("bool"),
            "excess": integer,
            "cut_characters": integer,
            "cut_entities": integer,
        }
    )


@dataclass(frozen=True)
class _Tokenize:
    """Numbers of rows -> their tokens, as an Arrow table's bytes."""

    dataset: Dataset
    builder: PromptBuilder
    schema: Any

    def __call__(self, rows: range) -> bytes:
        columns: dict[str, list[Any]] = {name: [] for name in self.schema.names}
        for row in self.dataset.select(rows):
            for name, value in self._encoded(row).items():
                columns[name].append(value)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.schema) as writer:
            writer.write_table(pa.Table.from_pydict(columns, schema=self.schema))
        return bytes(sink.getvalue().to_pybytes())

    def _encoded(self, row: dict[str, Any]) -> dict[str, Any]:
        example = Example.from_row(row)
        encoded = self.builder.training(example)
        begin, end = encoded.answer_span
        first, *others = self.builder.answers(example, encoded)
        return {
            "input_ids": [*encoded.ids[:begin], *first.ids],
            "text_start": encoded.text_span[0],
            "text_end": encoded.text_span[1],
            "answer_start": begin + first.start,
            "answer_end": begin + len(first.ids),
            "weight": first.weight,
            "others": [{"begin": begin, **asdict(other)} for other in others],
            "length": len(encoded.ids) - (end - begin) + sum(len(answer.ids) for answer in (first, *others)),
            "answer_tokens": sum(len(answer.ids) - answer.start for answer in (first, *others)),
            "shortened": encoded.text.strip() != example.text.strip(),
            "excess": encoded.excess,
            "cut_characters": max(0, len(example.text.strip()) - len(encoded.text.strip())),
            "cut_entities": self.builder.cut_entities(example, encoded),
        }


def _write_tokens(
    file: Path,
    dataset: Dataset,
    builder: PromptBuilder,
    rows: range,
    workers: int,
    advance: Callable[[int], None],
) -> None:
    """A file that is there is whole: it is written aside and renamed."""
    schema = _features().arrow_schema
    aside = file.with_name(f".{file.name}-{os.getpid()}")
    units = [range(at, min(at + _UNIT_ROWS, rows.stop)) for at in range(rows.start, rows.stop, _UNIT_ROWS)]
    try:
        with (
            pa.OSFile(str(aside), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as writer,
            closing(mapped(_Tokenize(dataset, builder, schema), units, workers)) as found,
        ):
            for unit, table in zip(units, found, strict=True):
                writer.write_table(pa.ipc.open_stream(table).read_all())
                advance(len(unit))
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def content_key(dataset: Dataset, builder: PromptBuilder) -> str:
    """A hash of everything that the tokens of a data set follow from; 40 hexadecimal digits."""
    return hashlib.sha256("".join(_shard_keys(dataset, builder, 1)).encode()).hexdigest()[:40]


def _shard_keys(dataset: Dataset, builder: PromptBuilder, workers: int) -> Iterator[str]:
    """The key of every `SHARD_ROWS` rows."""
    tokenizer, task = builder.template.tokenizer, builder.task
    common = hashlib.sha256()
    prompt = {"task": task.name, "labels": task.labels, "prompt": task.prompt.model_dump(mode="json")}
    prompt["weights"] = asdict(builder.weights)
    common.update(json.dumps([VERSION, prompt, builder.template.rendered], sort_keys=True).encode())
    common.update(json.dumps(sorted(map(str, tokenizer.all_special_tokens))).encode())
    common.update(tokenizer.backend_tokenizer.to_str().encode())
    starts = range(0, max(len(dataset), 1), _UNIT_ROWS)
    units = [range(start, min(start + _UNIT_ROWS, len(dataset))) for start in starts]
    with closing(mapped(_Hash(dataset), units, workers)) as found:
        digests = list(found)
    for at in range(0, len(digests), SHARD_ROWS // _UNIT_ROWS):
        digest = common.copy()
        for unit in digests[at : at + SHARD_ROWS // _UNIT_ROWS]:
            digest.update(unit)
        yield digest.hexdigest()[:40]


@dataclass(frozen=True)
class _Hash:
    """Numbers of rows -> a hash of what their tokens follow from."""

    dataset: Dataset

    def __call__(self, rows: range) -> bytes:
        columns = ["text", "candidates", "label", "entities", "shares", "labels"]
        table = self.dataset.select(rows).select_columns(columns).with_format("arrow")[:]
        # As JSON, not as Arrow's bytes: those depend on how the rows lie in their file.
        values = [[row[name] for name in columns] for row in table.to_pylist()]
        return hashlib.sha256(json.dumps(values).encode()).digest()


def _token_folder() -> Path:
    folder = cache_folder() / "tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
        reason = "no permission to write"
    except OSError as error:
        writable, reason = False, error.strerror or str(error)
    if not writable:
        raise OutputError(f"token files cannot be kept in {folder}: {reason}; {_OTHER_CACHE}")
    return folder


def _remove_unused(folder: Path) -> None:
    for file in folder.iterdir():
        if file.is_file() and time.time() - file.stat().st_mtime > KEPT_SECONDS:
            file.unlink(missing_ok=True)
