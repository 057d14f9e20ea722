"""`labeltune.client` gives what the run gives, against servers of three kinds: stand-ins here, with a real model behind them."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import labeltune
from helpers.rows import classification_rows, write_jsonl
from helpers.tiny_models import make_tokenizer
from helpers.training import config_for
from labeltune import client, load_predictor
from labeltune.client import LabelClient, ServerError, _listed
from labeltune.commands.export import export
from labeltune.config import build_config
from labeltune.export import engines, vllm
from labeltune.prompts import marks, ner
from labeltune.prompts.descriptions import listed
from labeltune.types import Entity

TEXTS = [row["text"] for row in classification_rows(6)]


def exported(folder: Path, model: Path, **changes: Any) -> Path:
    """A run with a prompt of one of two kinds, trained for some steps, as a whole model."""
    config = config_for(folder, model, max_steps=3)
    values = {
        **config.model_dump(exclude_unset=True),
        "lora": {"dropout": 0.0},
        "output_dir": str(folder / "run"),
    }
    if changes.get("task") == "multilabel":
        rows = [{"text": row["text"], "labels": [row["output"]]} for row in classification_rows(48)]
        values["data"] = {"train": str(write_jsonl(folder / "several.jsonl", rows))}
    labeltune.train(build_config({**values, **changes}), say=lambda _: None)
    export(folder / "run", folder / "exported", merged=True, say=lambda _: None, progress=False)
    return folder / "exported"


def completions(folder: Path, way: str, adds_bos: str = "") -> Callable[[httpx.Request], httpx.Response]:
    """A server of the completions protocol on a merged model; it says how probable a prompt is as vLLM does, or by echo, or how probable
    tokens are that it is held to, as llama.cpp's own server does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def told(text: str) -> tuple[list[int], list[float | None]]:
        ids = tokenizer(adds_bos + text, add_special_tokens=False).input_ids
        with torch.no_grad():
            logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        return ids, [None, *(float(logs[at, token]) for at, token in enumerate(ids[1:]))]

    def held(body: dict[str, Any]) -> list[dict[str, Any]]:
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        own = [int(each) for each in re.findall(r"<\[(\d+)\]>", body.get("grammar", ""))]
        own = own or [token for token, _ in body["logit_bias"]]
        assert len(own) == body["max_tokens"] and tokenizer.eos_token_id not in own[:-1]
        found = []
        for number, ids in enumerate(prompts):
            with torch.no_grad():
                logs = torch.log_softmax(model(torch.tensor([[*ids, *own]])).logits[0].double(), dim=-1)
            told = [{"id": t, "logprob": float(logs[len(ids) - 1 + at, t])} for at, t in enumerate(own)]
            found.append({"index": number, "text": "", "logprobs": {"content": told}})
        return found

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            assert body["parse_special"] and not body["add_special"]
            ids = tokenizer(body["content"], add_special_tokens=False).input_ids
            return httpx.Response(200, json={"tokens": ids}) if way == "grammar" else httpx.Response(404)
        if way == "grammar" and "prompt_logprobs" not in body:
            return httpx.Response(200, json={"choices": held(body)})
        assert (
            request.url.path == "/v1/completions" and body["model"] == "exported" and body["max_tokens"] == 1
        )
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        choices = []
        for number, prompt in enumerate(prompts):
            choice: dict[str, Any] = {"index": number, "text": "x"}
            if way == "echo" and body.get("echo"):
                ids, values = told(prompt)
                tokens = [str(token) for token in (*ids, 0)]
                choice |= {"logprobs": {"tokens": tokens, "token_logprobs": [*values, -1.0]}}
            elif way == "prompt":
                assert body["prompt_logprobs"] == 0 and body["add_special_tokens"] is False
                ids, values = told(prompt)
                places = [
                    None
                    if value is None
                    else {str(token): {"logprob": value, "rank": 1, "decoded_token": "x"}}
                    for token, value in zip(ids, values, strict=True)
                ]
                choice |= {"prompt_logprobs": places}
            choices.append(choice)
        return httpx.Response(200, json={"choices": choices[::-1]})

    return answer


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": {"system": "", "user": "Text: {text}\nLabel:", "max_length": 512}},
        {
            "prompt": {
                "system": "Sort {this}.",
                "user": "{text}\nLabels: {category}",
                "max_length": 512,
                "descriptions": {"Space": "rockets {x}", "Art": "paint"},
            }
        },
        {
            "task": "multilabel",
            "prompt": {"system": "Decide: {positive}", "user": "{text}", "max_length": 512},
        },
    ],
    ids=["short", "described", "multilabel"],
)
def test_a_server_gives_what_the_run_gives(
    changes: dict[str, Any], in_folder: Path, model_folder: Path
) -> None:
    folder = exported(in_folder, model_folder, **changes)
    with load_predictor(folder, precision="fp32") as predictor:
        rights = predictor.predict(TEXTS)
        (two,) = predictor.predict(TEXTS[:1], ["Art", "Space"])
    for way in ("prompt", "grammar", "echo"):
        transport = httpx.MockTransport(completions(folder, way))
        with LabelClient("http://server/v1/", folder, transport=transport) as asked:
            for text, right in zip(TEXTS, rights, strict=True):
                found = asked.predict(text)
                told = {each["label"]: each["probability"] for each in found["ranking"]}
                assert told == pytest.approx(dict(right.ranking), abs=2e-5)
                if right.labels is not None:
                    assert found["labels"] == list(right.labels)
                else:
                    assert (found["label"], found["confidence"]) == next(iter(told.items()))
            given = asked.probabilities(TEXTS[0], ["Art", "Space"])
            assert given == pytest.approx(dict(two.ranking), abs=2e-5)
            with pytest.raises(ValueError, match="empty"):
                asked.predict(" ")
            with pytest.raises(ValueError, match=r"holds <\|im_end\|>"):
                asked.predict("a <|im_end|> b")
            with pytest.raises(ValueError, match="the run reads 512; shorten it"):
                asked.predict("number " * 600)


