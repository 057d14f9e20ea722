"""`labeltune data check | convert | download`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from labeltune.messages import spoken, verbatim

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from labeltune.config import RunConfig
    from labeltune.data.check import Audit
    from labeltune.types import Example

app = typer.Typer(help="Check, convert and download data.", no_args_is_help=True)


@app.command()
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
            metavar="[KEY=VALUE]...",
            help="Config keys, e.g. data.columns.text=content or data.encoding=gb18030.",
        ),
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Test rows; those that also stand in FILE are errors.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="classification or ner; guessed from the columns when missing.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="The label set, between commas.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Model or folder whose tokens lengths are counted in.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
    limit: Annotated[int, typer.Option(help="Faults listed of each kind; 0 for all.", min=0)] = 20,
    report: Annotated[
        Path | None,
        typer.Option(help="HTML page to write: near-duplicates, rows whose label to look at, token account."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; data.workers of the config when missing.", min=1)
    ] = None,
) -> None:
    """List every fault with file:line; exit 1 on errors, 0 otherwise."""
    import labeltune
    from labeltune.errors import printable

    if report is not None:
        from labeltune.evaluation.data_report import check_report

        check_report(report, [given for given in (file, test) if given is not None])
    config, train_file, test_file = _check_target(file, test, task, labels, overrides or [])
    if report is not None:
        read = (train_file, config.data.validation, test_file)
        check_report(report, [given for given in read if given is not None])
    if workers is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"workers": workers})})
    model = _model_at_hand(tokenizer, config if Path(file).suffix in (".yaml", ".yml") else None)
    loaded = _load_tokenizer(model) if model is not None else None
    counter = _token_counter(loaded) if loaded is not None else None
    rows = labeltune.check_data(config, train_file, test_file, counter, loaded)
    audits = [r.audit for r in rows]
    unreadable = next((a.path for a in audits if a.unreadable is not None), None)
    findings = None
    if report is not None and unreadable is None:
        findings = labeltune.report_data(rows, config, report, loaded, model)
    if as_json:
        faults = [
            {"kind": f.kind, "severity": f.severity, "where": f.where, "message": f.message}
            for a in audits
            for f in a.faults
        ]
        found: dict[str, Any] = {"files": [a.to_dict() for a in audits], "faults": faults}
        if findings is not None:
            found["report"] = findings
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        for audit in audits:
            _print_audit(audit, limit)
    if findings is not None:
        print(_report_line(report, findings), file=sys.stderr)
    elif report is not None:
        print(f"no report was written, as {printable(str(unreadable))} cannot be used", file=sys.stderr)
    if any(audit.errors for audit in audits):
        raise typer.Exit(1)


def _check_target(
    file: str, test: str | None, task: str | None, labels: str | None, overrides: Sequence[str] = ()
) -> tuple[RunConfig, str, str | None]:
    from labeltune.config import load_config
    from labeltune.data.labels import named_labels

    keys = [*overrides, f"task={task}"] if task else [*overrides]
    if Path(file).suffix in (".yaml", ".yml"):
        config = load_config(file, keys)
        return config, config.data.train, test or config.data.test
    if labels:
        names = named_labels("--labels", labels)
        keys.append(f"data.labels={json.dumps(names, ensure_ascii=False)}")
    if named_task(keys) is None:
        keys.append(f"task={guess_task(file, reading_config(keys))}")
    return load_config(None, keys), file, test


def named_task(changes: Sequence[str]) -> str | None:
    """The task that `key=value` changes set, if they do."""
    named = [
        value for key, _, value in (change.partition("=") for change in changes) if key.strip() == "task"
    ]
    return named[-1].strip() if named else None


def reading_config(changes: Sequence[str]) -> RunConfig:
    """Only the changes that tell how rows are read: the others may be for a task that is not known yet."""
    from labeltune.config import load_config

    return load_config(None, [change for change in changes if re.match(r"\s*(hub|data)\s*[.=]", change)])


def guess_task(spec: str, config: RunConfig) -> str:
    """`ner` when the first readable rows have entities, else `classification`."""
    from itertools import islice

    from labeltune.data import columns
    from labeltune.data.sources import iter_records, resolve_data

    first = islice(iter_records(resolve_data(spec, config.hub), config.data.encoding), columns.LOOKED_AT)
    named = config.data.columns.entities
    rows = (record.values for record in first if record.values is not None)
    return "ner" if any(named in row or columns.guess_task(row) for row in rows) else "classification"


def _model_at_hand(tokenizer: str | None, config: RunConfig | None) -> Path | None:
    """The folder of the named tokenizer, else that of the config's model where that needs no download."""
    from labeltune.config import HubConfig
    from labeltune.models.hub import resolve_model
    from labeltune.models.pocket import POCKET_MODELS, is_cached

    if tokenizer is None and config is not None:
        at_hand = is_cached(config.model) if config.model in POCKET_MODELS else Path(config.model).is_dir()
        tokenizer = config.model if at_hand else None
    if tokenizer is None:
        return None
    folder = Path(tokenizer)
    hub = config.hub if config is not None else HubConfig()
    return folder if folder.is_dir() else resolve_model(tokenizer, hub).folder


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from labeltune.commands.quiet import quiet_libraries
    from labeltune.models.hub import load_tokenizer

    quiet_libraries()
    return load_tokenizer(folder)


