"""Probabilities of labels, and entities with their places, from a server that serves an export, as `labeltune predict` gives them.

This file needs httpx alone, and may be copied to where nothing else of labeltune is:

    client = LabelClient("http://localhost:8000/v1", "exported")     # the folder, or its client.json
    client.predict("The match ended in the rain.")                   # {"label": "Sports", "confidence": 0.98, "ranking": [...]}
    client.predict("Mara left Oslo.")                                # {"entities": [{"text": "Mara", "label": "person", "start": 0, "end": 4}, ...]}

A server tells how probable a text is token by token: by `prompt_logprobs` (vLLM), by `logprobs` of an answer that a grammar holds to its
tokens (llama.cpp's server), else by `echo` and `logprobs` (llama-cpp-python). Every label's complete answer is asked about behind the prompt
of the run, and compared as the run compares them. Answers with entities are written under a grammar of the text they are about, so that an
entity is a piece of it, wherever the grammar is obeyed; where it is not, that is an error.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

CLIENT_FILE = "client.json"
#: What it tells: of every run, of runs that give labels, and of those that give entities.
_ALWAYS = {"model", "task", "labels", "max_length", "added_bos", "special_tokens"}
_ALWAYS |= {"descriptions", "before", "after", "strip", "lead", "closing"}
_OF_LABELS = {"batched", "words", "end", "temperature", "length_norm", "scales", "threshold", "thresholds"}
_OF_ENTITIES = {"none", "marks", "depth", "frame", "max_tokens", "max_new_tokens", "stop"}
#: Answers with entities: one JSON object a line, or the text with marks.
_BEFORE_TEXT, _BEFORE_LABEL, _LINE_END = '{"entity_text": "', '", "entity_label": "', '"}'
_OPEN, _SEPARATOR, _CLOSE, _ESCAPE = "[", "|", "]", "\\"


class ServerError(Exception):
    """The server cannot be reached, refuses, or reads the prompt otherwise than the run does."""


class LabelClient:
    """Asks one server about one export.

    Args:
        url: of the server's OpenAI protocol, with `/v1`.
        export: the exported folder, or its `client.json`.
        model: what the server calls it; the export's own name when None.
        api_key: the server's, if it wants one.
        timeout: seconds until an answer is given up.
        transport: for tests.

    Raises:
        ValueError: the export has no such file, or was made by another version.
    """

    def __init__(
        self,
        url: str,
        export: str | os.PathLike[str],
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        file = Path(export)
        file = file / CLIENT_FILE if file.is_dir() else file
        if not file.is_file():
            raise ValueError(
                f"there is no {file}; `labeltune export` writes it where a server reads prompts as the run does"
            )
        self._run: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        own = _OF_ENTITIES if self._run.get("task") == "ner" else _OF_LABELS
        if missing := (_ALWAYS | own) - self._run.keys():
            raise ValueError(f"{file} does not tell {', '.join(sorted(missing))}; export the run again")
        self._model = model or self._run["model"]
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=url.rstrip("/") + "/", headers=headers, timeout=timeout, transport=transport
        )
        self._tell: Callable[[Sequence[str]], list[list[tuple[str, float]]]] | None = None

    def predict(self, text: str, labels: Sequence[str] | None = None) -> dict[str, Any]:
        """The answer about a text: `label` and `confidence`, or `labels` of a run that gives several, and `ranking`; or `entities` in order.

        Args:
            labels: the candidates; those of the run when None. An extractor always looks for all of its own.

        Raises:
            ServerError: see there.
            ValueError: the text is empty, too long, or holds a special token of the model; a label is not known to a run of several.
        """
        if self._run["task"] == "ner":
            return self._entities(text)
        found = self.probabilities(text, labels)
        ranking = sorted(found.items(), key=lambda pair: -pair[1])
        shown = [{"label": label, "probability": round(value, 6)} for label, value in ranking]
        if self._run["task"] == "multilabel":
            own, common = self._run["thresholds"], self._run["threshold"]
            given = [label for label, value in ranking if value >= own.get(label, common)]
            return {"labels": given, "ranking": shown}
        return {"label": ranking[0][0], "confidence": shown[0]["probability"], "ranking": shown}

    def probabilities(self, text: str, labels: Sequence[str] | None = None) -> dict[str, float]:
        """Of every candidate the probability that it is the right one, or, of a run that gives several, that it applies.

        Raises:
            ServerError, ValueError: as `predict`.
        """
        run = self._run
        if run["task"] == "ner":
            raise ValueError("this run extracts entities; ask predict")
        names = list(labels or run["labels"])
        prompt, _ = self._prompt(text, names)
        if run["task"] == "multilabel":
            answers = [f"{run['lead']}{name}{word}" for name in names for word in run["words"]]
        else:
            answers = [f"{run['lead']}{name}{run['end']}" for name in names]
        scores, lengths = self._scores(prompt, answers)
        if run["task"] == "multilabel":
            return {
                name: self._applies(name, yes - no)
                for name, yes, no in zip(names, scores[::2], scores[1::2], strict=True)
            }
        if run["length_norm"] == "tokens":
            scores = [score / length for score, length in zip(scores, lengths, strict=True)]
        return dict(zip(names, _softmax([score / run["temperature"] for score in scores]), strict=True))

    def _entities(self, text: str) -> dict[str, Any]:
        run = self._run
        prompt, shown = self._prompt(text, run["labels"])
        if run["marks"]:
            answer, cut, _ = self._written(prompt, _marks_grammar(run, shown))
            places = _marked(run, answer, shown, cut)
        else:
            pairs, cut = self._pairs(prompt, shown)
            places = _located(shown, pairs)
        begins = text.find(shown)
        told = [
            {"text": shown[a:b], "label": label, "start": begins + a, "end": begins + b}
            for a, b, label in places
        ]
        return {"entities": told, **({"truncated": True} if cut else {})}

    def _pairs(self, prompt: str, text: str) -> tuple[list[tuple[str, str]], bool]:
        """(entity text, label) of each line of an answer, and whether it was cut off.

        A run gives no entity more often than it occurs, which a grammar of the whole answer cannot say: from the line on that does, the answer
        is asked for again, without the entities that are spent.
        """
        run, kept, own = self._run, list[tuple[str, str]](), None
        while form := _lines_grammar(
            run, text, [part for part, _ in kept if _given(kept, part) == text.count(part)]
        ):
            lines = "".join(f"{_line(*pair)}\n" for pair in kept)
            answer, cut, read = self._written(prompt, form, f"{run['lead']}{lines}" if kept else "", own)
            own = read if own is None else own
            found = kept + _read_lines(run, answer, text, cut)
            wrong = [
                n for n, (part, _) in enumerate(found) if _given(found[: n + 1], part) > text.count(part)
            ]
            if not wrong:
                return found, cut
            if wrong[0] == len(kept):
                raise _ignored(answer)
            kept = found[: wrong[0]]
        return kept, False

    def _written(
        self, prompt: str, form: str, before: str = "", own: int | None = None
    ) -> tuple[str, bool, int]:
        """What the server writes behind a prompt and the beginning of an answer under a grammar; whether that was cut off; tokens it read.

        Args:
            own: tokens of the prompt without that beginning; None where there is none.
        """
        run = self._run
        if self._tell is None:
            self._tell = self._way(prompt)
        asked: str | list[int] = prompt + before
        if self._tell == self._by_grammar:
            asked = self._ids(prompt + before) or asked
        elif self._tell == self._by_echo:
            asked = (prompt + before).removeprefix(run["added_bos"])
        body: dict[str, Any] = {"repetition_penalty": 1.0, "stop_token_ids": run["stop"]}
        bound = {"grammar": form}
        body |= {"structured_outputs": bound} if self._tell == self._by_prompt else bound
        body |= {"add_special_tokens": False, "max_tokens": run["max_tokens"]}
        answer, cut, read, written = self._completion(asked, body)
        # A text is copied with its marks, and how many tokens it has is known from the first answer on.
        copy = max(read - run["frame"], 0) if run["marks"] else 0
        tokens = read + (copy + run["closing"] if run["marks"] else 0)
        if tokens > run["max_length"] and not before:
            raise ValueError(
                f"the text makes {tokens} tokens, and the run reads {run['max_length']} at once; cut it, or predict with labeltune"
            )
        allowed = run["max_new_tokens"] + 1 + copy - (read - own if own is not None else 0)
        if written > allowed:
            if allowed < 1:
                return "", True, read
            answer, cut, *_ = self._completion(asked, body | {"max_tokens": allowed})
        return answer.removeprefix(run["lead"]), cut, read

    def _completion(self, prompt: Any, more: Mapping[str, Any]) -> tuple[str, bool, int, int]:
        """What is written behind a prompt; whether that was cut off; tokens that were read and that were written."""
        told = self._told(prompt, more)
        try:
            choice, usage = told["choices"][0], told["usage"]
            read, written = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            return str(choice["text"]), choice["finish_reason"] == "length", read, written
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(
                f"the server does not tell its answer, its end and its tokens: {error}"
            ) from error

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> LabelClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _applies(self, label: str, odds: float) -> float:
        slope, intercept = self._run["scales"].get(label, (1 / self._run["temperature"], 0.0))
        return 1 / (1 + math.exp(-max(min(slope * odds + intercept, 700.0), -700.0)))

    def _prompt(self, text: str, labels: Sequence[str]) -> tuple[str, str]:
        """The prompt, and the text as it stands in it."""
        run = self._run
        left, right = run["strip"]
        text = text.lstrip(left) if left != "" else text
        text = text.rstrip(right) if right != "" else text
        if not text.strip():
            raise ValueError("the text is empty")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds half a character at {error.start}") from None
        special = next((token for token in run["special_tokens"] if token in text), None)
        if special is not None:
            raise ValueError(f"the text holds {special}, which the server would read as the model's own")
        places = _listed(labels, run["descriptions"])
        before, after = (_filled(part, places) for part in (run["before"], run["after"]))
        return f"{before}{text}{after}", text

    def _scores(self, prompt: str, answers: Sequence[str]) -> tuple[list[float], list[int]]:
        """Natural logarithms of the probabilities of answers behind a prompt, and their tokens."""
        asked = [prompt, *(prompt + answer for answer in answers)]
        first, *others = self._tokens(asked)
        scores, lengths = [], []
        for answer, found in zip(answers, others, strict=True):
            if [token for token, _ in found[: len(first)]] != [token for token, _ in first]:
                raise ServerError(
                    f"the server reads the end of the prompt otherwise before {answer!r}; predict with labeltune"
                )
            own = found[len(first) :]
            scores.append(math.fsum(value for _, value in own))
            lengths.append(len(own))
        most = len(first) + max(lengths) + self._run["closing"]
        if most > self._run["max_length"]:
            raise ValueError(
                f"the text makes {most} tokens with its longest answer, and the run reads {self._run['max_length']}; shorten it"
            )
        return scores, lengths

    def _tokens(self, texts: Sequence[str]) -> list[list[tuple[str, float]]]:
        """The tokens of texts, each with the natural logarithm of its probability. Of tokens that all texts begin with it may be 0."""
        if self._tell is None:
            self._tell = self._way(texts[0])
        return self._tell(texts)

    def _way(self, text: str) -> Callable[[Sequence[str]], list[list[tuple[str, float]]]]:
        """How this server tells it."""
        (found,) = self._asked([text], {"prompt_logprobs": 0, "add_special_tokens": False})
        if found.get("prompt_logprobs"):
            return self._by_prompt
        return self._by_echo if self._ids("a") is None else self._by_grammar

    def _by_prompt(self, texts: Sequence[str]) -> list[list[tuple[str, float]]]:
        parts = [texts] if self._run["batched"] else [[text] for text in texts]
        more = {"prompt_logprobs": 0, "add_special_tokens": False}
        choices = [choice for part in parts for choice in self._asked(part, more)]
        return [_of_prompt(choice.get("prompt_logprobs")) for choice in choices]

    def _by_echo(self, texts: Sequence[str]) -> list[list[tuple[str, float]]]:
        # Such a server puts the token that begins every text there itself.
        bos = self._run["added_bos"]
        choices = [
            choice
            for text in texts
            for choice in self._asked([text.removeprefix(bos)], {"echo": True, "logprobs": 1})
        ]
        return [_of_echo(choice.get("logprobs"), choice.get("text", "")) for choice in choices]

    def _by_grammar(self, texts: Sequence[str]) -> list[list[tuple[str, float]]]:
        """What a text has more than the first one is written again, held to its tokens; the probabilities are those before it was held.

        A grammar holds it to all tokens but the last one, which ends a turn and is no part of a grammar; a bias holds it to that.
        """
        read = [self._ids(text) for text in texts]
        if any(ids is None for ids in read):
            raise ServerError(f"{self._http.base_url} does not tokenize as llama.cpp's server does")
        first, *others = [ids or [] for ids in read]
        for text, ids in zip(texts[1:], others, strict=True):
            if ids[: len(first)] != first or len(ids) == len(first):
                raise ServerError(
                    f"the server reads the end of the prompt otherwise before {text[len(texts[0]) :]!r}; predict with labeltune"
                )
        held = {"temperature": 0, "logprobs": 1}
        logs: list[list[float]] = []
        for ids in others:
            words = ids[len(first) : -1]
            form = "root ::= " + " ".join(f"<[{token}]>" for token in words)
            asked = self._asked([first], {**held, "grammar": form, "max_tokens": len(words)}) if words else []
            logs.append(_of_written(asked[0].get("logprobs"), words) if words else [])
        for last in dict.fromkeys(ids[-1] for ids in others):
            numbers = [number for number, ids in enumerate(others) if ids[-1] == last]
            asked = self._asked(
                [others[number][:-1] for number in numbers], {**held, "logit_bias": [[last, 1000]]}
            )
            for number, choice in zip(numbers, asked, strict=True):
                logs[number] += _of_written(choice.get("logprobs"), [last])
        known = [0.0] * len(first)
        told = [known, *([*known, *values] for values in logs)]
        return [
            list(zip(map(str, ids), values, strict=True))
            for ids, values in zip([first, *others], told, strict=True)
        ]

    def _ids(self, text: str) -> list[int] | None:
        """A text's tokens as llama.cpp's server reads it; None of another server."""
        root = str(self._http.base_url).rstrip("/").removesuffix("/v1")
        try:
            answer = self._http.post(
                f"{root}/tokenize", json={"content": text, "add_special": False, "parse_special": True}
            )
            return list(answer.json()["tokens"]) if answer.is_success else None
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None

    def _asked(
        self, texts: Sequence[str] | Sequence[list[int]], more: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """The choices of a completion, one a prompt; prompts are texts or token ids."""
        answer = self._told(list(texts) if len(texts) > 1 else texts[0], {"max_tokens": 1, **more})
        choices: list[dict[str, Any]] = answer["choices"]
        if len(choices) != len(texts):
            raise ServerError(f"{len(texts)} prompts were asked, {len(choices)} were answered")
        return choices

    def _told(self, prompt: Any, more: Mapping[str, Any]) -> dict[str, Any]:
        body = {"model": self._model, "prompt": prompt, "temperature": 0, **more}
        try:
            answer = self._http.post("completions", json=body)
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
            found["choices"] = sorted(found["choices"], key=lambda each: each["index"])
        except httpx.HTTPStatusError as error:
            raise ServerError(f"{error.response.status_code}: {error.response.text[:500]}") from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"{self._http.base_url} does not answer as a server of completions does: {error}"
            ) from error
        return found


def _of_prompt(found: Any) -> list[tuple[str, float]]:
    """vLLM's `prompt_logprobs`: a mapping from token id a place, the token of the prompt first; nothing for the first place."""
    if not found:
        raise ServerError("the server gives no prompt_logprobs")
    tokens = [("", 0.0)]
    for place in found[1:]:
        token, told = next(iter(place.items()))
        tokens.append((str(token), float(told["logprob"])))
    return tokens


