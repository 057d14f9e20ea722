"""The runs a server answers with: one base model in memory, an adapter for each run."""

from __future__ import annotations

import json
import sys
import threading
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from labeltune.config import TaskName
from labeltune.errors import ConfigError, DataError, ModelError, PromptError
from labeltune.inference.load import load_predictor, predictor_on
from labeltune.inference.predictor import Predictor
from labeltune.io.outputs import is_hub_name
from labeltune.io.progress import begin
from labeltune.io.run_folder import RunInfo, find_checkpoint, naming_folder, validation_file
from labeltune.models.hub import resolve_model
from labeltune.models.lora import load_adapter
from labeltune.serve.batching import Answer, Row
from labeltune.types import Example

#: Shown where a run has no validation rows beside it.
DOCUMENTS = {
    "classification": (
        "The probe sent its first pictures of the far side of the moon.",
        "The striker scored twice in the final minutes.",
    ),
    "multilabel": (
        "The probe sent its first pictures of the far side of the moon.",
        "I was charged twice, please cancel the order.",
    ),
    "ner": ("Mara left Oslo and joined the Red Cross in Geneva.", "他在南京大学学习。"),
}
_COUNT = 8
_LONGEST = 2000
_BYTES = 2**20


@dataclass(frozen=True)
class Served:
    """A run by the name that clients use.

    Attributes:
        adapter: the name of its adapter inside the model; empty for a run without one.
        folder: its checkpoint.
    """

    name: str
    predictor: Predictor
    adapter: str
    folder: Path

    @property
    def task(self) -> TaskName:
        """`classification`, `multilabel` or `ner`."""
        return self.predictor.task.name

    @property
    def labels(self) -> tuple[str, ...]:
        """The run's label set."""
        return self.predictor.task.labels


class Models:
    """All runs of a server; one of them at a time is switched on."""

    def __init__(self, served: Sequence[Served]) -> None:
        self.served: Mapping[str, Served] = {each.name: each for each in served}
        self._active = served[0].adapter if len(served) == 1 else ""
        self._lock = threading.Lock()

    def replace(self, name: str, folder: Path) -> None:
        """Put another run in the place of one: answers that come from now on are its own, and the old one's memory is freed.

        Raises:
            ConfigError: several runs share a base model here.
            ModelError: it cannot be loaded; the old one goes on.
        """
        if len(self.served) > 1:
            raise ConfigError("a server of several runs cannot exchange one of them; serve it by itself")
        old = self.served[name]
        device = str(old.predictor.model.device)
        new = Served(name, load_predictor(folder, device=device, merge=True), "", folder)
        _make_exact(new)
        _warm_up(Models([new]), new)
        with self._lock:
            self.served = {name: new}
            self._active = ""
            old.predictor.close()

    def first(self, *tasks: TaskName) -> Served | None:
        """The run that answers when a request names none: the first for one of these tasks."""
        return next((each for each in self.served.values() if each.task in tasks), None)

    def cost(self, served: Served, example: Example) -> int:
        """Tokens of a row, estimated from above by its characters."""
        labels = example.candidates or served.labels
        size = len(example.text) + 2 * sum(map(len, labels)) + 64
        limit = served.predictor.task.prompt.max_length
        return size if served.predictor.generation.long_text == "window" else min(size, limit)

    def answer(self, rows: Sequence[Row]) -> list[Answer | Exception]:
        """Answers to rows of one model.

        Every batch starts from nothing, so that an answer does not depend on earlier ones. A row that cannot be asked about
        gets its own error and takes no other with it.
        """
        served = self.served[rows[0].model]
        predictor = served.predictor
        with self._lock:
            if served.adapter and served.adapter != self._active:
                predictor.model.set_adapter(served.adapter)
                self._active = served.adapter
            predictor.engine.reset_cache()
            found = _predict(predictor, [row.example for row in rows])
            return [
                _counted(predictor, row, one) if isinstance(one, Answer) and row.count_tokens else one
                for row, one in zip(rows, found, strict=True)
            ]


def _predict(predictor: Predictor, examples: Sequence[Example]) -> list[Answer | Exception]:
    try:
        return [Answer(prediction) for prediction in predictor.predict(examples)]
    except Exception as error:
        if len(examples) == 1:
            return [error]
        if not isinstance(error, (DataError, PromptError)):
            return [found for example in examples for found in _predict(predictor, [example])]
        faults = [predictor.fault(example) for example in examples]
        good = [example for example, fault in zip(examples, faults, strict=True) if fault is None]
        if not good or len(good) == len(examples):
            return [fault or error for fault in faults]
        rest = iter(_predict(predictor, good))
        return [next(rest) if fault is None else fault for fault in faults]


def _counted(predictor: Predictor, row: Row, answer: Answer) -> Answer:
    prompt = sum(
        len(view.ids) for view in predictor.builder.views(row.example, predictor.generation.long_text)
    )
    tokenizer, found = predictor.template.tokenizer, answer.prediction
    text = found.answer[: min((at for at in map(found.answer.find, row.stop) if at >= 0), default=None)]
    written = tokenizer(text, add_special_tokens=False).input_ids
    short = row.max_tokens is not None and len(written) > row.max_tokens
    if short:
        written = written[: row.max_tokens]
        # Half a character is left out.
        pairs = takewhile(lambda both: both[0] == both[1], zip(text, tokenizer.decode(written), strict=False))
        text = "".join(character for character, _ in pairs)
    cut = replace(found, answer=text, truncated=found.truncated or short)
    return Answer(cut, prompt, len(written))


