"""The data report as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy

from labeltune.data import label_issues, near_duplicates
from labeltune.data.check import Audit
from labeltune.data.schemas import FAULT_KINDS, Fault
from labeltune.evaluation.data_report import DataReport
from labeltune.evaluation.pages import render

#: Pairs, label issues and faults of a kind that the page lists; the counts are always whole.
MAX_SHOWN = 200
_FAULTS_SHOWN = 20
_BINS = 12


def data_page(report: DataReport) -> str:
    """The whole page. It is valid UTF-8 whatever stands in paths and messages."""
    shares = report.tokens.cut_shares if report.tokens else ()
    html = render(
        "data.html.j2",
        report=report,
        fault_kinds=FAULT_KINDS,
        listed_faults=_listed_faults,
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


def _listed_faults(audit: Audit) -> list[Fault]:
    """The first faults of each kind, in the file's order."""
    shown: dict[str, int] = {}
    listed = []
    for fault in audit.faults:
        shown[fault.kind] = shown.get(fault.kind, 0) + 1
        if shown[fault.kind] <= _FAULTS_SHOWN:
            listed.append(fault)
    return listed


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
