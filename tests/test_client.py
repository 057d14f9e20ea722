"""`labeltune.client` gives what the run gives, against servers of three kinds: stand-ins here, with a real model behind them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import labeltune
from helpers.rows import classification_rows, write_jsonl
from helpers.training import config_for
from labeltune import client, load_predictor
from labeltune.client import LabelClient, ServerError, _listed
from labeltune.commands.export import export
from labeltune.config import build_config
from labeltune.export import engines
from labeltune.prompts.descriptions import listed

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


@pytest.mark.parametrize("way", ["prompt", "grammar", "echo"])
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
    changes: dict[str, Any], way: str, in_folder: Path, model_folder: Path
) -> None:
    folder = exported(in_folder, model_folder, **changes)
    transport = httpx.MockTransport(completions(folder, way))
    with (
        LabelClient("http://server/v1/", folder, transport=transport) as asked,
        load_predictor(folder, precision="fp32") as predictor,
    ):
        for text, wanted in zip(TEXTS, predictor.predict(TEXTS), strict=True):
            found = asked.predict(text)
            told = {each["label"]: each["probability"] for each in found["ranking"]}
            assert told == pytest.approx(dict(wanted.ranking), abs=2e-5)
            if wanted.labels is not None:
                assert found["labels"] == list(wanted.labels)
            else:
                assert (found["label"], found["confidence"]) == next(iter(told.items()))
        (wanted,) = predictor.predict(TEXTS[:1], ["Art", "Space"])
        assert asked.probabilities(TEXTS[0], ["Art", "Space"]) == pytest.approx(
            dict(wanted.ranking), abs=2e-5
        )
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
    assert told.keys() == client._KEYS
    del told["batched"]
    file.write_text(json.dumps(told), "utf-8")
    with pytest.raises(ValueError, match=r"client.json does not tell batched; export the run again"):
        LabelClient("http://server/v1", folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"there is no .*where a run gives labels"):
        LabelClient("http://server/v1", folder)


def test_what_the_copy_says_again_is_the_same() -> None:
    assert client.CLIENT_FILE == engines.CLIENT_FILE
    for descriptions in ({}, {"a": "first {labels}"}):
        assert _listed(["a", "b"], descriptions) == listed(["a", "b"], descriptions)


def test_the_client_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "copied.py").write_text(
        Path(labeltune.__file__).with_name("client.py").read_text("utf-8"), "utf-8"
    )
    code = "import sys, copied; print(sorted({n.partition('.')[0] for n in sys.modules} & {'labeltune', 'torch', 'numpy', 'pydantic'}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
