"""`labeltune data check | convert | download`."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from labeltune.commands.doubts import Judge
from labeltune.commands.options import AsJson, Command, Labels, OnError, Overrides
from labeltune.commands.preparing import first_rows, guess_task, named_task, reading_config, too_long
from labeltune.config import HubConfig, RunConfig, is_config, load_config
from labeltune.data.check import (
    Audit,
    add_duplicates,
    add_meeting_faults,
    audit_file,
    nothing_to_learn,
    stop_on_errors,
)
from labeltune.data.containers import SUFFIXES, TOOLS
from labeltune.data.convert import convert_file
from labeltune.data.formats.write import WRITERS
from labeltune.data.labels import by_count, named_labels
from labeltune.data.loading import Rows, load_rows
from labeltune.data.near_duplicates import NearDuplicate, find_near_duplicates
from labeltune.data.schemas import Fault
from labeltune.data.sources import download_original, resolve_data
from labeltune.errors import ConfigError, counted, printable
from labeltune.evaluation.label_doubts import Doubt, Judged, find_doubts
from labeltune.io.outputs import check_file, note_replaced, write_text
from labeltune.io.progress import phase
from labeltune.messages import spoken, verbatim
from labeltune.prompts import make_task
from labeltune.prompts.builder import builder_for_base
from labeltune.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


#: Labels of a file that `data check` prints, the most frequent first.
LABELS_SHOWN = 50
#: What `data convert` writes where no other tool is named.
INSTRUCTIONS = "instructions"

app = typer.Typer(
    help="Check, convert and download data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command(cls=Command)
def check(
    *,
    file: Annotated[
        str,
        typer.Argument(
            help="jsonl, json, csv, tsv, parquet or xlsx; or a config.yaml, whose data is checked."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE|KEY=VALUE]...",
            help="More files, each checked by itself; config keys, e.g. data.columns.text=content or data.encoding=gb18030.",
        ),
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Test rows; those that also stand in FILE are errors.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="classification, multilabel or ner; guessed from the columns when missing."),
    ] = None,
    labels: Labels = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Model or folder whose tokens lengths are counted in.")
    ] = None,
    as_json: AsJson = False,
    limit: Annotated[int, typer.Option(help="Faults listed of each kind; 0 for all.", min=0)] = 20,
    report: Annotated[
        Path | None,
        typer.Option(help="HTML page to write: near-duplicates, rows whose label to look at, token account."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; data.workers of the config when missing.", min=1)
    ] = None,
    run: Annotated[str | None, typer.Option(help="A run that judges the answers of FILE.")] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            help="Train so many models, and judge every row by one that has not seen it; needs a config.",
            min=2,
        ),
    ] = None,
    suspects: Annotated[
        Path | None,
        typer.Option(help="Write the rows that the model contradicts here (with --run or --folds)."),
    ] = None,
    to: Annotated[str | None, typer.Option(help="label-studio: write them as its tasks.")] = None,
) -> None:
    """List every fault with file:line; exit 1 on errors, 0 otherwise."""
    judge = Judge(run, folds, suspects, to)
    if report is not None:
        from labeltune.evaluation.data_report import check_report

        check_report(report, [given for given in (file, test) if given is not None])
    more = [
        given for given in overrides or [] if "=" not in given and given.lower().endswith((*SUFFIXES, *TOOLS))
    ]
    keys = [given for given in overrides or [] if given not in more]
    if workers is not None:
        keys.append(f"data.workers={workers}")
    if more and (test is not None or report is not None):
        raise ConfigError("--test and --report take one file to check")
    judge.check(file, bool(more))
    config, train_file, test_file = _check_target(file, test, task, labels, keys)
    if report is not None:
        read = (train_file, config.data.validation, test_file)
        check_report(report, [given for given in read if given is not None])
    model = _model_at_hand(tokenizer, config if is_config(file) else None)
    loaded = _load_tokenizer(model) if model is not None else None
    counter = _token_counter(loaded) if loaded is not None else None
    with phase("checking the rows"):
        rows = check_data(config, train_file, test_file, counter, loaded)
        for other in more:
            settings, one, _ = _check_target(other, None, task, labels, keys)
            rows += check_data(settings, one, None, counter, loaded)
    audits = [r.audit for r in rows]
    unreadable = next((a.path for a in audits if a.unreadable is not None), None)
    findings, judged = None, None
    if unreadable is None:
        judged = judge.judged(config, rows[0])
        findings = report_data(rows, config, report, loaded, model, judged) if report is not None else None
    doubts = None if judged is None else find_doubts(judged, _pairs(rows[0]))
    if judged is not None and doubts is not None:
        judge.write(judged, doubts, report)
    if as_json:
        _print_json(audits, findings, doubts)
    else:
        _print_audits(audits, limit)
        if doubts is not None:
            _tell_doubts(doubts, len(judged or ()), limit)
    if findings is not None:
        print(_report_line(report, findings), file=sys.stderr)
    elif report is not None:
        print(f"no report was written, as {printable(str(unreadable))} cannot be used", file=sys.stderr)
    if any(audit.errors for audit in audits):
        raise typer.Exit(1)


def _pairs(rows: Rows) -> Sequence[NearDuplicate]:
    """Near-duplicates in a file, where what finds them is installed."""
    return find_near_duplicates([rows]).pairs if importlib.util.find_spec("datasketch") is not None else ()


@spoken("stdout")
def _tell_doubts(doubts: Sequence[Doubt], judged: int, limit: int) -> None:
    """Say what the judge contradicts, the largest loss first."""
    print(f"{counted(len(doubts), 'row')} of {judged} that the model contradicts")
    for doubt in doubts[: limit or None]:
        against = f"; {doubt.against} stands against it" if doubt.against else ""
        print(
            f"{doubt.where}: {doubt.given!r}, and the model says {doubt.suggested!r} at {doubt.sure:.2f}{against}"
        )


def check_data(
    config_or_task: RunConfig,
    train: str,
    test: str | None = None,
    token_counts: Callable[[list[str]], list[int]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Rows]:
    """Audit a training file, and against it the config's validation file and a test file; no fault is raised.

    Args:
        tokenizer: finds rows that cannot fit `prompt.max_length`; they are not looked for when None.
    """
    config = config_or_task
    load = partial(load_rows, task=config.task, data=config.data, hub=config.hub, token_counts=token_counts)
    rows = load(train, max_rows=config.data.max_rows)
    add_duplicates(rows.audit, rows.where)
    # Another file, e.g. a single test file, may well hold rows of one label.
    if train == config.data.train and (nothing := nothing_to_learn(rows.audit)) is not None:
        rows.audit.add_fault(Fault("one_label", f"{rows.audit.path}:1", nothing))
    found = [rows]
    for spec in (config.data.validation, test):
        if spec is not None:
            other = load(spec)
            add_duplicates(other.audit, other.where)
            add_meeting_faults(rows, other, config.data)
            found.append(other)
    if tokenizer is not None:
        _add_too_long(found, config, tokenizer)
    return found


def _add_too_long(files: Sequence[Rows], config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add an error for each row that cannot fit; the labels are those of the training file, as in training."""
    from labeltune.training.dataset import rows_that_cannot_fit

    labels = files[0].audit.label_set(config.data.labels)
    builder = builder_for_base(config, labels, tokenizer)
    needed = [rows_that_cannot_fit(rows.dataset, builder) for rows in files]
    enough = max((tokens for found in needed for tokens in found.values()), default=0)
    for rows, found in zip(files, needed, strict=True):
        for number, tokens in found.items():
            rows.audit.add_fault(too_long(rows.where(number), tokens, config.prompt.max_length, enough))