def _token_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[int]]:
    def count(texts: list[str]) -> list[int]:
        output: Any = tokenizer(texts, add_special_tokens=False, verbose=False)
        return [len(ids) for ids in output.input_ids]

    return count


def _report_line(path: Path | None, findings: dict[str, Any]) -> str:
    from labeltune.errors import counted, printable

    found = [f"{counted(findings['near_duplicates']['pairs'], 'pair')} of near-duplicates"]
    if findings["suspects"] is not None:
        found.append(f"{counted(findings['suspects']['suspects'], 'row')} to look at for their label")
    if findings["tokens"] is not None:
        found.append(
            f"{findings['tokens']['shortened_share']:.1%} of the texts shortened, "
            f"{findings['tokens']['speed_up']:.2f} times fewer tokens with a shared prefix"
        )
    else:
        found.append("tokens were not counted (the page says why)")
    return f"report: {printable(str(path))}: {', '.join(found)}"


@spoken("stdout")
def _print_audit(audit: Audit, limit: int) -> None:
    from labeltune.errors import counted, printable

    shown: dict[str, int] = {}
    for fault in audit.faults:
        shown[fault.kind] = shown.get(fault.kind, 0) + 1
        if not limit or shown[fault.kind] <= limit:
            print(fault)
    for kind, count in shown.items():
        if limit and count > limit:
            print(f"... {count - limit} more of {kind} (--limit 0 lists all)")
    counts = f"{counted(audit.errors, 'error')}, {counted(audit.warnings, 'warning')}"
    if audit.unreadable is not None and not audit.rows:
        print(f"\n{printable(str(audit.path))}: no row can be read, {counts}")
    else:
        print(
            f"\n{printable(str(audit.path))}: {counted(audit.rows, 'row')}, {audit.usable} usable, {counts}"
        )
    for kind, count in audit.counts.most_common():
        print(f"  {count:8d}  {kind}")
    if not audit.usable:
        print()
        return
    if audit.task == "ner":
        print(
            f"  rows without entities: {audit.without_entities}; rows that repeat a (text, label) pair: {audit.repeated_mentions}"
        )
    total = sum(audit.labels.values())
    print(f"  labels ({len(audit.labels)}):")
    for label, count in audit.labels.most_common(50):
        line = f"  {count:8d}  {count / total:6.1%}  {printable(label)}"
        print(line, file=verbatim(sys.stdout))
    words = {"p10": "10th percentile", "p50": "median", "p90": "90th percentile", "p99": "99th percentile"}
    lengths = audit.length_percentiles().items()
    line = ", ".join(f"{words.get(name, 'longest')} {value:,}" for name, value in lengths)
    print(f"  text length in {audit.length_unit}: {line}\n")


@app.command()
def convert(
    file: Annotated[str, typer.Argument(help="Rows in the classification or NER schema.")],
    output: Annotated[Path, typer.Argument(help="jsonl to write.")],
    task: Annotated[str | None, typer.Option(help="classification or ner; guessed when missing.")] = None,
    labels: Annotated[str | None, typer.Option(help="The label set, between commas.")] = None,
    on_error: Annotated[str, typer.Option(help="Faulty rows: stop or skip.")] = "stop",
) -> None:
    """Write the original recipe's instruction/input/output jsonl."""
    from labeltune.data.convert import convert_file
    from labeltune.errors import ConfigError, counted, printable
    from labeltune.io.outputs import check_file
    from labeltune.prompts import make_task

    if on_error not in ("stop", "skip"):
        raise ConfigError(f"--on-error must be stop or skip, not {on_error!r}")
    check_file(output, [file])
    config, source, _ = _check_target(file, None, task, labels)
    maker = make_task(config.task, config.data.labels or _labels_of(source, config), config.prompt)

    def render(example: Example) -> dict[str, str]:
        conversation = maker.conversation(example)
        return {
            "instruction": conversation.system,
            "input": conversation.user,
            "output": maker.target(example),
        }

    written, skipped = convert_file(source, output, config, render, skip=on_error == "skip")
    print(f"{printable(str(output))}: {counted(written, 'row')} written, {skipped} skipped", file=sys.stderr)


def _labels_of(source: str, config: RunConfig) -> tuple[str, ...]:
    from labeltune.data.check import audit_file
    from labeltune.data.sources import resolve_data

    return audit_file(resolve_data(source, config.hub), config.task, config.data).label_set()


@app.command()
def download(
    name: Annotated[
        str, typer.Argument(help="fudan (swift/zh_cls_fudan-news) or ccfbdci (qgyd2021/chinese_ner_sft).")
    ],
    folder: Annotated[
        Path, typer.Argument(help="Where to put train.jsonl and test.jsonl, or ccfbdci.jsonl.")
    ] = Path(),
) -> None:
    """Fetch the original recipe's data with the hub's own client."""
    from labeltune.data.sources import download_original

    for path in download_original(name, folder):
        print(path)
