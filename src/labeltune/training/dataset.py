"""Checked rows -> token ids on disk, once for the same rows, prompt and tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.errors import OutputError
from labeltune.modeling.pocket import cache_folder
from labeltune.run_folder import writing
from labeltune.tasks.builder import PromptBuilder
from labeltune.types import Example

if TYPE_CHECKING:
    from datasets import Dataset


#: Part of the cache key; raised when the same rows are tokenized differently.
VERSION = 2
#: Token files that no run has used for this long are removed.
KEPT_SECONDS = 30 * 24 * 3600
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


def tokenize_rows(dataset: Dataset, builder: PromptBuilder) -> tuple[Dataset, TokenAccount]:
    """What training reads of `token_columns`, and where the tokens go.

    Columns of the result: `input_ids` list of int32, `answer_start` and `answer_end` int32 (end exclusive), `length`.

    Raises:
        PromptError: a row's instruction, candidates and answer do not fit the budget.
        OutputError: the cache folder cannot be written.
    """
    tokens = token_columns(dataset, builder)
    spans = tokens.with_format("numpy")
    account = TokenAccount(
        rows=len(tokens),
        tokens=int(spans["length"][:].sum()) if len(tokens) else 0,
        answer_tokens=int((spans["answer_end"][:] - spans["answer_start"][:]).sum()) if len(tokens) else 0,
        shortened=int(spans["shortened"][:].sum()) if len(tokens) else 0,
        cut_entities=int(spans["cut_entities"][:].sum()) if len(tokens) else 0,
    )
    return tokens.select_columns(["input_ids", "answer_start", "answer_end", "length"]), account


def token_columns(dataset: Dataset, builder: PromptBuilder) -> Dataset:
    """Token ids of every row, and which part stands where, in an Arrow file of the cache folder.

    The file is named by everything the tokens follow from: rows, task, prompt and tokenizer. A second run with the same
    ones reads it; processes of one run wait for the first to write it.

    Columns of the result: `input_ids` list of int32; int32 each `text_start`, `text_end`, `answer_start`, `answer_end`
    (positions of tokens, ends exclusive), `length`, `excess` (tokens that the whole document has beyond the budget) and
    `cut_entities`; `shortened` bool; `cut_characters` int32, characters of the document that were cut away.

    Raises:
        PromptError: a row's instruction, candidates and answer do not fit the budget.
        OutputError: the cache folder cannot be written.
    """

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        example = Example.from_row(row)
        encoded = builder.training(example)
        return {
            "input_ids": encoded.ids,
            "text_start": encoded.text_span[0],
            "text_end": encoded.text_span[1],
            "answer_start": encoded.answer_span[0],
            "answer_end": encoded.answer_span[1],
            "length": len(encoded.ids),
            "shortened": encoded.text.strip() != example.text.strip(),
            "excess": encoded.excess,
            "cut_characters": max(0, len(example.text.strip()) - len(encoded.text.strip())),
            "cut_entities": sum(entity.text not in encoded.text for entity in example.entities or ()),
        }

    import datasets

    integer = datasets.Value("int32")
    columns = datasets.Features(
        {
            "input_ids": datasets.List(integer),
            "text_start": integer,
            "text_end": integer,
            "answer_start": integer,
            "answer_end": integer,
            "length": integer,
            "shortened": datasets.Value("bool"),
            "excess": integer,
            "cut_characters": integer,
            "cut_entities": integer,
        }
    )
    from filelock import FileLock

    folder = _token_folder()
    name = content_key(dataset, builder)
    file = folder / f"{name}.arrow"
    was_enabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        # `map` writes a temporary file and renames it, so a file that is there is whole.
        with writing(folder, _OTHER_CACHE), FileLock(folder / f"{name}.lock"):
            _remove_unused(folder)
            tokens = dataset.map(
                encode,
                remove_columns=dataset.column_names,
                features=columns,
                cache_file_name=str(file),
                new_fingerprint=name,
            )
            os.utime(file)
    finally:
        if not was_enabled:
            datasets.enable_progress_bars()
    return tokens


def content_key(dataset: Dataset, builder: PromptBuilder) -> str:
    """A hash of everything that the tokens of a data set follow from; 40 hexadecimal digits."""
    import pyarrow as pa

    tokenizer = builder.template.tokenizer
    task = builder.task
    digest = hashlib.sha256()
    prompt = {"task": task.name, "labels": task.labels, "prompt": task.prompt.model_dump(mode="json")}
    digest.update(json.dumps([VERSION, prompt, tokenizer.chat_template], sort_keys=True).encode())
    digest.update(json.dumps(sorted(map(str, tokenizer.all_special_tokens))).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        # Written out and read nowhere: the stream holds the values alone, however the rows lie in their files.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
            writer.write_table(table.replace_schema_metadata(None).combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()[:40]


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