def _of_echo(found: Any, text: str) -> list[tuple[str, float]]:
    """The completions protocol's `logprobs` of an echoed prompt, without the one token that follows it."""
    if not found or not found.get("tokens"):
        raise ServerError(
            f"the server gives no probabilities of a prompt, neither by prompt_logprobs nor by echo (it wrote {text[:80]!r}); "
            "llama-cpp-python does with logits_all=True"
        )
    pairs = zip(found["tokens"][:-1], found["token_logprobs"][:-1], strict=True)
    return [(str(token), 0.0 if value is None else float(value)) for token, value in pairs]


def _of_written(found: Any, ids: Sequence[int]) -> list[float]:
    """The chat protocol's `logprobs` of written tokens, as llama.cpp's server gives them for completions, too."""
    try:
        told = [(int(each["id"]), float(each["logprob"])) for each in (found or {}).get("content", ())]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(f"the server tells the probabilities of tokens in another form: {error}") from error
    if [token for token, _ in told] != list(ids):
        raise ServerError(
            f"the server was held to the tokens {list(ids)} and wrote {[token for token, _ in told]}; it has to know grammars of tokens"
        )
    return [value for _, value in told]


def _marks_grammar(run: Mapping[str, Any], text: str) -> str:
    """The answers that there can be about a text (GBNF, which llama.cpp, xgrammar and llguidance read): the text, with marks."""
    none, lead = _quoted(run["lead"] + run["none"]), _quoted(run["lead"])
    ends = [_quoted(f"{_SEPARATOR}{_escaped(label, True)}{_CLOSE}") for label in run["labels"]]
    rules = [f"root ::= {none} | {lead} p0x0", f"end ::= {' | '.join(ends)}"]
    units = [_quoted(_escaped(character, True)) for character in text]
    for depth in range(run["depth"] + 1):
        for at in range(len(units) + 1):
            # An entity that has just begun goes on with a character or another one; behind that it may end.
            on = [f"{units[at]} p{depth}x{at + 1}"] if at < len(units) else []
            on += [f'"{_OPEN}" b{depth + 1}x{at}'] if on and depth < run["depth"] else []
            closes = [f"end p{depth - 1}x{at}"] if depth else [] if on else ['""']
            rules.append(f"p{depth}x{at} ::= {' | '.join([*on, *closes])}")
            rules += [f"b{depth}x{at} ::= {' | '.join(on)}"] if depth and on else []
    return "\n".join(rules)


