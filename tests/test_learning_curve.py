"""How a metric grows with rows: the fit, the parts, and a run with its curve in the report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from helpers.commands import command
from helpers.rows import classification_rows, read_jsonl, write_jsonl
from helpers.training import config_for
from labeltune.evaluation.learning_curve import Point, foretell, parts_of, stratified_order


def test_a_power_law_is_found_again() -> None:
    points = [
        Point(n, 1 - 2 * n**-0.5, 1 - 2 * n**-0.5 - 0.01, 1 - 2 * n**-0.5 + 0.01) for n in (50, 100, 200, 400)
    ]
    found = foretell(points, 800)
    assert found.value == pytest.approx(1 - 2 * 800**-0.5, abs=1e-9) and not found.measured
    assert found.low < found.value < found.high < found.low + 0.03
    wide = foretell([Point(p.rows, p.value, p.value - 0.1, p.value + 0.1) for p in points], 800)
    assert wide.high - wide.low > 2 * (found.high - found.low)


def test_more_rows_are_never_foretold_to_harm() -> None:
    falling = [Point(50, 0.9, 0.88, 0.92), Point(100, 0.85, 0.83, 0.87), Point(200, 0.8, 0.78, 0.82)]
    found = foretell(falling, 400)
    assert 0.8 < found.value < 0.9
    perfect = foretell([Point(50, 1.0, 1.0, 1.0), Point(100, 1.0, 1.0, 1.0)], 200)
    assert perfect.value > 0.99


def test_parts_are_stratified_beginnings_of_one_order() -> None:
    assert parts_of(400, 8) == [50, 100, 200] and parts_of(40, 8) == [10, 20] and parts_of(10, 8) == []
    strata = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    order = stratified_order(strata, 0)
    assert sorted(order) == list(range(100))
    for size in (10, 20, 50):
        counts = Counter(strata[number] for number in order[:size])
        for label, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
            assert abs(counts[label] - share * size) <= 1.5, (size, counts)
    assert list(stratified_order(strata, 0)) == list(order) != list(stratified_order(strata, 1))


def test_a_run_with_its_curve(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(in_folder, model_folder)
    rows = write_jsonl(in_folder / "many.jsonl", classification_rows(80))
    asked = [
        "train",
        "--data",
        str(rows),
        "--model",
        str(model_folder),
        "output_dir=curve",
        "tracking=none",
        "training.epochs=1",
        "data.validation_fraction=0.2",
    ]
    done = command(monkeypatch, capsys, *asked, "--learning-curve")
    assert done.code == 0, done.err
    assert config.task == "classification"
    folder = Path("curve")
    figures = json.loads((folder / "validation" / "metrics.json").read_text(encoding="utf-8"))
    points = figures["learning_curve"]["points"]
    sizes = [point["rows"] for point in points]
    total = sizes[-2]
    assert sizes == [total // 8, total // 4, total // 2, total, 2 * total] and not points[-1]["measured"]
    assert figures["learning_curve"]["metric"] == "macro_f1" and f"{total}: " in done.err
    # Each part is a beginning of the next, and all are validated on the same rows.
    parts = [
        {row["id"] for row in read_jsonl(folder / "learning-curve" / f"{size}.jsonl")} for size in sizes[:3]
    ]
    assert parts[0] < parts[1] < parts[2]
    own = json.loads(
        (folder / "learning-curve" / str(sizes[0]) / "validation" / "metrics.json").read_text(
            encoding="utf-8"
        )
    )
    assert own["rows"] == figures["rows"] and own["macro_f1"]["value"] == pytest.approx(
        points[0]["value"], abs=1e-4
    )
    page = (folder / "validation" / "report.html").read_text(encoding="utf-8")
    assert 'id="learning-curve"' in page and page.count('class="whisker"') == 5
    again = command(monkeypatch, capsys, *asked, "--learning-curve", "--resume")
    assert again.code == 0 and again.err.count("nothing to do: all") == 4, again.err
    few = write_jsonl(in_folder / "few.jsonl", classification_rows(20))
    refused = command(
        monkeypatch, capsys, "train", "--data", str(few), "--model", str(model_folder), "--learning-curve"
    )
    assert refused.code == 2 and "--learning-curve cuts the training rows" in refused.err
