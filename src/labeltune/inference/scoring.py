"""Exact log-probabilities of every candidate answer of a row: one pass over the prompt and a trie of the answers, where the
model's attention can be replaced (`score_answers`); else its answers behind the prompt in the model's own cache (`score_by_cache`);
else whole rows side by side (`score_side_by_side`). `score_one_by_one` is what all of them must equal.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from labeltune.models.own_cache import OwnCache, run_behind
from labeltune.models.precision import moved_by, other_tokens, passes, sent
from labeltune.models.tree_attention import (
    PADDED,
    KVCache,
    Segment,
    run_segments,
    segment_attention_on,
)
from labeltune.prompts.builder import common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kept = TypeVar("Kept", KVCache, OwnCache)
#: A question and a node of its trie, or nodes behind each other.
Node = tuple[int, int]
Branch = tuple[int, tuple[int, ...]]

#: Memory that the fp32 logits of one pass may take for every token of it: 256 MiB on the CPU, 2 GiB on CUDA.
LOGITS_BYTES_A_TOKEN = {"cpu": 256 * 2**10, "mps": 64 * 2**10, "cuda": 128 * 2**10}
#: Tokens whose logits are added up at once: a copy of all of them would take as much memory again, and on the CPU leave its caches.
ADDED_UP = {"cpu": 32, "cuda": 512}
#: Common tokens beyond what is kept already for which computing the beginning again is worth it.
WORTH_KEEPING = 32
#: Tokens of a row that are enough to see whether rows influence each other, and those of its beginning that are watched.
LEAK_TOKENS, FIRST_TOKENS = 64, 8
#: Memory that the rows of one pass may hold in a model's own cache, for every token of `max_tokens`: 4 GiB on CUDA.
CACHED_BYTES = 256 * 2**10


@dataclass(frozen=True)
class LabelTrie:
    """Answers that begin alike share nodes, so that each token of each beginning is computed once.

    A node stands for the answer tokens read so far and is where the next one is predicted. Node 0 is the end of the prompt;
    the others are numbered so that every parent comes before its children. An answer's last token (its end of turn) is
    predicted but never read, so it needs no node of its own.

    Attributes:
        tokens: the token that leads to each node, shape [nodes]; that of node 0 is meaningless (-1).
        parents: the node before each node; -1 for node 0.
        depths: tokens of the answer read at each node; 0 for node 0.
        paths: for every answer, (node, next token) for each of its tokens.
        asked: for every answer, from which of its tokens on it is scored; those before it are only read.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    paths: tuple[tuple[tuple[int, int], ...], ...]
    asked: tuple[int, ...]

    @staticmethod
    def of(answers: Sequence[Sequence[int]], asked: Sequence[int] = ()) -> LabelTrie:
        """The trie of answers given as token ids, each with its end of turn.

        Args:
            asked: see `LabelTrie`; all tokens of all answers when empty.

        Raises:
            ValueError: an answer is empty, is given twice, or is the beginning of another one (their ends of turn would
                not tell them apart).
        """
        tokens, parents, depths = [-1], [-1], [0]
        children: dict[tuple[int, int], int] = {}
        paths = []
        ends: set[tuple[int, int]] = set()
        for answer in answers:
            if not answer:
                raise ValueError("an answer without tokens")
            node, path = 0, []
            for token in answer[:-1]:
                path.append((node, token))
                if (node, token) not in children:
                    children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                    depths.append(depths[node] + 1)
                node = children[node, token]
            last = node, answer[-1]
            if last in ends:
                raise ValueError("two answers have the same tokens")
            ends.add(last)
            paths.append((*path, last))
        if ends & children.keys():
            raise ValueError("an answer is the beginning of another one")
        begins = tuple(asked) or (0,) * len(paths)
        return LabelTrie(tuple(tokens), tuple(parents), tuple(depths), tuple(paths), begins)

    def __len__(self) -> int:
        """Number of nodes, the end of the prompt included."""
        return len(self.tokens)

    def ancestors(self) -> list[list[int]]:
        """For every node but 0 the nodes it sees, itself included and node 0 left out (the prompt is seen by all)."""
        seen: list[list[int]] = [[]]
        for node in range(1, len(self)):
            seen.append([*seen[self.parents[node]], node])
        return seen[1:]

    @cached_property
    def branches(self) -> tuple[tuple[int, ...], ...]:
        """The nodes from behind node 0 to each node without children, shortest first; all nodes but 0 are in one of them."""
        inner = set(self.parents)
        return tuple(sorted((tuple(seen) for seen in self.ancestors() if seen[-1] not in inner), key=len))

    @cached_property
    def wanted(self) -> dict[int, list[int]]:
        """The tokens whose probabilities are asked for at each node that has some, nodes in their order."""
        found: dict[int, set[int]] = defaultdict(set)
        for node, token in (step for path in self.scored for step in path):
            found[node].add(token)
        return {node: sorted(found[node]) for node in sorted(found)}

    @property
    def scored(self) -> list[tuple[tuple[int, int], ...]]:
        """The parts of the paths whose probabilities make those of the answers."""
        return [path[begin:] for path, begin in zip(self.paths, self.asked, strict=True)]