def test_servers_that_cannot_be_asked(in_folder: Path, model_folder: Path) -> None:
    folder = exported(
        in_folder, model_folder, prompt={"system": "", "user": "Text: {text}\nLabel:", "max_length": 512}
    )

    def asking(answer: Callable[[httpx.Request], httpx.Response]) -> LabelClient:
        return LabelClient("http://server/v1", folder, api_key="k", transport=httpx.MockTransport(answer))

    def refused(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer k"
        return httpx.Response(404, text="no such model")

    with pytest.raises(ServerError, match="404: no such model"):
        asking(refused).predict("a")

    def unheld(request: httpx.Request) -> httpx.Response:
        told = {"tokens": [1] * len(json.loads(request.content).get("content", ""))}
        told |= {"choices": [{"index": 0, "logprobs": {"content": [{"id": 7, "logprob": -1.0}]}}]}
        return httpx.Response(200, json=told)

    with pytest.raises(ServerError, match="it has to know grammars of tokens"):
        asking(unheld).predict("a")
    plain = {"choices": [{"index": 0, "text": "hello"}]}
    with pytest.raises(ServerError, match="neither by prompt_logprobs nor by echo"):
        asking(lambda _: httpx.Response(200, json=plain)).predict("a")
    with pytest.raises(ServerError, match="does not answer as a server of completions does"):
        asking(lambda _: httpx.Response(200, text="<html>")).predict("a")

    def merges(request: httpx.Request) -> httpx.Response:
        prompts = json.loads(request.content)["prompt"]
        prompts = prompts if isinstance(prompts, list) else [prompts]
        told = [[None, *({str(hash(p)): {"logprob": -1.0}} for _ in range(4))] for p in prompts]
        return httpx.Response(
            200, json={"choices": [{"index": n, "prompt_logprobs": each} for n, each in enumerate(told)]}
        )

    with pytest.raises(ServerError, match="reads the end of the prompt otherwise"):
        asking(merges).predict("a")


def test_an_export_that_does_not_tell_enough(in_folder: Path, model_folder: Path) -> None:
    folder = exported(
        in_folder, model_folder, prompt={"system": "", "user": "Text: {text}\nLabel:", "max_length": 512}
    )
    file = folder / client.CLIENT_FILE
    told = json.loads(file.read_text("utf-8"))
    assert told.keys() == client._ALWAYS | client._OF_LABELS
    del told["batched"]
    file.write_text(json.dumps(told), "utf-8")
    with pytest.raises(ValueError, match=r"client.json does not tell batched; export the run again"):
        LabelClient("http://server/v1", folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"there is no .*where a server reads prompts as the run does"):
        LabelClient("http://server/v1", folder)


def completions_held(folder: Path, way: str) -> Callable[[httpx.Request], httpx.Response]:
    """A server that writes the most probable of the tokens that a grammar allows."""
    from llguidance import LLMatcher, gbnf_to_lark
    from llguidance.hf import from_tokenizer
    from llguidance.torch import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    allowing = from_tokenizer(tokenizer, n_vocab=model.config.vocab_size)

    def written(ids: list[int], grammar: str, most: int) -> tuple[list[int], bool]:
        matcher = LLMatcher(allowing, LLMatcher.grammar_from_lark(gbnf_to_lark.gbnf_to_lark(grammar)))
        assert not matcher.is_error(), matcher.get_error()
        bits, found = allocate_token_bitmask(1, model.config.vocab_size), list[int]()
        while len(found) < most:
            fill_next_token_bitmask(matcher, bits)
            with torch.no_grad():
                logits = model(torch.tensor([[*ids, *found]])).logits[0, -1:].float()
            apply_token_bitmask_inplace(logits, bits)
            token = int(logits.argmax())
            if token == tokenizer.eos_token_id:
                return found, False
            assert matcher.consume_token(token)
            found.append(token)
        return found, True

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            ids = tokenizer(body["content"], add_special_tokens=False).input_ids
            return httpx.Response(200, json={"tokens": ids}) if way == "grammar" else httpx.Response(404)
        grammar = body.get("structured_outputs", body).get("grammar")
        if grammar is None:
            told = {"prompt_logprobs": [None, {"1": {"logprob": -1.0}}]} if way == "prompt" else {}
            return httpx.Response(200, json={"choices": [{"index": 0, "text": "x", **told}]})
        assert isinstance(body["prompt"], list) == (way == "grammar")
        ids = (
            body["prompt"]
            if way == "grammar"
            else tokenizer(body["prompt"], add_special_tokens=False).input_ids
        )
        assert ("structured_outputs" in body) == (way == "prompt")
        assert body["repetition_penalty"] == 1 and tokenizer.eos_token_id in body["stop_token_ids"]
        # Of a text that is too long the answer is not looked at; llguidance takes seconds to read such a grammar.
        found, cut = written(ids, grammar, body["max_tokens"]) if len(ids) <= 512 else ([], True)
        choice = {"index": 0, "text": tokenizer.decode(found), "finish_reason": "length" if cut else "stop"}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(found) + (not cut)}
        return httpx.Response(200, json={"choices": [choice], "usage": usage})

    return answer