def report_data(
    files: Sequence[Rows],
    config: RunConfig,
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model: Path | None = None,
    judged: Sequence[Judged] | None = None,
) -> dict[str, Any]:
    """Write the HTML report of audited files, the training file first; returns its findings, JSON-ready.

    `tokenizer` counts tokens, and the input embeddings in its folder `model` help to judge labels; None leaves either out.

    Raises:
        DataError: a file cannot be used as a whole, so there is nothing to report on.
        MissingExtraError: datasketch or cleanlab is not installed.
        OutputError: the report cannot be written.
    """
    from labeltune.evaluation.data_report import check_report, data_page, make_report

    check_report(path)
    stop_on_errors([rows.audit for rows in files], skip=True, fix="")
    report = make_report(files, config, tokenizer, model, progress=True, judged=judged)
    write_text(path, data_page(report))
    return report.to_dict()


def _check_target(
    file: str, test: str | None, task: str | None, labels: str | None, overrides: Sequence[str] = ()
) -> tuple[RunConfig, str, str | None]:
    keys = [*overrides, f"task={task}"] if task else [*overrides]
    if is_config(file):
        config = load_config(file, keys)
        return config, config.data.train, test or config.data.test
    if labels:
        names = named_labels("--labels", labels)
        keys.append(f"data.labels={json.dumps(names, ensure_ascii=False)}")
    if named_task(keys) is None:
        reading = reading_config(keys)
        keys.append(f"task={guess_task(first_rows(file, reading), reading)}")
    return load_config(None, keys), file, test