def _lines_grammar(run: Mapping[str, Any], text: str, spent: Sequence[str]) -> str:
    """The same of answers of a line an entity: pieces of the text, but for those that are spent; nothing where no piece is left."""
    units = [_quoted(_escaped(character, False)) for character in text]
    rules, starts = [], []
    for at, unit in enumerate(units):
        rules.append(f"t{at} ::= {unit}" + (f" t{at + 1}?" if at + 1 < len(units) else ""))
        # Where a spent piece stands, its characters have rules of their own, which do not end behind it.
        most = max((len(part) for part in spent if text.startswith(part, at)), default=0)
        onward = f"t{at + most}" if at + most < len(units) else ""
        for size in range(most, 0, -1):
            may_end = text[at : at + size] not in spent
            if onward or may_end:
                rules.append(
                    f"x{at}y{size} ::= {units[at + size - 1]} {onward}{'?' * (may_end and bool(onward))}"
                )
                onward = f"x{at}y{size}"
        starts += [onward] if onward else []
    if not starts:
        return ""
    none = "" if spent else f"{_quoted(run['lead'] + run['none'])} | {_quoted(run['lead'])} "
    labels = " | ".join(_quoted(_escaped(label, False)) for label in run["labels"])
    line = f"{_quoted(_BEFORE_TEXT)} text {_quoted(_BEFORE_LABEL)} label {_quoted(_LINE_END)}"
    head = [f'root ::= {none}line ("\\n" line)*', f"line ::= {line}", f"label ::= {labels}"]
    return "\n".join([*head, f"text ::= {' | '.join(starts)}", *rules])


