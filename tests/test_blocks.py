"""Work cut into blocks and done by several processes is the work done in one pass."""

from __future__ import annotations

import gc
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest

from helpers.rows import LABELS, classification_rows, ner_rows, write_jsonl
from helpers.tiny_models import make_tokenizer
from labeltune.config import DataConfig, build_config
from labeltune.data import check
from labeltune.data.blocks import Block, cut_file, cut_lines, cut_parquet, read_block
from labeltune.data.check import Audit
from labeltune.data.loading import Rows, load_rows, stratified_split, stratum
from labeltune.data.records import Record, bounded_lines
from labeltune.data.sources import iter_records
from labeltune.errors import DataError
from labeltune.io.processes import mapped, worker_count
from labeltune.io.uris import Place
from labeltune.prompts import make_task
from labeltune.prompts.builder import PromptBuilder
from labeltune.prompts.template import ChatTemplate
from labeltune.training import dataset as tokens

PIECES = [
    b'{"text": "a"}\n',
    '{"text": "\u661f"}\n'.encode(),
    b"\n",
    b"  \t\n",
    "\u3000\n".encode(),
    b"\x1c\n",
    b"no json\n",
    b"[1, 2]\n",
    b'{"text": "b"}\r\n',
    b'{"a": 1, "a": 2}\n',
    b'{"text": "' + b"far too long " * 30 + b'"}\n',
]
ENDS = [
    b"",
    b'{"text": "no line break"}',
    b"\xff\xfe\n{}\n",
    b'{"text": "\xe6\x98"}\n{"text": "never read"}\n',
]
BEGINNINGS = [b"", b"\xef\xbb\xbf", b"\xff\xfeU\x00", b"[\n"]


def of_blocks(path: Path, found: list[Block]) -> list[Record]:
    records = []
    for block in found:
        with path.open("rb") as file:
            inside = list(read_block(block, file))
        assert len(inside) == block.rows and block.first == len(records)
        records += inside
    return records


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_blocks_of_lines_are_read_to_the_records_of_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr("labeltune.data.records.MAX_LINE_BYTES", 200)
    generator, path = random.Random(suffix), tmp_path / f"rows.{suffix}"
    for _ in range(300):
        middle = b"".join(generator.choices(PIECES, k=generator.randrange(12)))
        path.write_bytes(generator.choice(BEGINNINGS) + middle + generator.choice(ENDS))
        with path.open("rb") as file:
            options = generator.choice([{}, {"most_bytes": 20}, {"most_bytes": 20, "multiple": 2}])
            found = list(cut_file(str(path), file, generator.randrange(1, 6), **options))
        assert [block.number for block in found] == list(range(len(found)))
        assert of_blocks(path, found) == list(iter_records(path)), path.read_bytes()
        if "multiple" in options:
            assert all(block.rows % 2 == 0 or block.rows >= 1 for block in found[:-1])


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.jsonl.gz", "rows.tsv"])
def test_a_file_that_cannot_be_cut_is_one_block(tmp_path: Path, name: str) -> None:
    rows, path = [{"text": f"row {n}"} for n in range(50)], tmp_path / name
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(
        {
            "rows.json": json.dumps(rows, indent=1).encode(),
            "rows.csv": "\n".join(["text", *(row["text"] for row in rows)]).encode(),
            "rows.jsonl.gz": gzip.compress(lines.encode()),
            "rows.tsv": b"text,output\na,b\n",  # one fault of the file
        }[name]
    )
    with path.open("rb") as file:
        (block,) = cut_file(str(path), file, 7)
    assert block.rows == (1 if name == "rows.tsv" else 50)
    assert of_blocks(path, [block]) == list(iter_records(path))


def test_a_block_that_is_full_of_bytes_ends_at_a_whole_chunk(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "x" * 100}] * 50)
    with path.open("rb") as file:
        found = list(cut_lines(str(path), bounded_lines(file), 20, multiple=4, most_bytes=500))
    assert [block.rows for block in found] == [8] * 6 + [2]


def test_blocks_of_parquet_are_read_to_the_records_of_one_pass(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"text": f"row {i}", "n": [i]} for i in range(2500)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=1100)
    for size in (1, 700, 1100, 5000):
        with path.open("rb") as file:
            found = list(cut_parquet(str(path), file, size))
        assert of_blocks(path, found[:40]) == list(iter_records(path))[: 40 * size]


# --- the audit ---