def _model_at_hand(tokenizer: str | None, config: RunConfig | None) -> Path | None:
    """The folder of the named tokenizer, else that of the config's model where that needs no download."""
    from labeltune.models.pocket import POCKET_MODELS, is_cached

    if tokenizer is None and config is not None:
        at_hand = is_cached(config.model) if config.model in POCKET_MODELS else Path(config.model).is_dir()
        tokenizer = config.model if at_hand else None
    if tokenizer is None:
        return None
    from labeltune.models.hub import resolve_model

    folder = Path(tokenizer)
    hub = config.hub if config is not None else HubConfig()
    return folder if folder.is_dir() else resolve_model(tokenizer, hub).folder


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from labeltune.models.hub import load_tokenizer

    return load_tokenizer(folder)


def _token_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[int]]:
    def count(texts: list[str]) -> list[int]:
        output: Any = tokenizer(texts, add_special_tokens=False, verbose=False)
        return [len(ids) for ids in output.input_ids]

    return count


def _report_line(path: Path | None, findings: dict[str, Any]) -> str:
    found = [f"{counted(findings['near_duplicates']['pairs'], 'pair')} of near-duplicates"]
    if findings["suspects"] is not None:
        found.append(f"{counted(findings['suspects']['suspects'], 'row')} to look at for their label")
    if findings["tokens"] is not None:
        found.append(
            f"{findings['tokens']['shortened_share']:.1%} of the texts shortened, "
            f"{findings['tokens']['speed_up']:.2f} times fewer tokens with a shared prefix"
        )
    why = "" if findings["tokens"] is not None else f"; {findings['no_tokens'].splitlines()[0]}"
    return f"report: {printable(str(path))}: {', '.join(found)}{why}"


def _print_json(
    audits: Sequence[Audit], findings: dict[str, Any] | None, doubts: Sequence[Doubt] | None
) -> None:
    faults = [
        {"kind": f.kind, "severity": f.severity, "where": f.where, "message": f.message}
        for audit in audits
        for f in audit.faults
    ]
    found: dict[str, Any] = {"files": [audit.to_dict() for audit in audits], "faults": faults}
    if findings is not None:
        found["report"] = findings
    elif doubts is not None:
        found["doubts"] = [doubt.to_dict() for doubt in doubts]
    print(json.dumps(found, ensure_ascii=False, indent=2))


def _print_audits(audits: Sequence[Audit], limit: int) -> None:
    for number, audit in enumerate(audits):
        if number:
            print()
        _print_audit(audit, limit)


