"""What `labeltune data check --report` adds to the audit (near-duplicates, labels that look wrong, tokens), and its page."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from labeltune.config import RunConfig
from labeltune.data import label_issues, near_duplicates
from labeltune.data.check import Audit
from labeltune.data.label_issues import LabelIssues, find_label_issues
from labeltune.data.loading import Rows, stratified_split
from labeltune.data.near_duplicates import NearDuplicates, find_near_duplicates
from labeltune.data.schemas import FAULT_KINDS
from labeltune.errors import MissingExtraError, OutputError, PromptError
from labeltune.evaluation.label_doubts import Doubt, Judged, find_doubts
from labeltune.evaluation.pages import render
from labeltune.io.outputs import check_file, is_stream
from labeltune.models.text_vectors import text_vectors
from labeltune.prompts.builder import builder_for_base
from labeltune.training.token_figures import TokenFigures, token_figures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Pairs and rows listed in JSON; all of them are counted.
MAX_LISTED = 10_000
NO_TOKENIZER = (
    "No tokenizer was at hand, so tokens were not counted. Name one: --tokenizer FOLDER, or a model such as "
    "--tokenizer ms:qwen/Qwen2-1.5B-Instruct, which is fetched."
)
#: Pairs, label issues and faults of a kind that the page lists; the counts are always whole.
MAX_SHOWN = 200
_FAULTS_SHOWN = 20
_BINS = 12


@dataclass(frozen=True)
class DataReport:
    """All findings of a report.

    Attributes:
        files: rows and audit of each file: train, then validation and test where they are given.
        near: near-duplicates inside and across the files.
        split_pairs: near-duplicate pairs of the training file that the held-out split puts on both sides; None when
            nothing is held out of it.
        label_issues: None for NER, whose labels are not judged.
        tokens: tokens of the training file; None when they could not be counted.
        no_tokens: why not, and what to do about it.
        doubts: rows of the training file that a tuned model contradicts; None where none was asked.
        judged: rows that it judged.
    """

    files: tuple[Rows, ...]
    near: NearDuplicates
    split_pairs: int | None
    label_issues: LabelIssues | None
    tokens: TokenFigures | None
    no_tokens: str
    doubts: tuple[Doubt, ...] | None = None
    judged: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; at most `MAX_LISTED` pairs and issues are listed."""
        return {
            "near_duplicates": {**self.near.to_dict(MAX_LISTED), "pairs_on_both_sides": self.split_pairs},
            "suspects": self.label_issues.to_dict(MAX_LISTED) if self.label_issues is not None else None,
            "tokens": self.tokens.to_dict() if self.tokens is not None else None,
            "no_tokens": self.no_tokens or None,
            **self._doubts(),
        }

    def _doubts(self) -> dict[str, Any]:
        if self.doubts is None:
            return {}
        listed = [doubt.to_dict() for doubt in self.doubts[:MAX_LISTED]]
        return {"doubts": {"judged_rows": self.judged, "doubts": len(self.doubts), "listed": listed}}


def check_report(path: Path, inputs: Sequence[str] = ()) -> None:
    """Find out before the work whether a report can be made and written; `inputs` are what it is about.

    Raises:
        MissingExtraError: datasketch or cleanlab is not installed.
        OutputError: the path is an input or a folder, or its own folder cannot be made.
    """
    if any(importlib.util.find_spec(name) is None for name in ("datasketch", "cleanlab")):
        raise MissingExtraError("labeltune data check --report", "audit")
    check_file(path, inputs)
    if is_stream(path):
        return
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error


def make_report(
    files: Sequence[Rows],
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model: Path | None = None,
    progress: bool = False,
    judged: Sequence[Judged] | None = None,
) -> DataReport:
    """Compare, judge and count.

    Args:
        files: the audited files, the training file first; none of them is changed.
        tokenizer: a fast tokenizer; None to leave tokens out.
        model: the tokenizer's folder; where it holds weights, their input embeddings help to judge labels.
        judged: the rows of the training file as a tuned model sees them.

    Raises:
        OutputError: the cache folder, where tokens are kept, cannot be written.
    """
    near = find_near_duplicates(files, progress)
    issues = None
    if config.task == "classification":
        vectors = text_vectors(model, tokenizer) if model is not None and tokenizer is not None else None
        issues = find_label_issues(files, vectors, progress)
    tokens, no_tokens = _tokens(files[0], config, tokenizer)
    split_pairs = _split_pairs(files[0], config, near)
    doubts = None if judged is None else tuple(find_doubts(judged, near.pairs))
    return DataReport(tuple(files), near, split_pairs, issues, tokens, no_tokens, doubts, len(judged or ()))


def _tokens(
    rows: Rows, config: RunConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[TokenFigures | None, str]:
    """The figures, or why there are none."""
    if tokenizer is None:
        return None, NO_TOKENIZER
    if not rows.audit.usable:
        return None, f"{rows.audit.path} holds no usable row."
    try:
        builder = builder_for_base(config, rows.audit.label_set(config.data.labels), tokenizer)
        return token_figures(rows.dataset, builder, config.training), ""
    except PromptError as error:
        # Training would stop here; the rest of the report is no worse for it.
        return None, f"Training would stop with this error: {error}"


def _split_pairs(rows: Rows, config: RunConfig, near: NearDuplicates) -> int | None:
    """How many pairs inside the training file a run with this config tears apart, as `load_splits` would."""
    data = config.data
    if data.validation is not None or data.validation_fraction == 0:
        return None
    held_out = {int(row) for row in stratified_split(rows, data.validation_fraction, config.training.seed)}
    inside = (pair.rows for pair in near.pairs if pair.files == (0, 0))
    return sum((row in held_out) != (like in held_out) for row, like in inside)


def data_page(report: DataReport) -> str:
    """The whole page. It is valid UTF-8 whatever stands in paths and messages."""
    shares = report.tokens.cut_shares if report.tokens else ()
    html = render(
        "data.html.j2",
        report=report,
        fault_kinds=FAULT_KINDS,
        faults_shown=_FAULTS_SHOWN,
        length_bins=_length_bins,
        percentiles=_percentiles,
        cut_bins=[(f"≤ {10 * (at + 1)}%", count) for at, count in enumerate(shares)],
        most_shown=MAX_SHOWN,
        limits={
            "ngram": near_duplicates.NGRAM,
            "threshold": near_duplicates.THRESHOLD,
            "compared_characters": near_duplicates.MAX_CHARACTERS,
            "judged_characters": label_issues.MAX_CHARACTERS,
            "judged_texts": label_issues.MIN_TEXTS,
        },
    )
    return html.encode("utf-8", "backslashreplace").decode("utf-8")


def _percentiles(values: Mapping[str, int]) -> str:
    return ", ".join(f"{value:,} ({key})" for key, value in values.items())


def _length_bins(audit: Audit) -> list[tuple[str, int]]:
    """Equal bins up to the 99th percentile, and one for what is longer."""
    lengths = numpy.frombuffer(audit.lengths, dtype=numpy.uint32)
    top = max(1, int(numpy.percentile(lengths, 99)))
    step = -(-(top + 1) // _BINS)
    edges = [*range(0, top + 1, step)]
    edges.append(edges[-1] + step)
    counts, _ = numpy.histogram(lengths, bins=[*edges, max(edges[-1], int(lengths.max())) + 1])
    names = [f"{a}–{b - 1}" if b - a > 1 else str(a) for a, b in pairwise(edges)]
    bins = list(zip([*names, f"≥ {edges[-1]}"], map(int, counts), strict=True))
    return bins if bins[-1][1] else bins[:-1]
