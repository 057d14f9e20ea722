"""A model that answers texts."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from labeltune.config import (
    CalibrateConfig,
    ColumnsConfig,
    EntitiesKind,
    GenerationConfig,
    changed_generation,
)
from labeltune.config_values import FormatName
from labeltune.distributed import (
    all_gather,
    assign,
    is_distributed,
    is_sharded,
    join_uneven,
    rank,
    world_size,
)
from labeltune.errors import DataError, ModelError, PromptError
from labeltune.evaluation.linear import LinearModel
from labeltune.inference.calibration import (
    Calibration,
    LabelScores,
    linear_scores,
    mean_scores,
    ranked,
    remove_prior,
)
from labeltune.inference.engine import CHECKED_PROMPTS, Engine, predicting
from labeltune.inference.extraction import Extracted, Grammars, extract, merge_entities, without_crossing
from labeltune.inference.fingerprint import fingerprint
from labeltune.inference.generation import generate_answers, stop_ids
from labeltune.inference.marked import Marked, extract_marked
from labeltune.inference.marked import Question as MarkedQuestion
from labeltune.inference.runners import Runner
from labeltune.inference.scoring import LabelTrie, Question
from labeltune.models.precision import spread
from labeltune.prompts import Task, marks
from labeltune.prompts.builder import PromptBuilder
from labeltune.prompts.classification import ClassificationTask
from labeltune.prompts.marked_copy import MarkTokens, Shown
from labeltune.prompts.multilabel import MultilabelTask
from labeltune.prompts.ner import NerTask, locate
from labeltune.prompts.template import ChatTemplate
from labeltune.types import Entity, Example, Prediction

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Rows that one process of a training run predicts together, starting from an empty cache. Answers depend on these rows alone, to
#: the last bit, so neither the number of processes nor the assignment changes a result.
UNIT = 32

#: Labels of a row that are decided in one segment; every one of them sees the row's prompt, which is computed once.
VERDICTS = 256
#: Label sets whose tries are kept; most files have one.
KEPT_TRIES = 1000

Answer = TypeVar("Answer")


class Predictor:
    """Answers texts with the prompt, labels and template of a run. May be used from several threads.

    Args:
        model: a causal language model, with or without an adapter.
        task: what is asked, and how an answer is read.
        template: the tokenizer and its chat template.
        generation: how answers are found, and their bounds.
        columns: names of the columns in the run's data files.
        calibrate: prior correction.
        calibration: what was fitted on validation rows.
        linear: the linear model whose scores it weighs.
        source: names the base model.
        weights: file whose hash stands for the weights, for `fingerprint`.
        encoding: of the text files of the run's data.
        format_name: `rows` where files are taken as they stand, whatever tool they look like.

    Attributes:
        shares_rows: all processes of a training job ask with the same examples; each computes a part of them, and gets all answers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        template: ChatTemplate,
        generation: GenerationConfig | None = None,
        *,
        columns: ColumnsConfig | None = None,
        calibrate: CalibrateConfig | None = None,
        calibration: Calibration | None = None,
        linear: LinearModel | None = None,
        source: str = "",
        weights: Path | None = None,
        encoding: str = "utf-8",
        format_name: FormatName = "auto",
    ) -> None:
        self.model, self.task, self.template = model, task, template
        self.generation = generation or GenerationConfig()
        self.columns = columns or ColumnsConfig()
        self.calibrate = calibrate or CalibrateConfig()
        self.calibration, self.linear = calibration or Calibration(), linear
        self.source, self.weights, self.encoding = source, weights, encoding
        self.format_name = format_name
        self.builder = PromptBuilder(task, template)
        self.engine = Engine(model)
        self._grammars: Grammars | None = None
        self._tries: dict[tuple[str, ...], LabelTrie] = {}
        self.shares_rows = False

    def predict(
        self,
        texts: str | Iterable[str | Example],
        labels: Sequence[str] | None = None,
    ) -> list[Prediction]:
        """One prediction a text, in order, all asked at once; `stream` is for many.

        Args:
            texts: documents, or examples (their candidates are used; their right answers are not looked at).
            labels: candidates for documents that bring none; the run's label set when None.

        Raises:
            DataError: there are no labels to choose from, or two that cannot be told apart.
            PromptError: instruction and candidates alone exceed the length budget.
        """
        examples = list(self._examples(texts, labels))
        if self.generation.decoding == "free":
            return self._answered(examples, self._generated)
        if isinstance(self.task, NerTask):
            tokens = self.builder.marks
            how = (
                partial(self._extracted, self.task)
                if tokens is None
                else partial(self._marked, self.task, tokens)
            )
            return self._answered(examples, how)
        if isinstance(self.task, MultilabelTask):
            each = self.label_probabilities(examples)
            return [
                self.calibration.given(example.id, row) for example, row in zip(examples, each, strict=True)
            ]
        rows = self._probabilities(examples)
        return [ranked(example.id, row) for example, row in zip(examples, rows, strict=True)]

    def stream(
        self, texts: Iterable[str | Example], labels: Sequence[str] | None = None
    ) -> Iterator[Prediction]:
        """Predictions in order, as they come: some rows are read, asked together and yielded, then the next ones.

        It begins with nothing kept from earlier calls, so that answers follow from the rows alone, to the last bit. With
        `calibrate.prior=batch`, and in a job of several processes, all rows are read and asked before the first is yielded.

        Args:
            texts, labels: as of `predict`.

        Raises:
            DataError, PromptError: as `predict`.
        """
        examples = self._examples(texts, labels)
        self.engine.reset_cache()
        if self.shares_rows:
            examples = iter(known := list(examples))
            self.verify_fast_path(known)
        if self.calibrate.prior == "batch" or (self.shares_rows and is_distributed()):
            yield from self.predict(examples)
            return
        count = UNIT if self.shares_rows else self.engine.call_rows
        while rows := list(islice(examples, count)):
            yield from self.predict(rows)

    def change(self, **generation: Any) -> None:
        """Change keys of `generation`, e.g. `decoding="free"`.

        Raises:
            ConfigError: there is no such key, or it does not take the value.
        """
        self.generation = changed_generation(self.generation, generation)

    @property
    def decoded_rows(self) -> int:
        """How many rows are decoded at once here."""
        return self.engine.decoded_rows(self.generation.batch_size)

    @property
    def labels(self) -> tuple[str, ...]:
        """The run's labels, or entity types: the columns of `scores` when it is asked without labels of its own."""
        return self.task.labels

    @property
    def entities(self) -> EntitiesKind:
        """Whether this run's entities may lie inside entities."""
        return "nested" if isinstance(self.task, NerTask) and self.task.nested else "flat"

    def scores(
        self, texts: str | Iterable[str | Example], labels: Sequence[str] | None = None
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Probabilities of labels as an array of shape [rows, labels], in the order of `labels` (`self.labels` when None); those of a run
        with several labels a row are of each label by itself.

        Raises:
            DataError: there are no labels to choose from.
            ModelError: this run extracts entities.
        """
        columns = tuple(labels or self.task.labels)
        examples = [replace(e, candidates=columns) for e in self._examples(texts, columns)]
        if self.task.name == "multilabel":
            rows = self.label_probabilities(examples)
        else:
            rows = self._probabilities(examples)
        found = [[row[label] for label in columns] for row in rows]
        return np.array(found, dtype=np.float64).reshape(len(rows), len(columns))

    def extract(self, texts: str | Iterable[str | Example]) -> list[tuple[Entity, ...]]:
        """The entities of every text, with their places and scores.

        Raises:
            ModelError: this run classifies.
        """
        if self.task.name != "ner":
            raise ModelError("this run classifies; ask it with .predict or .scores")
        return [prediction.entities or () for prediction in self.predict(texts)]

    def spans(self, texts: str | Iterable[str | Example]) -> list[dict[int, float]]:
        """For every text, the places (characters) where an entity may begin, each with the probability that one does.

        Probabilities are those of the opening mark in the answer that is decoded, so they depend on the marks before it. Of a
        text in several windows, a place has the largest of its probabilities; where a text is shortened, only what is shown has any.

        Raises:
            ModelError: this run does not answer with marks.
        """
        if not isinstance(self.task, NerTask) or self.builder.marks is None:
            raise ModelError(
                "this run does not mark entities in the text; train one with prompt.answer=marks"
            )
        tokens = self.builder.marks
        rows = self._answered(list(self._examples(texts, None)), partial(self._marked_views, tokens))
        found = []
        for views in rows:
            places: dict[int, float] = {}
            for shown, answer in views:
                for place, probability in answer.begins.items():
                    at = shown.in_document(place)
                    places[at] = max(probability, places.get(at, 0.0))
            found.append(dict(sorted(places.items())))
        return found

    def log_probabilities(self, examples: Sequence[Example]) -> list[LabelScores]:
        """Exact log-probabilities of every example's candidates; with `long_text=window` their means over windows.

        Raises:
            DataError: an example has no candidates, or two that are the same to the model.
            ModelError: this run extracts entities.
        """
        if not isinstance(self.task, ClassificationTask):
            raise ModelError("this run extracts entities; ask it with .predict or .extract")
        return self._answered(examples, partial(self._scored, self.task))

    def label_probabilities(self, examples: Sequence[Example]) -> list[dict[str, float]]:
        """Of every example the probability of each candidate that it applies, calibrated.

        Raises:
            DataError: an example has no candidates, or two that are the same to the model.
            ModelError: this run gives one label a row, or extracts entities.
        """
        return [self.calibration.each(row) for row in self.log_odds(examples)]

    def log_odds(self, examples: Sequence[Example]) -> list[dict[str, float]]:
        """Of every example and candidate the exact ln p(applies) - ln p(does not); with `long_text=window` its largest over windows.

        Raises:
            DataError, ModelError: as `label_probabilities`.
        """
        if not isinstance(self.task, MultilabelTask):
            raise ModelError("this run does not decide every label by itself; ask it with .predict")
        return self._answered(examples, partial(self._decided, self.task))

    def verify_fast_path(self, examples: Sequence[Example]) -> None:
        """Choose the fastest way that is exact on some of these examples, if that has not been done yet."""
        if self.generation.decoding == "free" or not examples:
            return
        task = self.task
        chosen = spread(sorted(examples, key=lambda example: len(example.text)), CHECKED_PROMPTS)
        prompts = [self.builder.views(example, self.generation.long_text)[0].ids for example in chosen]
        if not isinstance(task, NerTask):
            tries = [self._tries_of(example)[0] for example in chosen]
            self.engine.verify_scoring([Question(*each) for each in zip(prompts, tries, strict=True)])
        else:
            self.engine.verify_decoding(prompts)

    def _answered(
        self, examples: Sequence[Example], answer: Callable[[Sequence[Example]], list[Answer]]
    ) -> list[Answer]:
        """`answer` for all examples, in order. With `shares_rows` they are cut into units of `UNIT` rows, each answered by one process
        with nothing kept from before, and all processes get all answers: these follow from the unit alone.
        """
        if not self.shares_rows or not examples:
            return answer(examples)
        units = [examples[at : at + UNIT] for at in range(0, len(examples), UNIT)]
        self.verify_fast_path(examples)  # one verdict, on the same prompts, for all processes
        # Generation calls parts of the model, so all processes ask sharded weights for everything.
        free_and_sharded = self.generation.decoding == "free" and is_sharded(self.model)
        split = is_distributed() and not free_and_sharded
        sizes = [sum(len(example.text) for example in unit) for unit in units]
        owners = assign(sizes, world_size()) if split else [rank()] * len(units)
        own: dict[int, list[Answer]] = {}
        with join_uneven(self.model):
            for number, owner in enumerate(owners):
                if owner == rank():
                    self.engine.reset_cache()
                    own[number] = answer(units[number])
        self.engine.reset_cache()
        found: dict[int, list[Answer]] = {}
        for part in all_gather(own) if split else [own]:
            found |= part
        return [one for number in range(len(units)) for one in found[number]]

    def _scored(self, task: ClassificationTask, examples: Sequence[Example]) -> list[LabelScores]:
        questions, asked = [], []
        for example in examples:
            labels = task.candidates(example)
            trie = self._trie(example, labels)
            views = self.builder.views(example, self.generation.long_text)
            asked.append((labels, tuple(map(len, trie.paths)), len(views)))
            questions += [Question(view.ids, trie) for view in views]
        found = iter(self.engine.score(questions))
        return [
            mean_scores([LabelScores(labels, tuple(next(found)), lengths) for _ in range(views)])
            for labels, lengths, views in asked
        ]

    def fault(self, example: Example) -> DataError | PromptError | None:
        """What `predict` would raise because of this row: its labels, or that its prompt cannot be made to fit; else None."""
        try:
            if not isinstance(self.task, NerTask):
                self._tries_of(example)
            self.builder.views(example, self.generation.long_text)
        except (DataError, PromptError) as error:
            return error
        return None

    def _decided(self, task: MultilabelTask, examples: Sequence[Example]) -> list[dict[str, float]]:
        questions, asked = [], []
        for example in examples:
            tries = self._tries_of(example)
            views = self.builder.views(example, self.generation.long_text)
            asked.append((task.candidates(example), len(tries), len(views)))
            questions += [Question(view.ids, trie) for view in views for trie in tries]
        found = iter(self.engine.score(questions))
        rows = []
        for labels, parts, count in asked:
            windows = [[score for _ in range(parts) for score in next(found)] for _ in range(count)]
            odds = np.array(windows).reshape(count, len(labels), 2)
            rows.append(dict(zip(labels, (odds[..., 0] - odds[..., 1]).max(axis=0).tolist(), strict=True)))
        return rows

    def _tries_of(self, example: Example) -> list[LabelTrie]:
        """The answers that are compared for a row: all labels together, or, where every label is decided by itself, what is answered
        about `VERDICTS` of them each."""
        task = self.task
        if not isinstance(task, MultilabelTask):
            assert isinstance(task, ClassificationTask)
            return [self._trie(example, task.candidates(example))]
        labels = task.candidates(example)
        return [self._trie(example, labels[at : at + VERDICTS]) for at in range(0, len(labels), VERDICTS)]

    def _trie(self, example: Example, labels: tuple[str, ...]) -> LabelTrie:
        if labels not in self._tries:
            try:
                found = self._new_trie(labels)
            except ValueError as error:
                raise DataError(
                    f"{example.where}: {error}: two of the labels {list(labels)} are the same to this "
                    "model; rename one"
                ) from error
            if len(self._tries) >= KEPT_TRIES:
                self._tries.clear()
            self._tries[labels] = found
        return self._tries[labels]

    def _new_trie(self, labels: tuple[str, ...]) -> LabelTrie:
        if not isinstance(self.task, MultilabelTask):
            return LabelTrie.of([self.builder.answer_ids(label) for label in labels])
        verdicts = [self.builder.verdict(label) for label in labels]
        answers = [answer for verdict in verdicts for answer in (verdict.yes, verdict.no)]
        return LabelTrie.of(answers, [verdict.asked for verdict in verdicts for _ in range(2)])

    def _probabilities(self, examples: Sequence[Example]) -> list[dict[str, float]]:
        rows = self.log_probabilities(examples)
        norm, linear = self.generation.length_norm, self.linear
        others: list[list[float] | None] = [None] * len(rows)
        if linear is not None:
            others = linear_scores(linear, examples, rows)
        found = [
            self.calibration.probabilities(row, norm, other) for row, other in zip(rows, others, strict=True)
        ]
        return remove_prior(found) if self.calibrate.prior == "batch" else found

    def _extracted(self, task: NerTask, examples: Sequence[Example]) -> list[Prediction]:
        views = [self.builder.views(example, self.generation.long_text) for example in examples]
        prompts = [
            (view.ids, tuple(example.text[start:end] for start, end in view.parts))
            for example, each in zip(examples, views, strict=True)
            for view in each
        ]
        if self._grammars is None:
            vocabulary = self.model.get_output_embeddings().weight.shape[0]
            self._grammars = Grammars(
                self.template.tokenizer,
                task.labels,
                task.prompt.no_entities,
                vocabulary,
                self.template.answer_lead,
            )
        grammars = self._grammars

        def run(runner: Runner) -> list[Extracted]:
            return extract(
                runner,
                grammars,
                self.template.end_of_turn_ids[:1],
                prompts,
                max_new_tokens=self.generation.max_new_tokens,
                batch_size=self.decoded_rows,
            )

        found = iter(self.engine.decode([ids for ids, _ in prompts], run) if prompts else ())
        predictions = []
        for example, each in zip(examples, views, strict=True):
            answers = [next(found) for _ in each]
            windows = [
                locate(example.text, task.pairs(answer.answer), view.parts, answer.scores)
                for answer, view in zip(answers, each, strict=True)
            ]
            entities = windows[0] if len(windows) == 1 else merge_entities(windows)
            written = (
                answers[0].answer if len(answers) == 1 else task.target(replace(example, entities=entities))
            )
            truncated = any(answer.truncated for answer in answers)
            logs = [score for answer in answers for score in answer.scores]
            predictions.append(
                Prediction(
                    example.id,
                    written,
                    entities=entities,
                    truncated=truncated,
                    certainty=math.exp(min(logs, default=0.0)),
                )
            )
        return predictions

    def _marked(self, task: NerTask, tokens: MarkTokens, examples: Sequence[Example]) -> list[Prediction]:
        """Entities as marks in the text."""
        predictions = []
        for example, views in zip(examples, self._marked_views(tokens, examples), strict=True):
            windows = [
                [shown.placed(entity, example.text) for entity in answer.entities] for shown, answer in views
            ]
            entities = tuple(windows[0]) if len(windows) == 1 else without_crossing(windows, task.nested)
            if len(views) == 1:
                shown, answer = views[0]
                written = task.prompt.no_entities if answer.none else marks.write(shown.text, answer.entities)
            else:
                written = task.target(replace(example, entities=entities))
            truncated = any(answer.truncated for _, answer in views)
            certainty = min((answer.certainty for _, answer in views), default=1.0)
            predictions.append(
                Prediction(example.id, written, entities=entities, truncated=truncated, certainty=certainty)
            )
        return predictions

    def _marked_views(
        self, tokens: MarkTokens, examples: Sequence[Example]
    ) -> list[list[tuple[Shown, Marked]]]:
        """What each prompt of each example shows, and what was decoded for it."""
        views = [self.builder.views(example, self.generation.long_text) for example in examples]
        shown = [
            [Shown.of(example.text, view.text, view.parts) for view in each]
            for example, each in zip(examples, views, strict=True)
        ]
        questions = [
            MarkedQuestion(view.ids, text)
            for each, texts in zip(views, shown, strict=True)
            for view, text in zip(each, texts, strict=True)
        ]

        def run(runner: Runner) -> list[Marked]:
            return extract_marked(
                runner,
                tokens,
                questions,
                nested=self.entities == "nested",
                end=self.template.end_of_turn_ids[0],
                max_new_tokens=self.generation.max_new_tokens,
                batch_size=self.decoded_rows,
            )

        found = iter(self.engine.decode([question.ids for question in questions], run) if questions else ())
        return [[(text, next(found)) for text in texts] for texts in shown]

    def _generated(self, examples: Sequence[Example]) -> list[Prediction]:
        prompts = [self.builder.prompt(example).ids for example in examples]
        with predicting(self.model, self.engine.weights):
            answers = generate_answers(
                self.model,
                self.template.tokenizer,
                prompts,
                stop_ids=stop_ids(self.model, self.template),
                max_new_tokens=self._max_new_tokens(examples),
                batch_size=self.decoded_rows,
            )
        decode, lead = self.template.tokenizer.decode, self.template.answer_lead
        written = [
            decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in answers
        ]
        return [
            self.task.parse(example, answer.removeprefix(lead))
            for example, answer in zip(examples, written, strict=True)
        ]

    def fingerprint(self) -> str:
        """Names everything that answers follow from but the rows: weights by their adapter or model file, and settings."""
        return fingerprint(
            self.source,
            self.weights,
            task=self.task,
            template=self.template,
            generation=self.generation,
            calibrate=self.calibrate,
            calibration=self.calibration,
        )

    def base_model(self) -> AbstractContextManager[None]:
        """Inside this context the adapter is switched off: the untuned model answers, with uncalibrated probabilities.

        Raises:
            ModelError: the run trained all weights, so there is no untuned model to go back to.
        """
        if not hasattr(self.model, "disable_adapter"):
            raise ModelError("this run has no adapter to switch off")
        return self._without_adapter()

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        kept, self.calibration = self.calibration, Calibration()
        self.engine.reset_cache()
        try:
            with self.model.disable_adapter():
                yield
        finally:
            self.calibration = kept
            self.engine.reset_cache()

    def _examples(
        self, texts: str | Iterable[str | Example], labels: Sequence[str] | None
    ) -> Iterator[Example]:
        for number, text in enumerate([texts] if isinstance(texts, str) else texts):
            yield text if isinstance(text, Example) else Example(str(number), text, tuple(labels or ()))

    def _max_new_tokens(self, examples: Sequence[Example]) -> int:
        if self.task.name == "ner":
            copies = (len(self.template.plain_ids(marks.escape(example.text))) for example in examples)
            longest = min(max(copies, default=0), self.task.prompt.max_length) if self.builder.marks else 0
            return longest + self.generation.max_new_tokens
        return max(self.builder.reserve(example) for example in examples) if examples else 1

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory; the predictor cannot be used afterwards."""
        del self.model, self.engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
