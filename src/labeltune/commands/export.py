"""`labeltune export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
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
    from labeltune.commands.quiet import quiet_libraries

    quiet_libraries()
    import labeltune

    done = labeltune.export(
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
        metrics=metrics,
        push=push,
        name=name,
        overwrite=overwrite,
    )
    for purpose, command in done.commands.items():
        print(f"# {purpose}\n{command}")
