"""`labeltune export`: from a run to a folder that others load, whose answers are compared with the run's."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from labeltune import __version__
from labeltune.commands.evaluate import describe_run, labelled_rows
from labeltune.errors import ConfigError, DataError
from labeltune.io.outputs import is_hub_name, write_json, write_text
from labeltune.io.progress import Say, begin, phase, row_progress, tell, track
from labeltune.io.run_folder import (
    SELECTION_FILE,
    TRAINING_FILE,
    RunInfo,
    public_name,
    validation_file,
)
from labeltune.messages import localize
from labeltune.prompts import Task, make_task
from labeltune.prompts.template import ChatTemplate
from labeltune.types import Example, Prediction

if TYPE_CHECKING:
    from labeltune.export.folder import Dtype
    from labeltune.export.parity import Parity
    from labeltune.export.vllm import Adapter


def export_command(
    *,
    run: Annotated[str, typer.Argument(help="Run folder or checkpoint, also on a hub.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model; else the adapter, as vLLM loads it.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="bf16, fp16 or fp32 (with --merged); that of the base's weights when left out."),
    ] = None,
    ollama: Annotated[
        bool, typer.Option("--ollama", help="A Modelfile too, and GGUF if llama.cpp's converter is there.")
    ] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="ONNX too, through optimum-onnx.")] = False,
    verify: Annotated[
        str | None,
        typer.Option(
            help="Labelled rows that run and export must answer alike; else the run's validation rows."
        ),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compare run and export.")] = False,
    max_rows: Annotated[int | None, typer.Option(help="Only the first rows of --verify.", min=1)] = None,
    tolerance: Annotated[float, typer.Option(help="Share of rows that may be answered otherwise.")] = 0.0,
    engine: Annotated[
        str | None,
        typer.Option(help="vllm: serve the export there, and compare its answers to the same rows, too."),
    ] = None,
    engine_python: Annotated[
        str | None,
        typer.Option(help="Python of the environment that has the engine; this one when left out."),
    ] = None,
    metrics: Annotated[
        Path | None, typer.Option(help="metrics.json of `labeltune evaluate`: test figures for the card.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Upload to hf:org/name or ms:org/name (private when it is new).")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What servers call it; the folder's name when left out.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a run as others load it, and check its answers.

    The commands to run next go to standard output.
    """
    with phase("preparing the export"):
        done = export(
            run,
            output,
            merged=merged,
            dtype=dtype,
            ollama=ollama,
            onnx=onnx,
            verify=not no_verify,
            verify_data=verify,
            max_rows=max_rows,
            tolerance=tolerance,
            engine=engine,
            engine_python=engine_python,
            metrics=metrics,
            push=push,
            name=name,
            overwrite=overwrite,
        )
    for purpose, command in done.commands.items():
        print(f"# {localize(purpose)}\n{command}")


@dataclass(frozen=True)
class Exported:
    """What an export came to.

    Attributes:
        folder: where it is.
        kind: `merged model` or `adapter`.
        dtype: number format of the weights; of the base's, for an adapter.
        parity: how its answers compare with the run's; None when that was not checked.
        engine_parity: the same of the engine that served it; None where none was asked.
        commands: what to run next, by what it is for.
        address: where it was pushed, None when it was not.
    """

    folder: Path
    kind: str
    dtype: Dtype
    parity: Parity | None
    commands: dict[str, str]
    address: str | None = None
    engine_parity: Parity | None = None