@dataclass(frozen=True)
class Question:
    """A prompt and the answers to compare.

    Attributes:
        prompt: token ids, at least one.
        trie: the candidate answers.
    """

    prompt: Sequence[int]
    trie: LabelTrie


class PrefixCache(Generic[Kept]):
    """What a model keeps of the tokens that all prompts of a file begin with; kept from call to call.

    Args:
        run: computes it, for at least one token.
    """

    def __init__(self, run: Callable[[PreTrainedModel, Sequence[int]], Kept]) -> None:
        self._run: Callable[[PreTrainedModel, Sequence[int]], Kept] = run
        self.clear()

    def clear(self) -> None:
        """Free the memory; needed when the weights have changed."""
        self.ids: tuple[int, ...] = ()
        self._held: Kept | None = None

    def _shared(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many tokens of these prompts to take from here; at least one of each prompt is left over."""
        ordered = sorted(map(list, prompts))
        common = min(common_prefix(ordered[0], ordered[-1]), min(map(len, prompts)) - 1)
        held = len(self.ids)
        fits = held <= common and tuple(ordered[0][:held]) == self.ids
        if fits and (len(prompts) == 1 or common - held < WORTH_KEEPING):
            return held
        return common if len(prompts) > 1 else 0

    def common(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Kept | None:
        """What these prompts begin with (`ids`), computed where it is not known yet; None where that is nothing."""
        wanted = tuple(prompts[0][: self._shared(prompts)])
        if wanted != self.ids:
            self.clear()
            if wanted:
                held = self._run(model, wanted)
                self.ids, self._held = wanted, held
        return self._held


def segment_prefix() -> PrefixCache[KVCache]:
    """Kept keys and values; to be used inside `segment_attention_on`."""

    def run(model: PreTrainedModel, ids: Sequence[int]) -> KVCache:
        held = KVCache()
        run_segments(model, [Segment(ids, held, keep=True)])
        return held

    return PrefixCache(run)


def own_prefix() -> PrefixCache[OwnCache]:
    """Kept in the model's own cache."""
    return PrefixCache(lambda model, ids: run_behind(model, None, [ids], 1)[1])


def score_answers(
    model: PreTrainedModel,
    questions: Sequence[Question],
    max_tokens: int,
    cache: PrefixCache[KVCache],
) -> list[list[float]]:
    """Natural logarithm of the probability of every complete answer, end of turn included.

    Rows are taken in the order of their tokens, so that those of one pass share as much of their prompts as they can; how
    they are cut into passes changes nothing but rounding.

    Args:
        max_tokens: tokens of one pass (a row that needs more has a pass of its own).
    """
    scores = _Scores(questions)
    if not questions:
        return []
    with torch.inference_mode(), segment_attention_on(model):
        prefix = cache.common(model, [question.prompt for question in questions]) or KVCache()
        begin = prefix.length
        for rows, shared in plan_passes(questions, begin, max_tokens, _most_logits(model, max_tokens)):
            # Those of about the same length stand beside each other.
            rows.sort(key=lambda row: len(questions[row].prompt) + len(questions[row].trie))
            segments = []
            parent = prefix
            if shared > begin:
                parent = KVCache(prefix)
                segments.append(Segment(questions[rows[0]].prompt[begin:shared], parent, keep=True))
            segments += [_segment(questions[row], shared, parent) for row in rows]
            scores.read(
                run_segments(model, segments),
                [(row, node) for row in rows for node in questions[row].trie.wanted],
            )
    return scores.of_answers()


def plan_passes(
    questions: Sequence[Question], begin: int, max_tokens: int, max_nodes: int
) -> Iterator[tuple[list[int], int]]:
    """(rows, tokens that their prompts begin with in common) for every pass, in the order of their tokens.

    A row's last prompt token is never shared: it is where the first answer token is predicted.

    Args:
        begin: tokens that all prompts have in common and that are known already.
    """
    order = sorted(range(len(questions)), key=lambda i: list(questions[i].prompt))
    rows: list[int] = []
    shared = own = nodes = 0
    for i in order:
        prompt, trie = questions[i].prompt, questions[i].trie
        size = len(prompt) + len(trie) - 1
        if rows:
            common = min(shared, common_prefix(questions[rows[-1]].prompt, prompt), len(prompt) - 1)
            tokens = common - begin + own + size - (len(rows) + 1) * common
            if tokens <= max_tokens and nodes + len(trie.wanted) <= max_nodes:
                rows.append(i)
                shared, own, nodes = common, own + size, nodes + len(trie.wanted)
                continue
            yield rows, shared if len(rows) > 1 else begin
        rows, shared, own, nodes = [i], len(prompt) - 1, size, len(trie.wanted)
    if rows:
        yield rows, shared if len(rows) > 1 else begin


def _segment(question: Question, shared: int, parent: KVCache) -> Segment:
    """The row's own part of the prompt and after it the trie, each node of which sees the prompt and its ancestors; logits are
    wanted at the nodes where something is asked."""
    own, trie = list(question.prompt[shared:]), question.trie
    count = len(own)
    ids = own + list(trie.tokens[1:])
    visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    visible[count:, count:] = False
    for node, seen in enumerate(trie.ancestors(), start=1):
        visible[count + node - 1, [count + other - 1 for other in seen]] = True
    depths = [*range(count), *(count - 1 + depth for depth in trie.depths[1:])]
    wanted = [count - 1 + node for node in trie.wanted]
    return Segment(ids, parent, depths=depths, visible=visible, wanted=wanted, begins_at=shared)


class _Scores:
    """Log-probabilities of the tokens of answers, as they become known."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = questions
        self._known: list[dict[tuple[int, int], float]] = [{} for _ in questions]

    def read(self, logits: torch.Tensor, nodes: Sequence[Node]) -> None:
        """Take what is asked for from logits of shape [nodes, vocabulary].

        Args:
            nodes: (question, node of its trie).
        """
        asked = [self.questions[row].trie.wanted.get(node, ()) for row, node in nodes]
        steps = [(*nodes[at], token) for at, tokens in enumerate(asked) for token in tokens]
        places = [at for at, tokens in enumerate(asked) for _ in tokens]
        if not steps:
            return
        logits = logits.float()
        places_and_tokens = torch.tensor([places, [token for *_, token in steps]])
        at, tokens = sent(places_and_tokens, logits.device)
        parts = ADDED_UP.get(logits.device.type, 64)
        sums = torch.cat([part.logsumexp(-1) for part in torch.split(logits, parts)])
        for (row, node, token), value in zip(steps, (logits[at, tokens] - sums[at]).tolist(), strict=True):
            self._known[row][node, token] = value

    def of_answers(self) -> list[list[float]]:
        """Those of complete answers."""
        return [
            [math.fsum(known[step] for step in path) for path in question.trie.scored]
            for question, known in zip(self.questions, self._known, strict=True)
        ]


def score_by_cache(
    model: PreTrainedModel, questions: Sequence[Question], max_tokens: int, cache: PrefixCache[OwnCache]
) -> list[list[float]]:
    """The same through the model's own cache: what all prompts begin with is computed once, rows of equal length go on behind it
    together, and every row's answers behind its state, padded on the right, where nothing that is read sees the padding.

    Args:
        max_tokens: as of `score_answers`; bounds the memory of the caches too.
    """
    scores = _Scores(questions)
    if not questions:
        return []
    with torch.inference_mode():
        prefix = cache.common(model, [question.prompt for question in questions])
        begin, size = (prefix.length, prefix.bytes_per_row) if prefix else (0, 1)
        most = min(_most_logits(model, max_tokens), CACHED_BYTES * max_tokens // size)
        order = sorted(
            range(len(questions)), key=lambda i: (len(questions[i].prompt), list(questions[i].prompt))
        )

        def fits(rows: Sequence[int]) -> bool:
            length = len(questions[rows[-1]].prompt)
            equal = length == len(questions[rows[0]].prompt)
            return equal and len(rows) <= most and len(rows) * (length - begin) <= max_tokens

        for rows in passes(order, fits):
            behind = prefix.repeated([0] * len(rows)) if prefix else None
            logits, state = run_behind(model, behind, [questions[row].prompt[begin:] for row in rows], 1)
            scores.read(logits[:, -1], [(row, 0) for row in rows])
            _score_behind(model, scores, rows, state, max_tokens)
    return scores.of_answers()


def _score_behind(
    model: PreTrainedModel, scores: _Scores, rows: Sequence[int], state: OwnCache, max_tokens: int
) -> None:
    """The answers of questions whose prompts are the rows of a cache."""
    tries = [scores.questions[row].trie for row in rows]
    most = CACHED_BYTES * max_tokens // state.bytes_per_row
    wanted = _most_logits(model, max_tokens)
    todo = [(at, branch) for at, trie in enumerate(tries) for branch in trie.branches]
    todo.sort(key=lambda each: len(each[1]))
    read: set[Node] = set()

    def fits(part: Sequence[Branch]) -> bool:
        padded, own = len(part) * len(part[-1][1]), sum(len(nodes) for _, nodes in part)
        return padded <= min(max_tokens, PADDED * own) and len(part) <= most and own <= wanted

    for part in passes(todo, fits):
        width = len(part[-1][1])
        ids = [_padded([tries[at].tokens[node] for node in branch], width) for at, branch in part]
        nodes, *places = _not_read(part, tries, read)
        with _logits_at(model, *places):
            logits, _ = run_behind(model, state.repeated([at for at, _ in part], last=True), ids, width)
        scores.read(logits[0], [(rows[at], node) for at, node in nodes])


def score_side_by_side(
    model: PreTrainedModel, questions: Sequence[Question], max_tokens: int
) -> list[list[float]]:
    """The same with plain forward passes over whole rows, one answer behind each, padded on the right: for models that do not go
    on exactly behind what they have kept.

    Args:
        max_tokens: as of `score_answers`.
    """
    scores, device = _Scores(questions), next(model.parameters()).device
    most = _most_logits(model, max_tokens)
    todo = [
        (row, (0, *branch))
        for row, question in enumerate(questions)
        for branch in question.trie.branches or [()]
    ]

    def length(each: Branch) -> int:
        return len(questions[each[0]].prompt) - 1 + len(each[1])

    def fits(part: Sequence[Branch]) -> bool:
        return len(part) * length(part[-1]) <= max_tokens and sum(len(nodes) for _, nodes in part) <= most

    todo.sort(key=length)
    read: set[Node] = set()
    with torch.inference_mode():
        for part in passes(todo, fits):
            width = length(part[-1])
            ids = [
                _padded(
                    [*questions[row].prompt, *(questions[row].trie.tokens[node] for node in branch[1:])],
                    width,
                )
                for row, branch in part
            ]
            nodes, places, columns = _not_read(part, [question.trie for question in questions], read)
            columns = [
                len(questions[row].prompt) - 1 + column
                for (row, _), column in zip(nodes, columns, strict=True)
            ]
            with _logits_at(model, places, columns):
                logits = model(input_ids=torch.tensor(ids, device=device), use_cache=False).logits
            scores.read(logits[0], nodes)
    return scores.of_answers()


def _not_read(
    part: Sequence[Branch], tries: Sequence[LabelTrie], read: set[Node]
) -> tuple[list[Node], list[int], list[int]]:
    """The nodes of branches where something is asked that are not in `read`, which gets them, with their rows and columns in the
    batch; the end of a branch is always one."""
    found = []
    for place, (row, branch) in enumerate(part):
        for column, node in enumerate(branch):
            if node in tries[row].wanted and (row, node) not in read:
                read.add((row, node))
                found.append(((row, node), place, column))
    nodes, places, columns = map(list, zip(*found, strict=True))
    return nodes, places, columns


@contextlib.contextmanager
def _logits_at(model: PreTrainedModel, rows: Sequence[int], columns: Sequence[int]) -> Iterator[None]:
    """Inside the `with` the output layer runs on these tokens of a batch alone; logits have the shape [1, tokens, vocabulary]."""

    head = model.get_output_embeddings()
    at_row, at_column = sent(torch.tensor([rows, columns]), head.weight.device)

    def select(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return given[0][at_row, at_column][None], *given[1:]

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def _most_logits(model: PreTrainedModel, max_tokens: int) -> int:
    """Tokens of one pass of at most `max_tokens` that logits may be computed for."""
    weight = model.get_output_embeddings().weight
    return int(LOGITS_BYTES_A_TOKEN.get(weight.device.type, 64 * 2**10) * max_tokens // (4 * weight.shape[0]))


def _padded(ids: Sequence[int], length: int) -> list[int]:
    """Tokens that are never read, behind the row's own."""
    return [*ids, *[0] * (length - len(ids))]


def score_one_by_one(model: PreTrainedModel, question: Question) -> list[float]:
    """The same with one plain forward pass for every answer: for models whose attention cannot be replaced, and to check."""
    device = next(model.parameters()).device
    answers = [[token for _, token in path] for path in question.trie.paths]
    scores = []
    with torch.inference_mode():
        for answer, begin in zip(answers, question.trie.asked, strict=True):
            ids = torch.tensor([[*question.prompt, *answer[:-1]]], device=device)
            logits = model(input_ids=ids, logits_to_keep=len(answer), use_cache=False).logits[0]
            # Some models keep all positions, whatever they are asked for (xLSTM).
            logits = logits[-len(answer) :].float()
            picked = logits.log_softmax(-1)[range(len(answer)), answer]
            scores.append(math.fsum(picked[begin:].cpu().tolist()))
    return scores


def leak_between_rows(
    model: PreTrainedModel, questions: Sequence[Question], slack: float = 0.0
) -> str | None:
    """How the tokens of one row, or of one of its answers, change the logits of another, in words; None if they do not.

    Shapes and places stay the same, so that rounding does too.

    Args:
        slack: as of `moved_by`.
    """

    def logits(asked: Sequence[Question]) -> list[Any]:
        short = [replace(question, prompt=question.prompt[-LEAK_TOKENS:]) for question in asked]
        nothing = KVCache()
        segments = [_segment(question, 0, nothing) for question in short]
        for segment in segments:
            # A state fades; the first tokens behind another row feel it most.
            segment.wanted = [*range(min(FIRST_TOKENS, segment.wanted[0])), *segment.wanted]
        return list(run_segments(model, segments).split([len(segment.wanted) for segment in segments]))

    # All nodes are looked at, whatever is asked of them.
    questions = [
        replace(question, trie=replace(question.trie, asked=(0,) * len(question.trie.paths)))
        for question in questions
    ]
    with torch.inference_mode(), segment_attention_on(model):
        before, again = logits(questions), logits(questions)
        for changed, question in enumerate(questions):
            trie = question.trie
            row = replace(question, prompt=other_tokens(question.prompt))
            # The nodes behind the end of a branch stand behind it in the segment, but do not see it.
            end = next((node for node in range(1, len(trie)) if node not in trie.parents), None)
            tokens = [0 if node == end else token for node, token in enumerate(trie.tokens)]
            answer = replace(question, trie=replace(trie, tokens=tuple(tokens)))
            own = len(before[changed]) - len(trie) + (end or 0)
            for what, asked, places in (("row", row, slice(None)), ("answer", answer, slice(own, own + 1))):
                after = logits([*questions[:changed], asked, *questions[changed + 1 :]])
                after[changed][places] = before[changed][places]
                for each in zip(before, again, after, strict=True):
                    leak = moved_by(what, *each, slack)
                    if leak is not None:
                        return leak
    return None