def run_name(run: str) -> str:
    """What a run is called when it is given no name: its folder, or the one around `best` and `checkpoint-N`.

    Letters and digits of all languages are kept; everything else that stands in no address becomes a dash.
    """
    if is_hub_name(run):
        name = run.rpartition("/")[2]
    else:
        name = naming_folder(Path(run)).name
    name = "".join(c if _fits(c) else "-" for c in unicodedata.normalize("NFC", name))[:64]
    return name if any(map(str.isalnum, name)) else "run"


def _fits(character: str) -> bool:
    """Letters, digits and the marks that belong to letters (Devanagari's vowels), dots, dashes, underscores."""
    return character in "._-" or character.isalnum() or unicodedata.category(character).startswith("M")


def _is_name(name: str) -> bool:
    return len(name) <= 64 and all(map(_fits, name)) and any(map(str.isalnum, name))


def parse_adapter(given: str) -> tuple[str, str]:
    """`NAME=RUN` of the command line.

    Raises:
        ConfigError: it has another form.
    """
    name, separator, run = given.partition("=")
    if not separator or not run or not _is_name(name):
        raise ConfigError(
            f"--adapter {given}: write NAME=RUN; a name has letters, digits, dots, dashes and underscores"
        )
    return name, run


def load_models(
    run: str,
    name: str | None = None,
    adapters: Sequence[tuple[str, str]] = (),
    device: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Models:
    """Load a run, and more runs of the same base model, whose weights stand in memory once.

    Runs are asked exactly, whatever their `generation.decoding` says, and without `calibrate.prior=batch`, which would
    make answers depend on the company they are batched with.

    Raises:
        ConfigError: a name is given twice, or cannot be used.
        ModelError: a run cannot be loaded, or stands on another base model.
    """
    first = name or run_name(run)
    names = [first, *(each for each, _ in adapters)]
    if not _is_name(first):
        raise ConfigError(f"--name {first}: use letters, digits, dots, dashes and underscores")
    if len(set(names)) < len(names):
        raise ConfigError(
            f"two runs have the same name: {', '.join(names)}; name the first with --name NAME, the others with "
            "--adapter NAME=RUN, each differently"
        )
    folders = [find_checkpoint(other) for _, other in adapters]
    if folders:
        _check_bases(find_checkpoint(run), adapters, folders)
    begin(f"loading the run {run}", say)
    # With company the adapters have to stay apart from the weights.
    predictor = load_predictor(run, device=device, merge=not folders)
    served = [Served(first, predictor, "default" if folders else "", _folder_of(predictor))]
    for number, ((other, _), folder) in enumerate(zip(adapters, folders, strict=True)):
        inside = f"served{number}"
        begin(f"loading the run {folder}", say)
        load_adapter(predictor.model, folder, inside).eval()
        served.append(Served(other, predictor_on(predictor.model, folder), inside, folder))
    for each in served:
        _make_exact(each)
    models = Models(served)
    for each in served:
        begin(f"checking {each.name}: whether its first answer is that of plain computation", say)
        _warm_up(models, each)
    return models


def _folder_of(predictor: Predictor) -> Path:
    assert predictor.weights is not None
    return predictor.weights.parent


def _check_bases(first: Path, adapters: Sequence[tuple[str, str]], folders: Sequence[Path]) -> None:
    base = RunInfo.load(first)
    if not base.adapter:
        raise ModelError(
            f"{first} is a whole model, not an adapter; nothing can be added to it with --adapter"
        )
    where = resolve_model(base.model, base.hub).folder.resolve()
    for (name, _), folder in zip(adapters, folders, strict=True):
        info = RunInfo.load(folder)
        if not info.adapter:
            raise ModelError(f"--adapter {name}: {folder} is a whole model; serve it by itself")
        if resolve_model(info.model, info.hub).folder.resolve() != where:
            raise ModelError(
                f"--adapter {name}: {folder} was trained on {info.model}, and the server's base model is "
                f"{base.model}; serve it by itself"
            )


def _make_exact(served: Served) -> None:
    predictor = served.predictor
    predictor.change(decoding="exact")
    if predictor.calibrate.prior == "batch":
        print(
            f"warning: {served.name}: calibrate.prior=batch is left out; it needs all rows of a file at once",
            file=sys.stderr,
        )
        predictor.calibrate = predictor.calibrate.model_copy(update={"prior": "none"})


def _warm_up(models: Models, served: Served) -> None:
    """The engine checks itself at its first call; better now than in a client's request."""
    labels = () if served.labels or served.task == "ner" else ("a", "b")
    (found,) = models.answer([Row(served.name, Example("0", "warm-up", labels), 1)])
    if isinstance(found, Exception):
        raise found


def documents(served: Served) -> list[str]:
    """A few of the run's validation rows, as its training wrote them; made-up ones where there are none."""
    file = validation_file(served.folder, "predictions.jsonl")
    found: list[str] = []
    if file is not None:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                text = _text(line) if len(line) < _BYTES else ""
                if text and text not in found:
                    found.append(text[:_LONGEST])
                if len(found) == _COUNT:
                    break
    return found or list(DOCUMENTS[served.task])


def _text(line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    text = row.get("text") if isinstance(row, dict) else None
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) and text.strip() else ""