def export(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    merged: bool = False,
    dtype: str | None = None,
    ollama: bool = False,
    onnx: bool = False,
    verify: bool = True,
    verify_data: str | None = None,
    max_rows: int | None = None,
    tolerance: float = 0.0,
    engine: str | None = None,
    engine_python: str | None = None,
    metrics: str | os.PathLike[str] | None = None,
    push: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    say: Say = tell,
    progress: bool = True,
) -> Exported:
    """Write a run in a form that transformers, vLLM, Ollama or ONNX Runtime load, and check that it answers alike.

    Args:
        run: a run folder, a checkpoint, or one on a hub.
        output: folder to make; it appears whole or not at all.
        merged: a whole model; otherwise the adapter by itself. Implied by `ollama` and `onnx`.
        dtype: `bf16`, `fp16` or `fp32` for a merged model; the format of the base's weights when None.
        verify: predict rows with run and export, and fail where they differ.
        verify_data: labelled rows for that; the run's validation rows when None.
        max_rows: only the first rows of `verify_data`.
        tolerance: share of rows that may differ.
        engine: `vllm`, to serve the export there and compare its answers, too.
        engine_python: of the environment that has it; this one when None.
        metrics: a `metrics.json` of `evaluate`, for the card.
        push: `hf:org/name` or `ms:org/name`.
        name: what servers call it; the folder's name when None.
        overwrite: replace an earlier export.

    Raises:
        ConfigError: options that do not go together, or optimum is missing.
        DataError: the rows to verify with, or the metrics file, cannot be used.
        HubError: the hub cannot be reached or refuses; the folder is complete.
        ModelError: the run or its base cannot be loaded, or not be exported this way.
        OutputError: the folder is not empty or cannot be written.
        ParityError: the export answers otherwise; nothing was exported.
        PromptError: the chat template cannot be written as a Modelfile.
    """
    merged = merged or ollama or onnx
    _check_options(merged, dtype, tolerance, push)
    _check_comparison(verify, verify_data, engine, engine_python)
    from labeltune.export import onnx as onnx_form

    exporter = onnx_form.exporter() if onnx else None  # before what takes seconds to import
    from labeltune.export import card
    from labeltune.export.folder import check_target, push_folder, whole_folder
    from labeltune.export.parity import check_parity
    from labeltune.inference.load import checkpoint_of

    info = RunInfo.load(checkpoint := checkpoint_of(run))
    target = Path(output).expanduser()
    check_target(target, checkpoint, overwrite, [given for given in (verify_data, metrics) if given])
    test_metrics = card.read_metrics(Path(metrics), info.task) if metrics is not None else None
    job = _prepare(checkpoint, info, target, merged=merged, dtype=dtype, ollama=ollama, push=push, name=name)
    rows = rows_to_verify(checkpoint, info, verify_data, max_rows, say) if verify else []
    with whole_folder(target) as folder:
        commands = job.write_model(folder, say)
        base = job.base if info.adapter else None
        parity, before = _verified(checkpoint, folder, base, job.dtype, rows, say=say, progress=progress)
        if parity is not None:
            say(f"parity in {job.dtype}: {parity}")
            check_parity(parity, tolerance, f"the exported {job.kind} ({job.dtype})")
        served = None
        if engine is not None:
            served = job.asked_of_engine(
                engine_python or sys.executable, folder, rows, before, say=say, progress=progress
            )
            say(f"parity in {engine}: {served}")
            check_parity(served, tolerance, f"the exported {job.kind} ({job.dtype}) in {engine}")
        if ollama:
            commands |= job.write_for_ollama(folder, say)
        if exporter is not None:
            begin("writing onnx/ (the parity gate has not seen it)", say)
            onnx_form.write_onnx(exporter, folder)
        job.describe(folder, test_metrics, parity, served)
    say(f"exported the {job.kind} to {target}")
    address = None
    if push is not None:
        begin(f"pushing to {push}", say)
        address = push_folder(target, push)
        say(f"pushed to {address}")
    return Exported(target, job.kind, job.dtype, parity, commands, address, served)


def _check_options(merged: bool, dtype: str | None, tolerance: float, push: str | None) -> None:
    from labeltune.export.folder import DTYPES, check_repo

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if not 0 <= tolerance < 1:
        raise ConfigError(f"--tolerance is a share of rows, from 0 to below 1, not {tolerance:g}")
    if dtype is not None and not merged:
        raise ConfigError("--dtype is for --merged; an adapter is exported as it was trained")
    if push is not None:
        check_repo(push)


