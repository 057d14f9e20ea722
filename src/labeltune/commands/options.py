"""Options that several commands have in common, each declared once."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from labeltune.data.formats.write import PREDICTED
from labeltune.errors import ConfigError


class Command(TyperCommand):
    """A command that answers a misspelt option with the one that is meant, not with all that look like it."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context, with the options read."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except Exception as error:
            if possibilities := getattr(error, "possibilities", None):
                name = getattr(error, "option_name", "")
                error.possibilities = get_close_matches(name, possibilities, n=1)  # type: ignore[attr-defined]
            raise


def _stop_or_skip(given: str) -> str:
    if given not in ("stop", "skip"):
        raise ConfigError(f"--on-error must be stop or skip, not {given!r}")
    return given


Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to it: key=value ..., e.g. training.epochs=3", metavar="[KEY=VALUE]..."),
]
ResumeTraining = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
OverwriteRun = Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run's checkpoints first.")]
OnError = Annotated[str, typer.Option(help="Faulty rows: stop or skip.", callback=_stop_or_skip)]
MaxRows = Annotated[int | None, typer.Option(help="Only the first rows.", min=1)]
Labels = Annotated[str | None, typer.Option(help="The label set, between commas.")]
FiguresAsJson = Annotated[
    bool, typer.Option("--json", help="All figures as JSON, also with --output or on a terminal.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
Decoding = Annotated[str | None, typer.Option(help="exact or free; the run's own when missing.")]
Workers = Annotated[
    int | None,
    typer.Option(help="Models loaded side by side by ray; one a GPU, or one a machine without GPUs.", min=1),
]
Address = Annotated[str | None, typer.Option(help="A Ray cluster, e.g. auto; this machine when missing.")]


def _known_tool(given: str | None) -> str | None:
    if given is not None and given not in PREDICTED:
        raise ConfigError(f"--to {given}: it is one of {', '.join(PREDICTED)}")
    return given


Encoding = Annotated[
    str | None,
    typer.Option(help="Encoding of a text file, e.g. gb18030; that of the run's data when missing."),
]
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        help=f"Tasks with predictions for an annotation tool: {', '.join(PREDICTED)}.",
        callback=_known_tool,
    ),
]
