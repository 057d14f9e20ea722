"""Exact log-probabilities of every candidate answer of a row, from one forward pass over the prompt and a trie of the answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from labeltune.models.precision import moved_by, other_tokens
from labeltune.models.tree_attention import KVCache, Segment, run_segments, segment_attention_on
from labeltune.prompts.builder import common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel
#: Memory that the logits of one pass may take.
LOGITS_BYTES = 256 * 2**20
#: Common tokens beyond what is kept already for which computing the beginning again is worth it.
WORTH_KEEPING = 32


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
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    paths: tuple[tuple[tuple[int, int], ...], ...]

    @staticmethod
    def of(answers: Sequence[Sequence[int]]) -> LabelTrie:
        """The trie of answers given as token ids, each with its end of turn.

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
        return LabelTrie(tuple(tokens), tuple(parents), tuple(depths), tuple(paths))

    def __len__(self) -> int:
        """Number of nodes, the end of the prompt included."""
        return len(self.tokens)

    def ancestors(self) -> list[list[int]]:
        """For every node but 0 the nodes it sees, itself included and node 0 left out (the prompt is seen by all)."""
        seen: list[list[int]] = [[]]
        for node in range(1, len(self)):
            seen.append([*seen[self.parents[node]], node])
        return seen[1:]


@dataclass(frozen=True)
class Question:
    """A prompt and the answers to compare.

    Attributes:
        prompt: token ids, at least one.
        trie: the candidate answers.
    """

    prompt: Sequence[int]
    trie: LabelTrie