def _check_comparison(
    verify: bool, verify_data: str | None, engine: str | None, engine_python: str | None
) -> None:
    from labeltune.export.engines import ENGINES, client_library

    if not verify and verify_data is not None:
        raise ConfigError("--verify and --no-verify contradict each other")
    if engine is not None and engine not in ENGINES:
        raise ConfigError(f"--engine must be one of {', '.join(ENGINES)}, not {engine!r}")
    if engine is None and engine_python is not None:
        raise ConfigError("--engine-python says where an engine is; name it with --engine")
    if engine is not None and not verify:
        raise ConfigError("--engine compares answers; leave out --no-verify")
    if engine is not None:
        client_library()


def _prepare(
    checkpoint: Path,
    info: RunInfo,
    target: Path,
    *,
    merged: bool,
    dtype: str | None,
    ollama: bool,
    push: str | None,
    name: str | None,
) -> _Job:
    """Look at the run and its base, and refuse what cannot be exported before anything is written."""
    from labeltune.export.merge import stored_dtype
    from labeltune.export.ollama import modelfile
    from labeltune.export.vllm import read_adapter
    from labeltune.inference.load import run_template
    from labeltune.models.hub import resolve_model

    if not info.adapter and not merged:
        raise ConfigError("this run trained all weights and has no adapter; export it with --merged")
    base = resolve_model(info.model, info.hub).folder if info.adapter else checkpoint
    adapter = None if merged else read_adapter(checkpoint)
    if adapter is not None and push is not None and not _found_by_others(info.model):
        raise ConfigError(
            f"the adapter's base is {info.model}, a folder of this machine that nobody else has; push the whole model "
            "(--merged), or train on a hub's model (ms: or hf:)"
        )
    template = run_template(checkpoint, info)
    return _Job(
        checkpoint,
        info,
        target,
        base=base,
        adapter=adapter,
        template=template,
        dtype=dtype or stored_dtype(base),  # type: ignore[arg-type]
        name=name or target.resolve().name,
        push=push,
        modelfile=modelfile(template, info.prompt.system or "", info.prompt.max_length) if ollama else None,
    )