def audit_values(audit: Audit) -> dict[str, Any]:
    values = {field.name: getattr(audit, field.name) for field in fields(audit)}
    return {**values, "order": [list(audit.counts), list(audit.labels)]}


def faulty_rows(task: str) -> list[Any]:
    if task == "ner":
        rows: list[Any] = ner_rows(400)
        rows[7] = {"text": "x", "entities": [{"start_idx": 0, "end_idx": 2, "entity_text": "x"}]}
        rows[50] = rows[49]
        return rows
    rows = classification_rows(400)
    rows[3] = {"text": "", "output": "Art"}
    rows[90] = {"text": "no candidates", "output": "Art"}
    rows[91] = {"text": "no candidates", "output": "Space"}
    rows[222] = {"text": "x", "category": LABELS, "output": "Never"}
    return rows


def test_a_repeated_column_is_one_record_in_blocks_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table([["a", "b"], ["c", "d"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, path)
    with path.open("rb") as file:
        found = list(cut_parquet(str(path), file, 1))
    assert of_blocks(path, found) == list(iter_records(path)) and len(found) == 1


@pytest.mark.parametrize("task", ["classification", "ner"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("max_rows", [None, 95])
def test_an_audit_in_processes_is_the_audit_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Any, kind: str, max_rows: int | None
) -> None:
    monkeypatch.setattr(check, "_BLOCK_ROWS", 37)
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, faulty_rows(task))
        path.write_bytes(path.read_bytes() + b"no json\n\n\xff\n{}\n")
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(faulty_rows(task)), path, row_group_size=150)

    def loaded(workers: int) -> Rows:
        def lengths(texts: list[str]) -> list[int]:
            return [len(text) + 1 for text in texts]

        data = DataConfig.model_validate({"workers": workers})
        return load_rows(str(path), task, data, max_rows=max_rows, token_counts=lengths)

    one, three = loaded(1), loaded(3)
    assert audit_values(one.audit) == audit_values(three.audit)
    assert one.audit.usable > 80 and one.audit.errors > 0
    assert one.dataset[:] == three.dataset[:] and one.dataset.features == three.dataset.features


def test_a_damaged_parquet_file_is_reported_as_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(classification_rows(3000)), path, row_group_size=500)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = b"\xff" * 200
    path.write_bytes(content)
    found = [
        load_rows(str(path), "classification", DataConfig.model_validate({"workers": workers}))
        for workers in (1, 2)
    ]
    assert audit_values(found[0].audit) == audit_values(found[1].audit)
    assert found[0].audit.counts["unparsable_line"] == 1


def plain_split(rows: Rows, fraction: float, seed: int) -> list[int]:
    """The split with a dictionary a row, as it stands in the description."""
    strata: dict[str, dict[int, list[int]]] = {}
    for number, row in enumerate(rows.dataset):
        strata.setdefault(stratum(row), {}).setdefault(rows.audit.text_hashes[number], []).append(number)
    generator, taken, carry = numpy.random.default_rng(seed), set(), 0.0
    for name in sorted(strata):
        keys = sorted(strata[name], key=lambda key: strata[name][key][0])
        if len(keys) == 1:
            continue
        want = fraction * len(keys) + carry
        count = min(round(want), len(keys) - 1)
        carry = min(want - count, 0.5)
        taken |= {keys[index] for index in generator.permutation(len(keys))[:count]}
    return [number for number, key in enumerate(rows.audit.text_hashes) if key in taken]


@pytest.mark.parametrize("task", ["classification", "ner"])
def test_the_split_is_the_plain_one(tmp_path: Path, task: Any) -> None:
    made = classification_rows(300) if task == "classification" else ner_rows(300)
    made += made[:40] + [{**row, "output": "Art"} for row in made[:20]]
    rows = load_rows(str(write_jsonl(tmp_path / "rows.jsonl", made)), task)
    for fraction in (0.0, 0.1, 0.5):
        held = stratified_split(rows, fraction, 3)
        assert held.tolist() == plain_split(rows, fraction, 3) and held.dtype == numpy.int64


# --- tokens ---