@pytest.mark.parametrize("form", ["json", "unlearned", "marks", "nested"])
def test_entities_are_those_of_the_run(form: str, in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, "ner", epochs=1 if form == "unlearned" else 12)
    values = {
        **config.model_dump(exclude_unset=True),
        "lora": {"dropout": 0.0},
        "prompt": {"max_length": 512, "answer": "marks" if form in ("marks", "nested") else "json"},
        "generation": {"max_new_tokens": 100},
    }
    learned = ["他在南京 27", "今天下雨 5", "他在南京 1"]
    if form == "nested":
        places = [(2, 6, "南京大学", "组织"), (2, 4, "南京", "地点")]
        keys = ("start_idx", "end_idx", "entity_text", "entity_label")
        found = [dict(zip(keys, place, strict=True)) for place in places]
        rows = [{"text": f"他在南京大学第 {n} 号", "entities": found} for n in range(48)]
        values["data"] |= {"entities": "nested", "train": str(write_jsonl(in_folder / "nested.jsonl", rows))}
        learned = ["他在南京大学第 20 号", "他在南京大学第 31 号"]
    labeltune.train(build_config(values), say=lambda _: None)
    folder = in_folder / "exported"
    export(in_folder / "out", folder, merged=True, say=lambda _: None, progress=False)
    others = ['  "a" [b|c]\\d\n他在南京 é  ', "南京南京", "x"]
    # Marks are tokens of labeltune's choice there and of the model's own here; where it is sure, that is the same.
    texts = learned if form in ("marks", "nested") else learned + others
    with load_predictor(folder) as run:
        rights = run.predict(texts)
    assert max(len(right.entities or ()) for right in rights) >= (2 if form == "nested" else 1)
    for way in ("prompt", "grammar"):
        transport = httpx.MockTransport(completions_held(folder, way))
        with LabelClient("http://server/v1", folder, transport=transport) as client:
            for text, right in zip(texts, rights, strict=True):
                given = client.predict(text)
                assert [(e.text, e.label, e.start, e.end) for e in right.entities or ()] == [
                    (e["text"], e["label"], e["start"], e["end"]) for e in given["entities"]
                ], (way, text, right.answer)
            for text in others:
                given = client.predict(text)
                assert all(text[e["start"] : e["end"]] == e["text"] for e in given["entities"])
            with pytest.raises(ValueError, match="and the run reads 512 at once; cut it"):
                client.predict("南京" * 400)