@dataclass(frozen=True)
class _Job:
    """A run that is exported to `target`, and how.

    Attributes:
        base: folder of the base's weights; the checkpoint where it has all weights.
        adapter: what is exported; None for a whole model.
        name: what servers call it.
        modelfile: for Ollama; None when it is not asked for.
    """

    checkpoint: Path
    info: RunInfo
    target: Path
    base: Path
    adapter: Adapter | None
    template: ChatTemplate
    dtype: Dtype
    name: str
    push: str | None
    modelfile: str | None

    @property
    def kind(self) -> str:
        """What the folder holds."""
        return "merged model" if self.adapter is None else "adapter"

    @property
    def task(self) -> Task:
        """What the run does."""
        return make_task(self.info.task, self.info.labels, self.info.prompt, self.info.entities)

    @cached_property
    def request(self) -> dict[str, Any]:
        """The body of a request to vLLM, with a sample text."""
        from labeltune.export import vllm

        return vllm.request(self.task, self.template, self.name, self.info.generation.max_new_tokens)

    def write_model(self, folder: Path, say: Say) -> dict[str, str]:
        """Weights, and what labeltune needs to load them; returns the commands to run next."""
        from labeltune.export import merge, vllm
        from labeltune.inference.calibration import CALIBRATION_FILE, LINEAR_FILE, Calibration
        from labeltune.models.hub import published_shell

        info = self.info
        if self.adapter is None:
            adapter = self.checkpoint if info.adapter else None
            merging = adapter is not None
            begin(
                f"{'merging the adapter and ' if merging else ''}writing the whole model in {self.dtype}", say
            )
            model = merge.whole_model(self.base, adapter, self.dtype, info.runs_code())
            merge.save_whole_model(model, self.template, folder, self.base)
            command = vllm.merged_command(str(self.target), self.name, info.runs_code())
        else:
            name = vllm.base_name(info.model)
            published = published_shell(self.base, info.runs_code())
            vllm.save_adapter(
                self.checkpoint, self.template.tokenizer, name, info.hub.revision, folder, published
            )
            base = info.model if is_hub_name(info.model) else str(self.base)
            command = vllm.adapter_command(base, info.hub, str(self.target), self.name, self.adapter)
        for file in (CALIBRATION_FILE, LINEAR_FILE, SELECTION_FILE, TRAINING_FILE):
            if (self.checkpoint / file).is_file():
                shutil.copyfile(self.checkpoint / file, folder / file)
        write_json(folder / vllm.REQUEST_FILE, self.request)
        calibration = Calibration.load(self.checkpoint)
        told = vllm.client_file(self.task, self.template, self.name, info.prompt, calibration)
        if told is not None:
            write_json(folder / vllm.CLIENT_FILE, told)
        _public(info, self.adapter is None, self.push is not None).save(folder)
        return {"Serve with vLLM": command, "Ask it": vllm.request_command(self.target)}

    def write_for_ollama(self, folder: Path, say: Say) -> dict[str, str]:
        """A Modelfile, and GGUF where a converter is installed; returns the commands that are left."""
        from labeltune.export import ollama

        assert self.modelfile is not None
        write_text(folder / ollama.MODELFILE, self.modelfile)
        commands = {}
        converter = ollama.find_converter()
        if converter is None:
            say(
                f"no {ollama.CONVERTER} on PATH or in the folder LLAMA_CPP; convert the weights yourself before `ollama create`"
            )
            commands["Convert with llama.cpp"] = ollama.convert_command(self.target, self.dtype)
        else:
            begin(f"writing {ollama.GGUF_FILE} with {converter} (the parity gate has not seen it)", say)
            ollama.convert(converter, folder, self.dtype)
        commands["Add to Ollama"] = ollama.create_command(self.target, self.name)
        commands["Ask Ollama"] = ollama.ask_command(self.name, self.request["messages"][-1]["content"])
        return commands

    def asked_of_engine(
        self,
        python: str,
        folder: Path,
        rows: Sequence[Example],
        before: Sequence[Prediction],
        *,
        say: Say,
        progress: bool,
    ) -> Parity:
        """Serve the export with vLLM, and compare its answers with the run's.

        Raises:
            ConfigError: there is no row to ask about.
            ModelError: the engine does not start, or cannot be understood.
            ParityError: it ignores the adapter.
        """
        from labeltune.export import engines
        from labeltune.export.parity import compare_answers
        from labeltune.prompts.builder import PromptBuilder

        builder = PromptBuilder(self.task, self.template)
        fitting = engines.rows_that_fit(builder, rows)
        if not fitting:
            raise ConfigError(
                "--engine compares answers, and there are no rows; name some with --verify FILE"
            )
        if len(fitting) < len(rows):
            say(f"{len(rows) - len(fitting)} rows are left out, as a server does not shorten their texts")
        chosen, known = [rows[number] for number in fitting], [before[number] for number in fitting]
        extra = self.info.generation.max_new_tokens
        served = engines.Served(
            python,
            folder,
            None if self.adapter is None else self.base,
            self.name,
            self.dtype,
            1 if self.adapter is None else self.adapter.max_rank,
            2 * self.info.prompt.max_length + extra,
            self.info.runs_code(),
        )
        begin("starting vLLM with the export", say)
        with engines.running(served) as url, row_progress(len(chosen), "asking vLLM", progress) as advance:
            if served.base is not None:
                ids = builder.prompt(chosen[0]).ids
                engines.check_heard(url, self.name, str(self.template.tokenizer.decode(ids)))
            found = engines.answers(url, served, builder, chosen, extra, advance)
        return compare_answers(chosen, known, found)

    def describe(
        self,
        folder: Path,
        test_metrics: dict[str, Any] | None,
        parity: Parity | None,
        served: Parity | None,
    ) -> None:
        """The model card, and `export.json`."""
        from labeltune.export import card
        from labeltune.export.folder import EXPORT_FILE

        facts = card.Facts(
            self.name,
            self.kind,
            self.dtype,
            card.base_license(self.info.model, self.base),
            validation_metrics(self.checkpoint),
            test_metrics,
            parity,
            self.request["messages"],
            card.usage(self.info, self.adapter, self.modelfile is not None, self.push, self.name),
        )
        write_text(folder / card.CARD_FILE, card.card(self.info, facts))
        base = public_name(self.info.model)
        made = {"labeltune": __version__, "kind": self.kind, "dtype": self.dtype, "base": base}
        told = {"parity": parity, "engine_parity": served}
        write_json(
            folder / EXPORT_FILE, {**made, **{key: value and value.to_dict() for key, value in told.items()}}
        )