def test_tokens_are_the_same_with_any_number_of_processes_and_read_again_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_UNIT_ROWS", 8)
    monkeypatch.setattr(tokens, "SHARD_ROWS", 32)
    monkeypatch.chdir(tmp_path)
    config = build_config({})
    builder = PromptBuilder(
        make_task("classification", tuple(LABELS), config.prompt), ChatTemplate(make_tokenizer())
    )
    rows = classification_rows(75)
    found, names = [], []
    for workers, cache in ((1, "one"), (3, "three")):
        monkeypatch.setenv("LABELTUNE_CACHE", str(tmp_path / cache))
        path = write_jsonl(tmp_path / f"{cache}.jsonl", rows)
        loaded = load_rows(str(path), "classification")
        found.append(tokens.token_columns(loaded.dataset, builder, workers))
        names.append(sorted(p.name for p in (tmp_path / cache / "tokens").glob("*.arrow")))
    assert found[0][:] == found[1][:] and len(found[0]) == 75
    assert names[0] == names[1] and len(names[0]) == 3

    longer = load_rows(
        str(write_jsonl(tmp_path / "longer.jsonl", rows[:70] + classification_rows(90)[80:])),
        "classification",
    )
    tokens.token_columns(longer.dataset, builder, 2)
    # The two whole shards at the beginning are the same rows, so they are not made again.
    assert len(list((tmp_path / "three" / "tokens").glob("*.arrow"))) == 4
    assert not list((tmp_path / "three" / "tokens").glob(".*"))


# --- processes ---


def test_results_come_in_order_and_errors_come_through() -> None:
    before = psutil.Process().children(recursive=True)

    def work(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        if number == 30:
            raise DataError("row 30")
        return number * number

    found = []
    with pytest.raises(DataError, match="row 30"):
        for value in mapped(work, range(100), 3):
            found.append(value)
    assert found == [n * n for n in range(30)]
    assert psutil.Process().children(recursive=True) == before


def test_a_process_that_dies_is_an_error_and_not_a_wait() -> None:
    from concurrent.futures.process import BrokenProcessPool

    with pytest.raises(BrokenProcessPool):
        list(mapped(lambda number: os.kill(os.getpid(), signal.SIGKILL), range(4), 2))


def test_processes_end_with_a_killed_parent() -> None:
    script = "\n".join(
        [
            "import os, time",
            "from labeltune.io.processes import mapped",
            "def work(n):",
            "    os.write(1, f'{os.getpid()}\\n'.encode())",
            "    time.sleep(60)",
            "list(mapped(work, range(2), 2))",
        ]
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
        parent.kill()
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] and gone is not None


def private_bytes(_: int) -> int:
    """Anonymous memory of this process alone, behind a collection."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


def test_a_child_s_collections_do_not_copy_its_parent_s_memory() -> None:
    """Two million objects are some 200 MB, all of which a collection marks."""
    gc.unfreeze()  # as a program is that froze nothing
    kept = [[number] for number in range(2_000_000)]
    frozen = gc.get_freeze_count()
    (copied,) = mapped(private_bytes, [0], 2)
    assert copied < 60e6 and len(kept) == 2_000_000
    assert gc.get_freeze_count() == frozen


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert worker_count("auto") == 8 and worker_count("auto", enough=False) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert worker_count("auto") == 2 and worker_count(5) == 5


# --- places ---


@pytest.mark.parametrize("prefix", ["", "file://", "local://"])
def test_files_are_read_and_written_through_pyarrow_and_fsspec(tmp_path: Path, prefix: str) -> None:
    place = Place.of(f"{prefix}{tmp_path}/new")
    assert place.files() == {} and not place.is_file()
    place.inside("a.txt").write(b"one")
    place.inside("a.txt").write(b"three")
    place.inside("_b.txt").write(b"")
    assert place.inside("a.txt").read() == b"three" and place.inside("a.txt").is_file()
    with place.inside("a.txt").open() as file:
        file.seek(2)
        assert file.read(2) == b"re"
    place.inside("lines.txt").write(b"one\ntwo")
    with place.inside("lines.txt").open() as file:
        assert list(file) == [b"one\n", b"two"]
    place.inside("lines.txt").remove()
    assert {name: about["size"] for name, about in place.files().items()} == {"a.txt": 5}
    assert place.inside("a.txt").files()["a.txt"]["size"] == 5
    assert list(place.files(hidden=True)) == ["_b.txt", "a.txt"]
    place.inside("a.txt").remove()
    assert place.files() == {}
    with pytest.raises(DataError, match=r"a\.txt cannot be read"):
        place.inside("a.txt").open()


def test_an_unknown_kind_of_address_is_named() -> None:
    with pytest.raises(DataError, match="nowhere://x/y cannot be opened"):
        Place.of("nowhere://x/y").files()
