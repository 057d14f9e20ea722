"""What a sweep tries: choices and ranges of config keys, checked against the config before anything starts."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from labeltune.config import RunConfig, build_config, config_keys
from labeltune.config_values import apply_override
from labeltune.distributed import world_size
from labeltune.errors import ConfigError

#: Finished trials when nothing else is said.
DEFAULT_TRIALS = 20
#: Trials that cover the space evenly before earlier results decide what comes next.
STARTUP_TRIALS = 10
#: A grid is for a few values of a few keys.
MOST_COMBINATIONS = 1000

#: What a trial cannot change: where it is kept and shown, and the rows that the trials are compared on.
_FIXED_SECTIONS = ("task", "output_dir", "tracking", "hub", "data", "swanlab")
_NUMBER = r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(:log)?")
_INTEGER = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class Choices:
    """Values of a key, as they were written; each is read like the value of a `key=value` override."""

    key: str
    texts: tuple[str, ...]

    def __str__(self) -> str:
        return ",".join(self.texts)


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included; whole numbers only when `integer`."""

    key: str
    low: float
    high: float
    integer: bool
    log: bool

    def __str__(self) -> str:
        return f"{self.low!r}..{self.high!r}{':log' if self.log else ''}"


Dimension = Choices | Range
#: Of a trial: the text of a choice, or a number.
Value = str | float


@dataclass(frozen=True)
class SearchSpace:
    """The keys of a sweep with their values, at least one, each key once."""

    dimensions: tuple[Dimension, ...]

    @property
    def keys(self) -> list[str]:
        """The keys, in the order in which they were given."""
        return [dimension.key for dimension in self.dimensions]

    def combinations(self) -> list[dict[str, str]]:
        """All combinations of the choices, the last key changing fastest.

        Raises:
            ConfigError: a range is among the dimensions, or there are far too many combinations.
        """
        for dimension in self.dimensions:
            if isinstance(dimension, Range):
                raise ConfigError(
                    f"--search {dimension.key}={dimension}: a grid needs choices (a,b,c); leave --grid out to sample a range"
                )
        texts = [dimension.texts for dimension in self.dimensions if isinstance(dimension, Choices)]
        count = math.prod(map(len, texts))
        if count > MOST_COMBINATIONS:
            raise ConfigError(f"--grid: these are {count} combinations; leave --grid out and set --trials")
        return [dict(zip(self.keys, values, strict=True)) for values in itertools.product(*texts)]

    def covering_values(self, seed: int, number: int) -> dict[str, Value]:
        """Values of a trial that no earlier result decides.

        Of the first n trials, for every n up to `STARTUP_TRIALS`, exactly one lies in each n-th of every range (of its
        logarithm with `:log`), and of k choices each is taken once among the first k. Later numbers begin a new round.

        Args:
            number: trials begun before this one; the same number gets the same values, whenever the sweep was stopped.
        """
        round_, place = divmod(number, STARTUP_TRIALS)
        points = _covering(seed, round_, len(self.dimensions))[place]
        return {d.key: _value_at(d, float(u)) for d, u in zip(self.dimensions, points, strict=True)}


@dataclass(frozen=True)
class Sweep:
    """A sweep that has been checked.

    Attributes:
        config: what all trials have in common.
        grid: every combination of the choices, instead of samples.
        trials: finished trials in total, those of earlier calls included.
        workers: processes that train at the same time.
        seed: of the sampler; trials train with `config.training.seed`.
    """

    config: RunConfig
    space: SearchSpace
    grid: bool
    trials: int
    workers: int
    folder: Path
    seed: int

    @classmethod
    def of(
        cls,
        config: RunConfig,
        searches: Sequence[str],
        *,
        trials: int | None = None,
        grid: bool = False,
        workers: int = 1,
        output: Path | None = None,
        seed: int = 42,
    ) -> Sweep:
        """Check everything that can be checked without data and model.

        Args:
            searches: `key=a,b,c` or `key=low..high[:log]`, one for each key.
            trials: finished trials in total; 20 when None, all combinations with `grid`.
            output: folder of the sweep; `output_dir` with `-sweep` behind it when None.

        Raises:
            ConfigError: an unknown key (with a suggestion), a value that the config refuses, or options that do not agree.
        """
        if not searches:
            raise ConfigError("a sweep needs --search KEY=VALUES, e.g. --search lora.r=4,8,16")
        space = SearchSpace(tuple(parse_search(text) for text in searches))
        if grid:
            if trials is not None:
                raise ConfigError("--grid runs every combination; leave --trials out")
            trials = len(space.combinations())
        elif trials is None:
            trials = DEFAULT_TRIALS
        for number, dimension in enumerate(space.dimensions):
            if dimension.key in space.keys[:number]:
                raise ConfigError(f"--search {dimension.key} is given twice; write its values in one")
            check_dimension(config, dimension)
        if config.data.validation is None and config.data.validation_fraction == 0:
            raise ConfigError(
                "a sweep compares trials on validation rows, and this config has none; set data.validation or "
                "data.validation_fraction"
            )
        for name, number in (("--trials", trials), ("--workers", workers)):
            if number < 1:
                raise ConfigError(f"{name} must be at least 1, not {number}")
        if seed < 0:
            raise ConfigError(f"--seed must be at least 0, not {seed}")
        if world_size() > 1:
            raise ConfigError(
                "a sweep starts its own processes (--workers); run it without torchrun or accelerate"
            )
        folder = output if output is not None else Path(config.output_dir.rstrip("/") + "-sweep")
        return cls(config, space, grid, trials, workers, folder, seed)