class PrefixCache:
    """Keys and values of the tokens that all prompts of a file begin with; kept from call to call."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Free the memory; needed when the weights have changed."""
        self.ids: tuple[int, ...] = ()
        self._held = KVCache()

    def _shared(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many tokens of these prompts to take from here; at least one of each prompt is left over."""
        ordered = sorted(map(list, prompts))
        common = min(common_prefix(ordered[0], ordered[-1]), min(map(len, prompts)) - 1)
        held = len(self.ids)
        fits = held <= common and tuple(ordered[0][:held]) == self.ids
        if fits and (len(prompts) == 1 or common - held < WORTH_KEEPING):
            return held
        return common if len(prompts) > 1 else 0

    def common(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> KVCache:
        """What these prompts begin with, computed where it is not known yet; call inside `segment_attention_on`."""
        return self._get(model, prompts[0][: self._shared(prompts)])

    def _get(self, model: PreTrainedModel, ids: Sequence[int]) -> KVCache:
        """Keys and values of exactly these tokens."""
        wanted = tuple(ids)
        if wanted != self.ids:
            self.clear()
            held = KVCache()
            if wanted:
                run_segments(model, [Segment(wanted, held, keep=True)])
            self.ids, self._held = wanted, held
        return self._held


def score_answers(
    model: PreTrainedModel,
    questions: Sequence[Question],
    max_tokens: int,
    cache: PrefixCache,
) -> list[list[float]]:
    """Natural logarithm of the probability of every complete answer, end of turn included.

    Rows are taken in the order of their tokens, so that those of one pass share as much of their prompts as they can; how
    they are cut into passes changes nothing but rounding.

    Args:
        max_tokens: tokens of one pass (a row that needs more has a pass of its own).
    """
    found: list[list[float]] = [[] for _ in questions]
    if not questions:
        return found
    vocabulary = model.get_output_embeddings().weight.shape[0]
    with torch.inference_mode(), segment_attention_on(model):
        prefix = cache.common(model, [question.prompt for question in questions])
        begin = prefix.length
        for rows, shared in plan_passes(questions, begin, max_tokens, LOGITS_BYTES // (4 * vocabulary)):
            segments = []
            parent = prefix
            if shared > begin:
                parent = KVCache(prefix)
                segments.append(Segment(questions[rows[0]].prompt[begin:shared], parent, keep=True))
            segments += [_segment(questions[row], shared, parent) for row in rows]
            logits = run_segments(model, segments)
            start = 0
            for row in rows:
                trie = questions[row].trie
                found[row] = path_scores(logits[start : start + len(trie)], trie)
                start += len(trie)
    return found


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
            if tokens <= max_tokens and nodes + len(trie) <= max_nodes:
                rows.append(i)
                shared, own, nodes = common, own + size, nodes + len(trie)
                continue
            yield rows, shared if len(rows) > 1 else begin
        rows, shared, own, nodes = [i], len(prompt) - 1, size, len(trie)
    if rows:
        yield rows, shared if len(rows) > 1 else begin


def _segment(question: Question, shared: int, parent: KVCache) -> Segment:
    """The row's own part of the prompt and after it the trie, each node of which sees the prompt and its ancestors."""
    own, trie = list(question.prompt[shared:]), question.trie
    count = len(own)
    ids = own + list(trie.tokens[1:])
    visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    visible[count:, count:] = False
    for node, seen in enumerate(trie.ancestors(), start=1):
        visible[count + node - 1, [count + other - 1 for other in seen]] = True
    depths = [*range(count), *(count - 1 + depth for depth in trie.depths[1:])]
    return Segment(
        ids, parent, depths=depths, visible=visible, wanted=range(count - 1, len(ids)), begins_at=shared
    )


def path_scores(logits: torch.Tensor, trie: LabelTrie) -> list[float]:
    """Sums of log-probabilities along the paths of a trie; logits of shape [nodes, vocabulary]."""
    steps = [step for path in trie.paths for step in path]
    nodes, tokens = (torch.tensor(column, device=logits.device) for column in zip(*steps, strict=True))
    logits = logits.float()
    values = (logits[nodes, tokens] - torch.logsumexp(logits, dim=-1)[nodes]).cpu().tolist()
    scores, start = [], 0
    for path in trie.paths:
        scores.append(math.fsum(values[start : start + len(path)]))
        start += len(path)
    return scores


def score_one_by_one(model: PreTrainedModel, question: Question) -> list[float]:
    """The same with one plain forward pass for every answer: for models whose attention cannot be replaced, and to check."""
    device = next(model.parameters()).device
    answers = [[token for _, token in path] for path in question.trie.paths]
    scores = []
    with torch.inference_mode():
        for answer in answers:
            ids = torch.tensor([[*question.prompt, *answer[:-1]]], device=device)
            logits = model(input_ids=ids, logits_to_keep=len(answer), use_cache=False).logits[0]
            # Some models keep all positions, whatever they are asked for (xLSTM).
            logits = logits[-len(answer) :].float()
            picked = logits.log_softmax(-1)[range(len(answer)), answer]
            scores.append(math.fsum(picked.cpu().tolist()))
    return scores


def leak_between_rows(model: PreTrainedModel, questions: Sequence[Question]) -> str | None:
    """How the tokens of one row, or of one of its answers, change the logits of another, in words; None if they do not.

    Shapes and places stay the same, so that rounding does too: it is compared without a tolerance.
    """

    def logits(asked: Sequence[Question]) -> list[Any]:
        segments = [_segment(question, 0, KVCache()) for question in asked]
        return list(run_segments(model, segments).split([len(question.trie) for question in asked]))

    with torch.inference_mode(), segment_attention_on(model):
        before, again = logits(questions), logits(questions)
        for changed, question in enumerate(questions):
            trie = question.trie
            row = replace(question, prompt=other_tokens(question.prompt))
            # The last node of a trie has no children.
            answer = replace(question, trie=replace(trie, tokens=(*trie.tokens[:-1], 0)))
            for what, asked, own in (("row", row, slice(None)), ("answer", answer, slice(-1, None))):
                after = logits([*questions[:changed], asked, *questions[changed + 1 :]])
                after[changed][own] = before[changed][own]
                for each in zip(before, again, after, strict=True):
                    leak = moved_by(what, *each)
                    if leak is not None:
                        return leak
    return None