@spoken("stdout")
def _print_audit(audit: Audit, limit: int) -> None:
    for fault in audit.first_faults(limit):
        print(fault)
    for kind, count in Counter(fault.kind for fault in audit.faults).items():
        if limit and count > limit:
            print(f"... {count - limit} more of {kind} (--limit 0 lists all)")
    if audit.faults:
        print()
    counts = f"{counted(audit.errors, 'error')}, {counted(audit.warnings, 'warning')}"
    if audit.unreadable is not None and not audit.rows:
        print(f"{printable(str(audit.path))}: no row can be read, {counts}")
    else:
        print(f"{printable(str(audit.path))}: {counted(audit.rows, 'row')}, {audit.usable} usable, {counts}")
    for kind, count in audit.counts.most_common():
        print(f"  {count:8d}  {kind}")
    if not audit.usable:
        return
    if audit.task == "ner":
        print(
            f"  rows without entities: {audit.without_entities}; rows that repeat a (text, label) pair: {audit.repeated_mentions}"
        )
    total = sum(audit.labels.values())
    print(f"  labels ({len(audit.labels)}):")
    for label, count in islice(by_count(audit.labels).items(), LABELS_SHOWN):
        line = f"  {count:8d}  {count / total:6.1%}  {printable(label)}"
        print(line, file=verbatim(sys.stdout))
    words = {"p10": "10th percentile", "p50": "median", "p90": "90th percentile", "p99": "99th percentile"}
    lengths = audit.length_percentiles().items()
    line = ", ".join(f"{words.get(name, 'longest')} {value:,}" for name, value in lengths)
    print(f"  text length in {audit.length_unit}: {line}")


def _known_format(given: str) -> str:
    if given not in (INSTRUCTIONS, *WRITERS):
        raise ConfigError(f"--to {given}: it is one of {', '.join((INSTRUCTIONS, *WRITERS))}")
    return given


@app.command(cls=Command)
def convert(
    *,
    file: Annotated[str, typer.Argument(help="Labelled rows, ours or an annotation tool's.")],
    output: Annotated[Path, typer.Argument(help="File to write.")],
    task: Annotated[
        str | None, typer.Option(help="classification, multilabel or ner; guessed when missing.")
    ] = None,
    labels: Labels = None,
    on_error: OnError = "stop",
    to: Annotated[
        str,
        typer.Option(
            help=f"instructions (the original recipe's jsonl), or {', '.join(WRITERS)}.",
            callback=_known_format,
        ),
    ] = INSTRUCTIONS,
    overrides: Overrides = None,
) -> None:
    """Write rows as instructions, or for other tools."""
    check_file(output, [file])
    note_replaced(output)
    config, source, _ = _check_target(file, None, task, labels, overrides or [])
    write = WRITERS[to] if to in WRITERS else _instructions(source, config)
    written, skipped = convert_file(source, output, config, write, skip=on_error == "skip")
    print(f"{printable(str(output))}: {counted(written, 'row')} written, {skipped} skipped", file=sys.stderr)


def _instructions(source: str, config: RunConfig) -> Callable[[Iterable[Example]], Iterator[str]]:
    """What writes the original's rows."""
    maker = make_task(config.task, _labels_of(source, config), config.prompt, config.data.entities)

    def write(examples: Iterable[Example]) -> Iterator[str]:
        for example in examples:
            conversation = maker.conversation(example)
            soft = {"shares": dict(example.shares)} if example.shares else {}
            row = {
                "instruction": conversation.system,
                "input": conversation.user,
                "output": maker.target(example),
                **soft,
            }
            yield json.dumps(row, ensure_ascii=False) + "\n"

    return write


def _labels_of(source: str, config: RunConfig) -> tuple[str, ...]:
    data = config.data
    if data.labels is not None:
        return data.labels
    return audit_file(resolve_data(source, config.hub), config.task, data, max_rows=data.max_rows).label_set()


@app.command(cls=Command)
def download(
    name: Annotated[
        str, typer.Argument(help="fudan (swift/zh_cls_fudan-news) or ccfbdci (qgyd2021/chinese_ner_sft).")
    ],
    folder: Annotated[
        Path, typer.Argument(help="Where to put train.jsonl and test.jsonl, or ccfbdci.jsonl.")
    ] = Path(),
) -> None:
    """Fetch the original recipe's data with the hub's own client."""
    with phase("fetching the data"):
        paths = download_original(name, folder)
    for path in paths:
        print(path)