def parse_search(text: str) -> Dimension:
    """Read `key=a,b,c` or `key=low..high[:log]`.

    Raises:
        ConfigError: it is neither.
    """
    key, separator, values = (part.strip() for part in text.partition("="))
    if not separator or not key or not values:
        raise ConfigError(f"--search {text!r} must look like key=a,b,c or key=low..high, e.g. lora.r=4,8,16")
    found = _RANGE.fullmatch(values)
    if found is not None:
        return _range(key, found[1], found[2], log=found[3] is not None)
    if values.endswith(":log"):
        raise ConfigError(f"--search {text}: :log belongs behind a range of numbers, e.g. 1e-5..1e-3:log")
    texts = tuple(part.strip() for part in _split(values))
    if not all(texts):
        raise ConfigError(f"--search {text}: there is an empty value between the commas")
    return Choices(key, texts)


def _range(key: str, first: str, last: str, *, log: bool) -> Range:
    integer = all(_INTEGER.fullmatch(end) for end in (first, last))
    low, high = (int(first), int(last)) if integer else (float(first), float(last))
    where = f"--search {key}={first}..{last}"
    if not low < high:
        raise ConfigError(f"{where}: the first number must be the smaller one")
    if not high < float("inf"):
        raise ConfigError(f"{where}: the numbers must be finite")
    if log and low <= 0:
        raise ConfigError(f"{where}:log must begin above 0")
    return Range(key, low, high, integer, log)


def _split(values: str) -> Iterator[str]:
    """The parts between commas, those inside brackets and quotes left alone."""
    depth, quote, begin = 0, "", 0
    for at, character in enumerate(values):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth <= 0:
            yield values[begin:at]
            begin = at + 1
    yield values[begin:]


def check_dimension(config: RunConfig, dimension: Dimension) -> None:
    """Try the values of a key on the config: all choices; of a range both ends and, of fractions, a point between them.

    Raises:
        ConfigError: the key is unknown or fixed in a sweep, a value is refused, or two choices mean the same.
    """
    key = dimension.key
    known = {name for name, *_ in config_keys()}
    if any(name.startswith(f"{key}.") for name in known):
        raise ConfigError(f"--search {key}: this is a section; name one of its keys")
    if key not in known:
        # The config's own error comes with a suggestion.
        with_values(config, {key: "0"}, f"--search {key}")
    if key.split(".")[0] in _FIXED_SECTIONS:
        raise ConfigError(
            f"--search {key}: trials can only be compared when this key is the same in all of them"
        )
    if key == "training.seed" and config.data.validation is None:
        raise ConfigError(
            "--search training.seed: the seed also picks the validation rows, so trials could not be compared; "
            "set data.validation"
        )
    texts = dimension.texts if isinstance(dimension, Choices) else (repr(dimension.low), repr(dimension.high))
    seen: list[RunConfig] = []
    for text in texts:
        tried = with_values(config, {key: text}, f"--search {key}={text}")
        if tried in seen:
            raise ConfigError(f"--search {key}: {text} is given twice")
        seen.append(tried)
    if isinstance(dimension, Range) and not dimension.integer:
        inside = dimension.low + (dimension.high - dimension.low) * 0.6180339887
        try:
            with_values(config, {key: repr(inside)}, key)
        except ConfigError:
            raise ConfigError(
                f"--search {key}={dimension}: this key takes whole numbers; write the ends without fractions"
            ) from None


def with_values(config: RunConfig, values: Mapping[str, str], where: str) -> RunConfig:
    """A config with some keys changed.

    Raises:
        ConfigError: a key or value is wrong, or they do not go together; the message begins with `where`.
    """
    raw: dict[str, Any] = config.model_dump(mode="json")
    for key, text in values.items():
        apply_override(raw, f"{key}={text}")
    return build_config(raw, where)


def _value_at(dimension: Dimension, u: float) -> Value:
    """The value at a share `u` of the way from the lowest to the highest, 0 <= u < 1."""
    if isinstance(dimension, Choices):
        return dimension.texts[int(u * len(dimension.texts))]
    # A whole number stands for everything that is rounded to it.
    half = 0.5 if dimension.integer else 0.0
    low, high = dimension.low - half, dimension.high + half
    if dimension.log:
        value = math.exp((1 - u) * math.log(low) + u * math.log(high))
    else:
        value = (1 - u) * low + u * high
    value = min(max(value, dimension.low), dimension.high)
    return math.floor(value + half) if dimension.integer else value


@functools.lru_cache(maxsize=32)
def _covering(seed: int, round_: int, dimensions: int) -> numpy.ndarray[Any, Any]:
    """[STARTUP_TRIALS, dimensions] points of the unit cube: the evenest of a few in which every dimension is `_nested`."""
    from scipy.stats import qmc

    random = numpy.random.default_rng([seed, round_])
    drawn = [numpy.stack([_nested(random) for _ in range(dimensions)], axis=1) for _ in range(8)]
    return min(drawn, key=lambda points: sum(qmc.discrepancy(points[: n + 1]) for n in range(len(points))))


def _nested(random: numpy.random.Generator) -> numpy.ndarray[Any, Any]:
    """Points of [0, 1) of which the first n, for every n, lie in different n-ths (Steinhaus; no such row has more than 17)."""
    points = (numpy.arange(2520) + 0.5) / 2520  # the least number that all of 1..10 divide
    cells = (points[:, None] * numpy.arange(1, STARTUP_TRIALS + 1)).astype(int)
    while True:
        chosen: list[int] = []
        for n in range(STARTUP_TRIALS):
            taken = (cells[:, None, n:] == cells[chosen][None, :, n:]).any((1, 2))
            if taken.all():
                break  # a dead end, as about nine of ten are
            chosen.append(int(random.choice(numpy.flatnonzero(~taken))))
        else:
            return points[chosen]
