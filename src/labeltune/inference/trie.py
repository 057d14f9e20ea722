"""The candidate answers of a row as a token trie; integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