def _escaped(text: str, marks: bool) -> str:
    """As it stands in an answer."""
    if not marks:
        return json.dumps(text, ensure_ascii=False)[1:-1]
    return "".join(_ESCAPE * (each in (_OPEN, _SEPARATOR, _CLOSE, _ESCAPE)) + each for each in text)


def _quoted(text: str) -> str:
    """A string of a grammar; llama.cpp, xgrammar and llguidance read control characters in one form alone."""
    known = {'"': r"\"", "\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
    control = (sign if 32 <= ord(sign) != 127 else rf"\x{ord(sign):02X}" for sign in text)
    return '"' + "".join(known.get(sign, written) for sign, written in zip(text, control, strict=True)) + '"'


def _read_lines(run: Mapping[str, Any], answer: str, text: str, cut: bool) -> list[tuple[str, str]]:
    """(entity text, label) of each line of an answer; the one that a `cut` one ends in is left out.

    Raises:
        ServerError: a grammar does not allow it.
    """
    if answer.strip() == run["none"] or (cut and run["none"].startswith(answer)):
        return []
    found = []
    *lines, last = answer.split("\n")
    if not cut:
        lines.append(last)
    elif last[: len(_BEFORE_TEXT)] != _BEFORE_TEXT[: len(last)]:
        raise _ignored(answer)
    for line in lines:
        try:
            value = json.loads(line)
            part, label = str(value["entity_text"]), str(value["entity_label"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _ignored(answer) from None
        if not part or part not in text or label not in run["labels"]:
            raise _ignored(answer)
        found.append((part, label))
    return found


def _marked(run: Mapping[str, Any], answer: str, text: str, cut: bool) -> list[tuple[int, int, str]]:
    """The entities of a text with marks, (start, end, label) in characters; what was begun in a `cut` one is left out.

    Raises:
        ServerError: it is not the text, or a grammar does not allow its marks.
    """
    if answer.strip() == run["none"] or (cut and run["none"].startswith(answer)):
        return []
    ends = {f"{_SEPARATOR}{_escaped(label, True)}{_CLOSE}": label for label in run["labels"]}
    found: list[tuple[int, int, str]] = []
    opened: list[int] = []
    at, place, unit = 0, 0, ""
    while place < len(answer):
        end = next((end for end in ends if answer.startswith(end, place)), None)
        unit = _escaped(text[at : at + 1], True)
        if end is not None and opened and opened[-1] < at:
            found.append((opened.pop(), at, ends[end]))
            place += len(end)
        elif answer[place] == _OPEN:
            opened.append(at)
            place += 1
        elif unit and answer.startswith(unit, place):
            at, place = at + 1, place + len(unit)
        else:
            break
    left = answer[place:].rstrip("\ufffd")  # of a character that was cut
    begun = any(each.startswith(left) for each in (*ends, unit))
    if not (begun if cut else not left and at == len(text) and not opened):
        raise _ignored(answer)
    return sorted(set(found))


def _ignored(answer: str) -> ServerError:
    return ServerError(
        f"the server was held to a grammar and wrote {answer[:200]!r}; it has to know grammars, as vLLM and llama.cpp do"
    )


def _line(part: str, label: str) -> str:
    """An entity as it stands in an answer."""
    return f"{_BEFORE_TEXT}{_escaped(part, False)}{_BEFORE_LABEL}{_escaped(label, False)}{_LINE_END}"


def _given(pairs: Sequence[tuple[str, str]], part: str) -> int:
    return sum(earlier == part for earlier, _ in pairs)


def _located(text: str, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int, str]]:
    """Give entities, none more often than it occurs, their places as labeltune.prompts.ner.locate does."""
    found: list[tuple[int, int, str]] = []
    cursor = 0
    for part, label in pairs:
        places = [at for at in range(len(text)) if text.startswith(part, at)]
        taken = [(start, end) for start, end, _ in found]
        free = [at for at in places if not any(at < end and start < at + len(part) for start, end in taken)]
        left = [at for at in places if (at, at + len(part)) not in taken]
        start = next(iter([*(at for at in free if at >= cursor), *free, *left]))
        cursor = start + len(part)
        found.append((start, cursor, label))
    return found


def _listed(labels: Sequence[str], descriptions: Mapping[str, str]) -> dict[str, str]:
    """What the places of a prompt are filled with, as labeltune.prompts.descriptions has it."""
    if not any(label in descriptions for label in labels):
        return {"category": repr(list(labels)), "labels": "; ".join(labels)}
    lines = "".join(
        f"\n{name}: {descriptions[name]}" if name in descriptions else f"\n{name}" for name in labels
    )
    return {"category": lines, "labels": lines}


def _filled(part: str, places: Mapping[str, str]) -> str:
    """A part of a prompt with its places filled; what is put in is not looked into."""
    pieces = part.split("{")
    found = [pieces[0]]
    for piece in pieces[1:]:
        name, brace, rest = piece.partition("}")
        found.append(places[name] + rest if brace and name in places else "{" + piece)
    return "".join(found)


def _softmax(scores: Sequence[float]) -> list[float]:
    most = max(scores)
    values = [math.exp(score - most) for score in scores]
    return [value / math.fsum(values) for value in values]