def test_what_the_copy_says_again_is_the_same() -> None:
    assert client.CLIENT_FILE == engines.CLIENT_FILE
    for descriptions in ({}, {"a": "first {labels}"}):
        assert _listed(["a", "b"], descriptions) == listed(["a", "b"], descriptions)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text('ab[|]\\"\n\b\f\x7f é', min_size=1, max_size=12), st.data())
def test_grammars_and_places_are_those_of_the_run(text: str, data: st.DataObject) -> None:
    assert client._quoted(text) == vllm.quoted(text)
    assert client._escaped(text, True) == marks.escape(text) and client._escaped(text, False) == ner.escaped(
        text
    )
    spans = data.draw(st.lists(st.tuples(st.integers(0, len(text) - 1), st.integers(1, 12)), max_size=4))
    pairs = [(text[start : start + size], "A") for start, size in spans]
    pairs = [pair for n, pair in enumerate(pairs) if pairs[:n].count(pair) < text.count(pair[0])]
    assert client._located(text, pairs) == [(e.start, e.end, e.label) for e in ner.locate(text, pairs)]
    entities = [Entity(part, label, start, start + len(part)) for start, part, label in [(0, text, "A|")]]
    entities += [Entity(text[at:], "B", at, len(text)) for at in [len(text) - 1] if at]
    told = {"labels": ["A|", "B"], "none": "none"}
    answer = marks.write(text, entities)
    assert client._marked(told, answer, text, cut=False) == [(e.start, e.end, e.label) for e in entities]
    whole = set(client._marked(told, answer, text, cut=False))
    assert all(
        whole.issuperset(client._marked(told, answer[:size], text, cut=True)) for size in range(len(answer))
    )
    lines = "\n".join(
        f"{ner.BEFORE_TEXT}{ner.escaped(e.text)}{ner.BEFORE_LABEL}{ner.escaped(e.label)}{ner.END}"
        for e in entities
    )
    assert client._read_lines(told, lines, text, cut=False) == [(e.text, e.label) for e in entities]
    for lead in ("", "<think>\n\n</think>\n\n"):
        run = {**told, "lead": lead, "depth": 3}
        assert accepted(client._lines_grammar(run, text, []), lead + lines)
        assert accepted(client._marks_grammar(run, text), lead + answer)
        assert not accepted(client._marks_grammar(run, text), lead + answer + "a")
        for grammar in (client._lines_grammar(run, text, []), client._marks_grammar(run, text)):
            assert accepted(grammar, f"{lead}none") and not accepted(grammar, lead)


@functools.cache
def reader() -> Any:
    """The tiny tokenizer, as llguidance has it."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(make_tokenizer())


def accepted(grammar: str, answer: str) -> bool:
    """Whether a grammar in the form of llama.cpp allows an answer."""
    from llguidance import LLMatcher, gbnf_to_lark

    tokenizer = reader()
    matcher = LLMatcher(
        tokenizer, LLMatcher.grammar_from_lark(gbnf_to_lark.gbnf_to_lark(grammar)), log_level=0
    )
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.tokenize_bytes(answer.encode())
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize("form", ["json", "marks"])
def test_a_server_that_ignores_the_grammar(form: str) -> None:
    told = {"labels": ["A"], "none": "none"}
    reads: Callable[..., Any] = client._read_lines if form == "json" else client._marked
    wrong = {
        "json": [
            "hello",
            '{"entity_text": "z", "entity_label": "A"}',
            '{"entity_text": "a", "entity_label": "B"}',
            "[]",
        ],
        "marks": ["ab", "a [b", "[a|A]", "a [b|B]", "a b]"],
    }
    for answer in wrong[form]:
        with pytest.raises(ServerError, match="it has to know grammars"):
            reads(told, answer, "a b", cut=False)
    assert reads(told, "none", "a b", cut=False) == []
    begun = {"json": '{"entity_text": "a", "entity_label": "A"}\n{"entity_te', "marks": "[a|A] [b"}
    right = {"json": [("a", "A")], "marks": [(0, 1, "A")]}
    assert reads(told, begun[form], "a b", cut=True) == right[form]
    assert reads(told, "", "a b", cut=True) == reads(told, "no", "a b", cut=True) == []
    for answer in ("Sure! Here", f"{begun[form]}!\nSure"):
        with pytest.raises(ServerError, match="it has to know grammars"):
            reads(told, answer, "a b", cut=True)


def extracting(folder: Path, marks: bool, answer: Callable[[httpx.Request], httpx.Response]) -> LabelClient:
    """A client of a run with the label A, that writes 20 tokens beside the text's own and reads 90 at once."""
    told: dict[str, Any] = dict.fromkeys(client._ALWAYS | client._OF_ENTITIES, "")
    told |= {"task": "ner", "labels": ["A"], "none": "none", "marks": marks, "before": "P:", "after": "|"}
    told |= {"strip": ["", ""], "special_tokens": [], "descriptions": {}, "max_length": 90}
    told |= {"max_tokens": 81 if marks else 21, "max_new_tokens": 20}
    told |= {"frame": 5, "stop": [1], "depth": 1, "closing": 2}
    (folder / "client.json").write_text(json.dumps(told), "utf-8")
    return LabelClient("http://server/v1", folder, transport=httpx.MockTransport(answer))


