"""What a sweep tries: searches read from text, and everything that is refused before the first trial."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.sweeps import config_for
from labeltune.errors import ConfigError
from labeltune.sweep.run import trial_config
from labeltune.sweep.space import Choices, Range, SearchSpace, Sweep, parse_search


@given(st.integers(-1000, 1000), st.integers(1, 1000))
def test_ranges_of_whole_numbers(low: int, width: int) -> None:
    assert parse_search(f"lora.r={low}..{low + width}") == Range("lora.r", low, low + width, True, False)


@given(
    st.floats(1e-300, 1e300, exclude_max=True).filter(lambda x: not repr(x).endswith("inf")),
    st.floats(1.001, 1e3),
    st.booleans(),
)
def test_ranges_of_fractions(low: float, factor: float, log: bool) -> None:
    found = parse_search(f"training.learning_rate = {low!r}..{low * factor!r}{':log' if log else ''}")
    assert found == Range("training.learning_rate", low, low * factor, False, log)
    assert parse_search(f"training.learning_rate={found}") == found


@given(st.lists(st.text("abc01.-/", min_size=1).filter(lambda t: ".." not in t), min_size=1, max_size=5))
def test_choices_are_kept_as_written(texts: list[str]) -> None:
    assert parse_search("model=" + ", ".join(texts)) == Choices("model", tuple(texts))


def test_commas_inside_brackets_and_quotes_belong_to_the_value() -> None:
    found = parse_search('lora.target_modules=[q_proj, v_proj],all-linear,"a,b"')
    assert found == Choices("lora.target_modules", ("[q_proj, v_proj]", "all-linear", '"a,b"'))


@pytest.mark.parametrize(
    ("search", "part"),
    [
        ("lora.r", "must look like key=a,b,c or key=low..high"),
        ("lora.r=", "must look like"),
        ("lora.r=4,,8", "empty value"),
        ("lora.r=8..4", "the first number must be the smaller one"),
        ("lora.r=0..8:log", "must begin above 0"),
        ("lora.r=4,8:log", ":log belongs behind a range"),
        ("training.weight_decay=0.0..1e999", "must be finite"),
        ("training.learning_rat=1e-4,1e-3", "did you mean 'training.learning_rate'?"),
        ("training=1,2", "this is a section"),
        ("model.name=1,2", "model is a value, not a section"),
        ("lora.r=4,many", "--search lora.r=many: lora.r: "),
        ("lora.r=0..8", "--search lora.r=0: lora.r: "),
        ("lora.r=4.0..8.0", "this key takes whole numbers"),
        ("lora.dropout=0.1..1.0", "--search lora.dropout=1.0: "),
        ("lora.r=8,4,8.0", "8.0 is given twice"),
        ("data.max_rows=4,8", "the same in all of them"),
        ("output_dir=a,b", "the same in all of them"),
        ("training.seed=1,2", "the seed also picks the validation rows"),
    ],
)
def test_refused_before_anything_starts(in_folder: Path, search: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sweep.of(config_for(in_folder), [search])
    assert part in str(caught.value)


def test_options_that_do_not_agree(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(in_folder)
    two = ["lora.r=4,8"]
    for searches, options, part in (
        ([], {}, "needs --search"),
        (["lora.r=4,8", "lora.r=16"], {}, "given twice"),
        (["lora.r=4..8"], {"grid": True}, "a grid needs choices"),
        (two, {"grid": True, "trials": 3}, "leave --trials out"),
        (two, {"trials": 0}, "--trials must be at least 1"),
        (two, {"workers": 0}, "--workers must be at least 1"),
        (two, {"seed": -1}, "--seed"),
        ([f"training.epochs={','.join(map(str, range(1, 1002)))}"], {"grid": True}, "1001 combinations"),
    ):
        with pytest.raises(ConfigError, match=part):
            Sweep.of(config, searches, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="on validation rows"):
        Sweep.of(config_for(in_folder, data={"train": "train.jsonl", "validation_fraction": 0}), two)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        Sweep.of(config, two)


def test_combinations_are_all_there_once(in_folder: Path) -> None:
    sweep = Sweep.of(config_for(in_folder), ["lora.r=4,8", "lora.dora=true,false"], grid=True)
    assert sweep.trials == 4 and sweep.folder == Path("out-sweep")
    assert sweep.space.combinations() == [
        {"lora.r": "4", "lora.dora": "true"},
        {"lora.r": "4", "lora.dora": "false"},
        {"lora.r": "8", "lora.dora": "true"},
        {"lora.r": "8", "lora.dora": "false"},
    ]


def test_a_trial_has_a_folder_and_an_experiment_of_its_own(in_folder: Path) -> None:
    config = config_for(in_folder)
    values = {"training.learning_rate": "0.000123456789", "lora.target_modules": "[q_proj, v_proj]"}
    trial = trial_config(config, Path("my/sweep"), 7, values)
    assert trial.output_dir == "my/sweep/trial-0007" and trial.swanlab.group == "sweep"
    assert trial.training.learning_rate == 0.000123456789
    assert trial.lora.target_modules == ("q_proj", "v_proj")
    assert (
        trial.swanlab.experiment
        == "trial-0007 training.learning_rate=0.0001235 lora.target_modules=[q_proj, v_proj]"
    )
    named = config.model_copy(update={"swanlab": config.swanlab.model_copy(update={"group": "mine"})})
    assert trial_config(named, Path("my/sweep"), 7, values).swanlab.group == "mine"


@pytest.mark.parametrize(("seed", "begun"), [(0, 0), (1, 10), (42, 70), (2**40, 0), (2**40, 70)])
def test_the_first_trials_cover_every_range(seed: int, begun: int) -> None:
    """The first n of a round lie one in each n-th of a range, for every n; choices take turns."""
    searches = (
        "training.learning_rate=1e-5..1e-3:log",
        "lora.dropout=0.1..0.5",
        "lora.r=1..60",
        "lora.alpha=4,8",
        "training.batch_size=8,16,32",
    )
    space = SearchSpace(tuple(parse_search(search) for search in searches))
    trials = [space.covering_values(seed, begun + n) for n in range(10)]
    rates = [math.log10(trial["training.learning_rate"] / 1e-5) / 2 for trial in trials]
    dropouts = [(trial["lora.dropout"] - 0.1) / 0.4 for trial in trials]
    ranks = [(trial["lora.r"] - 0.5) / 60 for trial in trials]
    assert all(isinstance(trial["lora.r"], int) for trial in trials)
    for n in range(1, 11):
        for shares in (rates, dropouts):
            assert sorted(int(share * n) for share in shares[:n]) == list(range(n)), n
    for n in (2, 3, 4, 5, 6, 10):  # sixty whole numbers can be cut into as many equal parts
        assert sorted(int(share * n) for share in ranks[:n]) == list(range(n)), n
    for n in range(0, 10, 2):
        assert {trial["lora.alpha"] for trial in trials[:2]} == {"4", "8"}
        assert set(Counter(trial["lora.alpha"] for trial in trials[: n + 2]).values()) == {n // 2 + 1}
    for n in (3, 6, 9):
        assert set(Counter(trial["training.batch_size"] for trial in trials[:n]).values()) == {n // 3}
    assert trials == [space.covering_values(seed, begun + n) for n in range(10)], "the same for a seed"
    assert trials != [space.covering_values(seed + 1, begun + n) for n in range(10)]


@pytest.mark.parametrize(
    ("search", "low", "high"),
    [
        ("a=1..3", 1, 3),
        ("a=1..1024:log", 1, 1024),
        ("a=1e-300..1e300:log", 1e-300, 1e300),
        ("a=-1e308..1e308", -1e308, 1e308),
    ],
)
def test_values_stay_in_their_range(search: str, low: float, high: float) -> None:
    space = SearchSpace((parse_search(search),))
    values = [space.covering_values(seed, n)["a"] for seed in range(20) for n in range(10)]
    assert all(low <= value <= high for value in values)
    if search == "a=1..3":
        assert set(values) == {1, 2, 3}
    if search == "a=1..1024:log":
        assert 70 < sum(value < 32 for value in values) < 130, "half of the trials, as half of the magnitudes"