def _found_by_others(model: str) -> bool:
    from labeltune.models.pocket import POCKET_MODELS

    return is_hub_name(model) or model in POCKET_MODELS


def _public(info: RunInfo, merged: bool, pushed: bool) -> RunInfo:
    """`labeltune.json` of the export; one that others read, or that needs no base, names no folder of this machine."""
    if not merged and not pushed:
        return info
    hub = info.hub.model_copy(update={"cache_dir": None})
    test = info.data.get("test")
    data = {**info.data, "test": public_name(test)} if isinstance(test, str) else info.data
    model = public_name(info.model) if merged else info.model
    return info.model_copy(update={"hub": hub, "model": model, "adapter": not merged, "data": data})


def _verified(
    checkpoint: Path,
    folder: Path,
    base: Path | None,
    form: Dtype,
    rows: list[Example],
    *,
    say: Say,
    progress: bool,
) -> tuple[Parity | None, list[Prediction]]:
    """Run and export on the same rows, one after the other, in the precision of the export; and what the run answers."""
    if not rows:
        return None, []
    from labeltune.export.parity import compare_answers
    from labeltune.inference.calibration import Calibration

    begin(f"verifying {len(rows)} rows with the run and with the export, in {form}", say)
    before = _answers(checkpoint, base, form, rows, progress)
    after = _answers(folder, base, form, rows, progress)
    if Calibration.load(folder).linear:
        alone = compare_answers(rows, before, _answers(folder, base, form, rows, progress, linear=False))
        say(
            f"warning: the run adds a linear model's scores, which other engines do not: without them {alone}"
        )
    return compare_answers(rows, before, after), before


def _answers(
    folder: Path, base: Path | None, form: Dtype, rows: list[Example], progress: bool, linear: bool = True
) -> list[Prediction]:
    from labeltune.inference.load import load_predictor

    with load_predictor(folder, precision=form, base_folder=base) as predictor:
        if not linear:
            predictor.linear = None
        return list(track(predictor.stream(rows), len(rows), shown=progress))


def rows_to_verify(
    checkpoint: Path, info: RunInfo, data: str | None, max_rows: int | None, say: Callable[[str], None]
) -> list[Example]:
    """Rows of a file, else the run's validation rows, else none, which is said."""
    if data is not None:
        return labelled_rows(describe_run(checkpoint), data, "stop", max_rows).examples()
    file = validation_file(checkpoint, "predictions.jsonl")
    if file is None:
        say(
            "warning: nothing is verified: a run keeps its validation rows when it ends, and this one has none; name some with --verify FILE"
        )
        return []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        return [_example(json.loads(line), info) for line in lines if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is damaged ({type(error).__name__}: {error}); verify with --verify FILE"
        ) from error


def _example(row: dict[str, Any], info: RunInfo) -> Example:
    """A row of `predictions.jsonl`. Its candidates stand there by probability: they come back in the run's order."""
    found = [entry["label"] for entry in row.get("ranking", ())]
    order = {label: number for number, label in enumerate(info.labels)}
    candidates = sorted(found, key=lambda label: (order.get(label, len(order)), label))
    return Example(str(row["id"]), row["text"], tuple(candidates), source=str(row.get("source", "")))


def validation_metrics(checkpoint: Path) -> dict[str, Any] | None:
    """The run's figures on its validation rows, if this is the checkpoint they were measured with."""
    file = validation_file(checkpoint, "metrics.json")
    if file is None or (file.parents[1] / "best").resolve() != checkpoint.resolve():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is damaged: {error}") from error