@pytest.mark.parametrize("server", ["obeys", "goes on", "ignores"])
def test_what_is_given_too_often_is_asked_again(server: str, tmp_path: Path) -> None:
    a, b = client._line("a", "A"), client._line("b", "A")
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        choice: dict[str, Any] = {"index": 0, "prompt_logprobs": [1], "finish_reason": "stop"}
        read, written = 8, 20
        if "structured_outputs" in body:
            asked.append((body["prompt"], most := body["max_tokens"]))
            again = "x0y1" in body["structured_outputs"]["grammar"]
            assert again == (len(asked) > 1), "the pieces that are spent have rules of their own"
            choice["text"] = f"{a}\n{a}\n{a}\n{b}"
            if again:  # what it is given to go on from are 14 tokens, and 7 are left of 21
                read, written = 22, 7
                choice["text"] = a if server == "ignores" else b
                if server == "goes on":
                    cut, written = most == 7, min(most, 10)
                    choice |= {"text": b[:-2], "finish_reason": "length"} if cut else {"text": f"{b}\n{b}"}
        usage = {"prompt_tokens": read, "completion_tokens": written}
        return httpx.Response(200, json={"choices": [choice], "usage": usage})

    asking = extracting(tmp_path, False, answer)
    if server == "ignores":
        with pytest.raises(ServerError, match="it has to know grammars"):
            asking.predict("aba")
        return
    given = asking.predict("aba")
    found = [(e["text"], e["start"], e["end"]) for e in given["entities"]]
    first = [("P:aba|", 21), (f"P:aba|{a}\n{a}\n", 21)]
    if server == "goes on":
        assert asked == [*first, (first[1][0], 7)], "all lines together are no longer than the run's"
        assert given["truncated"] and found == [("a", 0, 1), ("a", 2, 3)]
        return
    assert asked == first and "truncated" not in given
    assert found == [("a", 0, 1), ("a", 2, 3), ("b", 1, 2)]
    with pytest.raises(ValueError, match="this run extracts entities"):
        asking.probabilities("aba")
    with pytest.raises(ValueError, match="half a character at 1"):
        asking.predict("a\ud800b")


def test_marks_end_where_the_run_would_cut_them(tmp_path: Path) -> None:
    """The text has 3 tokens of its own, so that its answer may have 24 with its end."""
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        most = json.loads(request.content)["max_tokens"]
        choice: dict[str, Any] = {"index": 0, "prompt_logprobs": [1]}
        if most > 1:
            asked.append(most)
            cut = most <= 30
            choice |= {"text": "[a|A][b|A][a" if cut else "[a|A][b|A][a|A]"}
            choice |= {"finish_reason": "length" if cut else "stop"}
        usage = {"prompt_tokens": 8, "completion_tokens": min(most, 31)}
        return httpx.Response(200, json={"choices": [choice], "usage": usage})

    given = extracting(tmp_path, True, answer).predict("aba")
    assert asked == [81, 24]
    assert given["truncated"] and [e["start"] for e in given["entities"]] == [0, 1]


@pytest.mark.parametrize("spent", [[], ["a"], ["a", "ab"], ["b", "aba"], ["a", "b", "ab", "ba", "aba"]])
def test_lines_are_pieces_of_the_text_that_are_not_spent(spent: list[str]) -> None:
    run = {"labels": ["A"], "none": "none", "lead": ""}
    grammar = client._lines_grammar(run, "aba", spent)
    pieces = {"a", "b", "ab", "ba", "aba"}
    if not pieces - set(spent):
        assert not grammar
        return
    for part in (*pieces, "aa", "c", ""):
        assert accepted(grammar, client._line(part, "A")) == (part in pieces and part not in spent), part


def test_the_client_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "copied.py").write_text(
        Path(labeltune.__file__).with_name("client.py").read_text("utf-8"), "utf-8"
    )
    code = "import sys, copied; print(sorted({n.partition('.')[0] for n in sys.modules} & {'labeltune', 'torch', 'numpy', 'pydantic'}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
