"""`labeltune export`: from a run to a folder that others load, whose answers are compared with the run's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from labeltune.commands.evaluate import describe_run, labelled_rows
from labeltune.errors import ConfigError, DataError
from labeltune.io.progress import Say, begin, phase, tell
from labeltune.io.run_folder import RunInfo, validated_row, validation_file
from labeltune.messages import localize
from labeltune.types import Example

if TYPE_CHECKING:
    from labeltune.export.folder import Asked, Exported


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
    gguf: Annotated[
        str | None,
        typer.Option(
            help="f32, bf16, f16, q8_0 or q4_k_m: GGUF too, by llama.cpp, whose server is then asked the same rows."
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="vllm, llama.cpp, ollama or transformers: serve the export there, and compare its answers to the same rows, too."
        ),
    ] = None,
    engine_python: Annotated[
        str | None,
        typer.Option(
            help="Python of the environment that has vLLM or transformers, or what llama.cpp's converters need; this one when left out."
        ),
    ] = None,
    engine_url: Annotated[
        str | None,
        typer.Option(
            help="Address of an engine that serves such an export already, instead of starting one."
        ),
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
            gguf=gguf,
            engine=engine,
            engine_python=engine_python,
            engine_url=engine_url,
            metrics=metrics,
            push=push,
            name=name,
            overwrite=overwrite,
        )
    for purpose, command in done.commands.items():
        print(f"# {localize(purpose)}\n{command}")


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
    gguf: str | None = None,
    engine: str | None = None,
    engine_python: str | None = None,
    engine_url: str | None = None,
    metrics: str | os.PathLike[str] | None = None,
    push: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    say: Say = tell,
    progress: bool = True,
) -> Exported:
    """Write a run in a form that transformers, vLLM, llama.cpp, Ollama or ONNX Runtime load, and check that it answers alike.

    Args:
        run: a run folder, a checkpoint, or one on a hub.
        output: folder to make; it appears whole or not at all.
        merged: a whole model; otherwise the adapter by itself. Implied by `ollama` and `onnx`.
        dtype: `bf16`, `fp16` or `fp32` for a merged model; the format of the base's weights when None.
        verify: predict rows with run and export, and fail where they differ.
        verify_data: labelled rows for that; the run's validation rows when None.
        max_rows: only the first rows of `verify_data`.
        tolerance: share of rows that may differ.
        gguf: `f32`, `bf16`, `f16`, `q8_0` or `q4_k_m`: GGUF too; its engine is asked unless `verify` is false.
        engine: `vllm`, `llama.cpp`, `ollama` or `transformers`, to serve the export there and compare its answers, too.
        engine_python: of the environment that has vLLM or transformers, or what llama.cpp's converters need; this one when None.
        engine_url: of a server that serves such an export already; one is started when None.
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
    from labeltune.export import onnx as onnx_form
    from labeltune.export.folder import Asked, check_target, push_folder, whole_folder

    engine = engine or ("llama.cpp" if gguf is not None and verify else None)
    ollama = ollama or engine == "ollama"
    merged = merged or ollama or onnx
    asked = Asked(
        merged=merged,
        dtype=dtype,
        ollama=ollama,
        onnx=onnx,
        gguf=gguf,
        engine=engine,
        python=engine_python,
        url=engine_url,
        push=push,
        name=name,
        tolerance=tolerance,
    )
    _check(asked, verify, verify_data)
    exporter = onnx_form.exporter() if onnx else None  # before what takes seconds to import
    from labeltune.export import card
    from labeltune.export.job import prepare
    from labeltune.inference.load import checkpoint_of

    info = RunInfo.load(checkpoint := checkpoint_of(run))
    target = Path(output).expanduser()
    check_target(target, checkpoint, overwrite, [given for given in (verify_data, metrics) if given])
    test_metrics = card.read_metrics(Path(metrics), info.task) if metrics is not None else None
    job = prepare(checkpoint, info, target, asked)
    rows = rows_to_verify(checkpoint, info, verify_data, max_rows, say) if verify else []
    if engine is not None and not rows:
        raise ConfigError(
            "--engine and --gguf compare answers, and there are no rows; name some with --verify FILE, or write GGUF unseen with --no-verify"
        )
    with whole_folder(target) as folder:
        done = job.write(folder, rows, test_metrics, exporter, say, progress)
    say(f"exported the {job.kind} to {target}")
    if push is None:
        return done
    begin(f"pushing to {push}", say)
    address = push_folder(target, push)
    say(f"pushed to {address}")
    return replace(done, address=address)


def _check(asked: Asked, verify: bool, verify_data: str | None) -> None:
    from labeltune.export.folder import DTYPES, check_repo

    if asked.dtype is not None and asked.dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, not {asked.dtype!r}")
    if not 0 <= asked.tolerance < 1:
        raise ConfigError(f"--tolerance is a share of rows, from 0 to below 1, not {asked.tolerance:g}")
    if asked.dtype is not None and not asked.merged:
        raise ConfigError("--dtype is for --merged; an adapter is exported as it was trained")
    if asked.push is not None:
        check_repo(asked.push)
    if not verify and verify_data is not None:
        raise ConfigError("--verify and --no-verify contradict each other")
    _check_engine(asked, verify)


def _check_engine(asked: Asked, verify: bool) -> None:
    from labeltune.export.engines import ENGINES, check_address, client_library
    from labeltune.export.llama_cpp import TYPES

    engine, gguf = asked.engine, asked.gguf
    if gguf is not None and gguf not in TYPES:
        raise ConfigError(f"--gguf must be one of {', '.join(TYPES)}, not {gguf!r}")
    if engine is not None and engine not in ENGINES:
        raise ConfigError(f"--engine must be one of {', '.join(ENGINES)}, not {engine!r}")
    if engine is None and gguf is None and not asked.ollama and asked.python is not None:
        raise ConfigError("--engine-python says where an engine is; name it with --engine")
    if asked.url is not None and (engine is None or gguf is not None):
        raise ConfigError(
            "--engine-url says where an engine runs that serves such an export already; name it with --engine, and leave out --gguf"
        )
    if engine is not None and not verify:
        raise ConfigError("--engine compares answers; leave out --no-verify")
    if gguf is not None and engine in ("vllm", "transformers"):
        raise ConfigError(
            f"--gguf is for llama.cpp and Ollama, and {engine} is not served GGUF; export twice"
        )
    if engine is not None:
        client_library()
    if asked.url is not None:
        check_address(asked.url)


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
        return [validated_row(json.loads(line), info.task, info.labels) for line in lines if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is damaged ({type(error).__name__}: {error}); verify with --verify FILE"
        ) from error
