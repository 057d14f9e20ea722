"""`labeltune sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from labeltune.commands.options import Overrides
from labeltune.config import load_config
from labeltune.io.outputs import check_folder
from labeltune.sweep.space import Sweep


def sweep(
    *,
    config: Annotated[Path, typer.Argument(help="YAML config that all trials have in common.")],
    overrides: Overrides = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            help="A key and what to try: lora.r=4,8,16 or training.learning_rate=1e-5..1e-3:log; once for each key.",
            metavar="KEY=VALUES",
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="Finished trials in total, earlier calls included (20 when left out).")
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Run every combination of the choices.")] = False,
    workers: Annotated[int, typer.Option(help="Trials at the same time, each in a process of its own.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the sweep; output_dir with -sweep behind it when left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampler; trials train with training.seed.")] = 42,
) -> None:
    """Try values of config keys and compare the runs.

    They are compared on validation rows. The same command goes on after a stop.
    """
    asked = Sweep.of(
        load_config(config, overrides or []),
        search or [],
        trials=trials,
        grid=grid,
        workers=workers,
        output=output,
        seed=seed,
    )
    check_folder(asked.folder, [config, *asked.config.inputs()], ("trials.csv", "best.yaml", "study.db"))
    from labeltune.sweep.report import conclude
    from labeltune.sweep.run import run_sweep

    conclude(asked, run_sweep(asked))
