"""A real server on loopback: nothing is mixed up, nothing is lost, nothing breaks it, nothing leaks."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.runs import NER_LABELS, make_run
from helpers.serving import Server, serving
from labeltune import load_predictor
from labeltune.types import Prediction

KEY = "a-key-that-nobody-may-see"
AUTH = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Of the offline twins in this process, as in the server's."""
    import torch

    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(kept)


@pytest.fixture(scope="module")
def runs(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "news": make_run(folder / "news", model_folder, seed=1),
        "other": make_run(folder / "other", model_folder, seed=2),
        "ents": make_run(folder / "ents", model_folder, "ner", seed=3),
    }


@pytest.fixture(scope="module")
def server(runs: dict[str, Path]) -> Iterator[Server]:
    """Three runs on one base model, behind a key."""
    adapters = [f"--adapter={name}={runs[name]}" for name in ("other", "ents")]
    with serving(runs["news"], *adapters, "--max-body-bytes=100000", "--max-chars=5000", key=KEY) as running:
        yield running


def text_of(number: int) -> str:
    return f"match {number * 7919 % 1009} rocket 南京 {number}" + " rain" * (number % 11)


def same_labels(answer: dict[str, Any], right: Prediction) -> bool:
    """Equal but for rounding; labels that are as likely as each other may change places."""
    found = {each["label"]: each["probability"] for each in answer["ranking"]}
    wanted = dict(right.ranking)
    close = all(abs(found[label] - p) < 2e-5 for label, p in wanted.items())
    return close and (
        answer["label"] == right.label or abs(wanted[answer["label"]] - wanted[right.label]) < 1e-4
    )


def test_a_thousand_at_once_get_their_own_answers(server: Server, runs: dict[str, Path]) -> None:
    plan = [("ents" if n % 25 == 0 else "other" if n % 3 == 0 else "news", text_of(n)) for n in range(1000)]

    async def ask_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=1000)
        async with httpx.AsyncClient(
            base_url=server.url, headers=AUTH, limits=limits, timeout=100, verify=False
        ) as client:
            path = {"ents": "/v1/extract"}
            asked = [
                client.post(path.get(model, "/v1/classify"), json={"text": text, "model": model})
                for model, text in plan
            ]
            return await asyncio.gather(*asked)

    answers = asyncio.run(ask_all())
    assert {answer.status_code for answer in answers} == {200}
    for model in runs:
        mine = [n for n, (name, _) in enumerate(plan) if name == model]
        with load_predictor(runs[model]) as predictor:
            right = predictor.predict([plan[n][1] for n in mine])
        for n, wanted in zip(mine, right, strict=True):
            (found,) = answers[n].json()["results"]
            if model != "ents":
                assert same_labels(found, wanted), plan[n]
                continue
            for entity, twin in zip(found["entities"], wanted.entities or (), strict=True):
                assert entity.pop("score") == pytest.approx(twin.score, abs=1e-3)
                assert entity == {k: v for k, v in twin.to_dict().items() if k != "score"}
    batches = server.metric("labeltune_batch_rows_count")
    assert server.metric("labeltune_batch_rows_sum") >= 1000 and batches < 500, "requests are batched"


def test_lists_options_and_models(server: Server) -> None:
    texts = [text_of(n) for n in range(3)]
    whole = server.post("/v1/classify", {"text": texts}, **AUTH).json()
    assert whole["model"] == "news" and len(whole["results"]) == 3
    few = server.post("/v1/classify", {"text": texts[0], "top_k": 1, "min_confidence": 1.0}, **AUTH).json()
    assert few["results"][0]["label"] is None and len(few["results"][0]["ranking"]) == 1
    own = server.post("/v1/classify", {"text": texts[0], "labels": ["雨", "sun"]}, **AUTH).json()
    assert {each["label"] for each in own["results"][0]["ranking"]} == {"雨", "sun"}
    found = server.post("/v1/extract", {"text": [f"{n}南京、他在" for n in range(8)]}, **AUTH).json()[
        "results"
    ]
    entities = [entity for row in found for entity in row["entities"]]
    assert {entity["entity_label"] for entity in entities} <= set(NER_LABELS)
    for label in NER_LABELS:
        body = {"text": [f"{n}南京、他在" for n in range(8)], "labels": [label]}
        part = server.post("/v1/extract", body, **AUTH).json()["results"]
        assert sum(len(row["entities"]) for row in part) == sum(e["entity_label"] == label for e in entities)
    sure = server.post("/v1/extract", {"text": "南京", "min_confidence": 1.0, "top_k": 1}, **AUTH).json()
    assert sure["results"][0]["entities"] == []
    listed = server.get("/v1/models", **AUTH).json()["data"]
    assert [(m["id"], m["task"]) for m in listed] == [
        ("news", "classification"),
        ("other", "classification"),
        ("ents", "ner"),
    ]
    assert server.get("/readyz").json() == {"status": "ok"}


BAD: list[tuple[bytes, int, str]] = [
    (b"", 400, "body"),
    (b'{"text": ', 400, "body"),
    (b'{"text": "\xff\xfe"}', 400, "body"),
    (b'{"text": "a", "min_confidence": NaN}', 400, "body"),
    (b'{"text": "a", "top_k": 1' + b"0" * 5000 + b"}", 400, "body"),
    (b"[" * 50_000, 422, "body"),
    (b'{"text": ' + b"[" * 60 + b"]" * 60 + b"}", 422, "text"),
    (b'["text"]', 422, "body"),
    (b"{}", 422, "text"),
    (b'{"text": null}', 422, "text"),
    (b'{"text": 3}', 422, "text"),
    (b'{"text": []}', 422, "text"),
    (b'{"text": ["a", 3]}', 422, "text[1]"),
    (b'{"text": "  "}', 422, "text"),
    (b'{"text": ["a", ""]}', 422, "text[1]"),
    (b'{"text": "a\\u0000b"}', 422, "text"),
    (b'{"text": ["a", "b\\u001b[31m"]}', 422, "text[1]"),
    (b'{"text": "\\ud800"}', 422, "text"),
    (b'{"text": "a", "\\udfff": 1}', 422, "\\udfff"),
    (b'{"text": "a", "labels": "a,b"}', 422, "labels"),
    (b'{"text": "a", "labels": []}', 422, "labels"),
    (b'{"text": "a", "labels": ["x", "x "]}', 422, "labels"),
    (b'{"text": "a", "labels": ["x", 1]}', 422, "labels[1]"),
    (b'{"text": "a", "top_k": true}', 422, "top_k"),
    (b'{"text": "a", "top_k": 0}', 422, "top_k"),
    (b'{"text": "a", "min_confidence": 1.5}', 422, "min_confidence"),
    (b'{"text": "a", "txet": "b"}', 422, "txet"),
    (b'{"text": "a", "model": "ents"}', 422, "model"),
    (b'{"text": "a", "model": "nowhere"}', 404, "model"),
    (b'{"text": "' + b"x" * 5001 + b'"}', 413, "text"),
    (json.dumps({"text": ["a"] * 257}).encode(), 413, "text"),
    (json.dumps({"text": "a", "labels": [str(n) for n in range(501)]}).encode(), 413, "labels"),
    (b'{"text": "' + b"x" * 100_000 + b'"}', 413, "body"),
]


@pytest.mark.parametrize(("body", "status", "field"), BAD, ids=[repr(body[:30]) for body, _, _ in BAD])
def test_what_cannot_be_answered_is_refused_by_name(
    server: Server, body: bytes, status: int, field: str
) -> None:
    headers = {**AUTH, "content-type": "application/json"}
    answer = server.client.post(f"{server.url}/v1/classify", content=body, headers=headers)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert error["param"].startswith(field) and (
        status in (400, 404) or error["param"][:5] in error["message"]
    )


def test_long_labels_are_one_request_s_own_fault(server: Server) -> None:
    """Candidates that leave no room in the prompt: found by the worker, and told to this client alone."""
    both: list[httpx.Response] = []
    bodies = [{"text": "a", "labels": ["x" * 3000, "y"]}, {"text": ["fine", "too"]}]
    threads = [
        threading.Thread(target=lambda b=body: both.append(server.post("/v1/classify", b, **AUTH)))
        for body in bodies
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in both) == [200, 422]


def test_bodies_without_a_length_have_a_limit_too(server: Server) -> None:
    headers = {**AUTH, "content-type": "application/json"}
    chunks = (b"x" * 10_000 for _ in range(20))
    assert server.client.post(f"{server.url}/v1/classify", content=chunks, headers=headers).status_code == 413
    form = httpx.post(
        f"{server.url}/v1/classify", content=b'{"text": "a"}', headers={**AUTH, "content-type": "text/plain"}
    )
    assert (form.status_code, form.json()["error"]["param"]) == (415, "content-type")


def test_the_key_is_asked_for(server: Server) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"x-api-key": KEY[:-1]}):
        for answer in (
            server.client.post(f"{server.url}/v1/classify", json={"text": "a"}, headers=headers),
            server.client.get(f"{server.url}/v1/models", headers=headers),
        ):
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert server.post("/v1/classify", {"text": "a"}, x_api_key=KEY).status_code == 200
    assert server.get("/healthz").status_code == 200


def test_the_examples_of_the_documentation_work(server: Server) -> None:
    document = server.get("/openapi.json").json()
    asked = 0
    for path, operations in document["paths"].items():
        for operation in operations.values():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            for example in content.get("examples", {}).values():
                answer = server.post(path, example["value"], **AUTH)
                assert answer.status_code == 200, answer.text
                asked += 1
    assert asked == 7
    assert "match number 0 match" in json.dumps(document), "documents come from the run's validation rows"


def test_schemathesis_finds_no_failure(server: Server) -> None:
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as conformance

    checks = [
        not_a_server_error,
        conformance.status_code_conformance,
        conformance.content_type_conformance,
        conformance.response_schema_conformance,
    ]
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 8
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=12,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def attack(case: Any) -> None:
            case.call_and_validate(headers=AUTH, checks=checks)

        attack()


def test_openai_s_client_can_talk_to_it(server: Server, runs: dict[str, Path]) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    with load_predictor(runs["news"]) as predictor:
        right = {text: predictor.predict([text])[0].label for text in ("a match", "the rocket")}
        prompt = predictor.task.conversation(next(iter(predictor._examples(["a match"], ["雨", "sun"]))))
        (own,) = predictor.predict(["a match"], ["雨", "sun"])
    for text, label in right.items():
        messages: list[Any] = [{"role": "system", "content": "ignored"}, {"role": "user", "content": text}]
        found = client.chat.completions.create(model="news", messages=messages, temperature=0.3, max_tokens=5)
        assert found.choices[0].message.content == label and found.choices[0].finish_reason == "stop"
        assert (
            found.usage is not None and found.usage.prompt_tokens > 10 and found.usage.completion_tokens > 0
        )
    whole = client.chat.completions.create(model="news", messages=prompt.messages())  # type: ignore[arg-type]
    assert whole.choices[0].message.content == own.label, "a rendered prompt is asked with its own candidates"
    pieces = client.chat.completions.create(model="news", messages=messages, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == label
    with load_predictor(runs["ents"]) as predictor:
        (entities,) = predictor.predict(["他在南京"])
    found = client.chat.completions.create(
        model="ents", messages=[{"role": "user", "content": "文本:他在南京"}]
    )
    assert found.choices[0].message.content == entities.answer
    assert [model.id for model in client.models.list()] == ["news", "other", "ents"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=messages)
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.chat.completions.create(model="news", messages=[{"role": "user", "content": ""}])
    assert refused.value.param == "messages[0].content"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()


#: What becomes of each field of a chat completion, with a value that shows it.
HONOURED: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "match"}]}
    ],
    "model": "news",
    "stream": False,
    "stream_options": None,
    "logprobs": True,
    "top_logprobs": None,
    "stop": "nowhere in a label",
    "max_completion_tokens": 50,
    "max_tokens": 50,
}
NO_EFFECT: dict[str, Any] = {
    "temperature": 2,
    "top_p": 0.1,
    "seed": 7,
    "prediction": {"type": "content", "content": "Art"},
    "parallel_tool_calls": True,
    "reasoning_effort": "high",
    "verbosity": "low",
    "store": True,
    "metadata": {"a": "b"},
    "user": "me",
    "safety_identifier": "me",
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "service_tier": "flex",
}
REFUSED: dict[str, list[Any]] = {
    "n": [2],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x"}}],
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "tool_choice": ["auto", "required", {"type": "function", "function": {"name": "f"}}],
    "functions": [[{"name": "f"}]],
    "function_call": ["auto", {"name": "f"}],
    "web_search_options": [{}],
    "moderation": [{"model": "m"}],
    "modalities": [["audio"], ["text", "audio"]],
    "audio": [{"voice": "alloy", "format": "wav"}],
    "logit_bias": [{"50256": -100}],
    "frequency_penalty": [0.5],
    "presence_penalty": [-1],
}
#: Values of the same fields that ask for nothing else than what is done anyway.
NEUTRAL: dict[str, list[Any]] = {
    "n": [None, 1],
    "response_format": [None, {"type": "text"}],
    "tools": [None, []],
    "tool_choice": [None, "none"],
    "functions": [[]],
    "function_call": ["none"],
    "modalities": [None, ["text"]],
    "logit_bias": [None, {}],
    "frequency_penalty": [None, 0, 0.0],
    "presence_penalty": [0],
    "audio": [None],
    "moderation": [None],
    "web_search_options": [None],
}


def test_every_field_of_openai_s_client_is_classified() -> None:
    """A field that a new client brings fails here until somebody has decided about it; the server refuses it until then."""
    from openai.types.chat import completion_create_params as params

    known = set().union(*(kind.__annotations__ for kind in (
        params.CompletionCreateParamsBase,
        params.CompletionCreateParamsNonStreaming,
        params.CompletionCreateParamsStreaming,
    )))  # fmt: skip
    assert known == {*HONOURED, *NO_EFFECT, *REFUSED}
    assert set(REFUSED) == set(NEUTRAL) and not {*HONOURED, *NO_EFFECT} & {*REFUSED}


def test_fields_are_honoured_or_without_effect_or_refused_by_name(server: Server) -> None:
    def ask(**fields: Any) -> httpx.Response:
        body = {"model": "news", "messages": [{"role": "user", "content": "a match"}], **fields}
        return server.post("/v1/chat/completions", body, **AUTH)

    def said(answer: httpx.Response) -> Any:
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]

    right = said(ask())
    assert said(ask(**HONOURED)) == said(ask(**NO_EFFECT)) == right, "parts are joined"
    for extension in ({"top_k": 20, "min_p": 0.1}, {"enable_thinking": False}, {"repetition_penalty": 1.0}):
        assert said(ask(**extension)) == right
    for name, values in NEUTRAL.items():
        for value in values:
            assert said(ask(**{name: value})) == right
    refused = [(name, value) for name, values in REFUSED.items() for value in values]
    unknown: list[tuple[str, Any]] = [
        ("guided_choice", ["a"]),
        ("repetition_penalty", 1.2),
        ("top_logprob", 1),
    ]
    alone = [("stream_options", {"include_usage": True}), ("top_logprobs", 2)]
    wrong = [("max_tokens", 0), ("top_logprobs", 21), ("stop", ["a"] * 5), ("stop", "")]
    for name, value in [*refused, *unknown, *alone, *wrong]:
        error = ask(**{name: value}).json()["error"]
        assert error["param"].startswith(name) and error["message"].startswith(f"{name}"), error
        assert error["type"] == "invalid_request_error"
    assert ask(n=2).json()["error"]["message"] == "n: there is one answer; leave it out or send 1"
    for kind in ("image_url", "input_audio", "file"):
        parts = [{"type": "text", "text": "moon"}, {"type": kind, kind: {"url": "data:"}}]
        error = ask(messages=[{"role": "user", "content": parts}]).json()["error"]
        assert error["param"] == "messages[0].content[1].type"
        assert error["message"] == "messages[0].content[1].type: only text parts are read"
    history: list[Any] = [
        {"role": "user", "content": "earlier"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
        {"role": "user", "content": "a match"},
    ]
    assert said(ask(messages=history)) == right
    assert ask(messages=[{"role": "user", "content": None}]).json()["error"]["param"] == "messages[0].content"


def test_logprobs_are_the_exact_probabilities_of_labels(server: Server, runs: dict[str, Path]) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    messages: Any = [{"role": "user", "content": "a match"}]
    with load_predictor(runs["news"]) as predictor:
        (right,) = predictor.predict(["a match"])
    found = client.chat.completions.create(model="news", messages=messages, logprobs=True, top_logprobs=2)
    assert found.choices[0].logprobs is not None and found.choices[0].logprobs.content is not None
    (token,) = found.choices[0].logprobs.content
    assert token.token == right.label == found.choices[0].message.content
    assert bytes(token.bytes or ()).decode() == right.label
    assert token.logprob == pytest.approx(math.log(right.ranking[0][1]), abs=1e-4)
    assert [top.token for top in token.top_logprobs] == [label for label, _ in right.ranking[:2]]
    for top, (_, probability) in zip(token.top_logprobs, right.ranking, strict=False):
        assert top.logprob == pytest.approx(math.log(probability), abs=1e-4)
    (streamed,) = client.chat.completions.create(model="news", messages=messages, logprobs=True, stream=True)
    assert streamed.choices[0].logprobs is not None and streamed.choices[0].logprobs.content is not None
    assert streamed.choices[0].logprobs.content[0].token == right.label and streamed.usage is None
    with pytest.raises(openai.UnprocessableEntityError, match="/v1/extract gives their scores"):
        client.chat.completions.create(model="ents", messages=messages, logprobs=True)


def test_a_stream_ends_with_its_usage_when_that_is_wanted(server: Server) -> None:
    body = {"model": "news", "messages": [{"role": "user", "content": "a match"}], "stream": True}
    whole = server.post("/v1/chat/completions", {**body, "stream": False}, **AUTH).json()

    def lines(**fields: Any) -> list[str]:
        text = server.post("/v1/chat/completions", {**body, **fields}, **AUTH).text
        return [line.removeprefix("data: ") for line in text.split("\n\n") if line]

    *chunks, usage, end = lines(stream_options={"include_usage": True})
    first = json.loads(chunks[0])
    assert len(chunks) == 1 and end == "[DONE]"
    assert first["usage"] is None and first["choices"][0]["finish_reason"] == "stop"
    assert first["choices"][0]["delta"] == {
        "role": "assistant",
        "content": whole["choices"][0]["message"]["content"],
    }
    last = json.loads(usage)
    assert last["choices"] == [] and last["usage"] == whole["usage"] and last["id"] == first["id"]
    for fields in ({}, {"stream_options": {"include_usage": False}}, {"stream_options": None}):
        only, end = lines(**fields)
        assert "usage" not in json.loads(only) and end == "[DONE]"


def test_answers_are_cut_where_the_client_says(server: Server, runs: dict[str, Path]) -> None:
    with load_predictor(runs["ents"]) as predictor:
        whole = predictor.predict(["他在南京"])[0].answer
        ids = predictor.template.tokenizer(whole, add_special_tokens=False).input_ids

    def ask(**fields: Any) -> Any:
        body = {"model": "ents", "messages": [{"role": "user", "content": "他在南京"}], **fields}
        found = server.post("/v1/chat/completions", body, **AUTH).json()
        choice = found["choices"][0]
        return choice["message"]["content"], choice["finish_reason"], found["usage"]["completion_tokens"]

    assert ask() == (whole, "stop", len(ids))
    assert ask(max_tokens=len(ids)) == (whole, "stop", len(ids))
    for limit in range(1, len(ids)):
        text, reason, tokens = ask(max_completion_tokens=limit, max_tokens=1000)
        assert whole.startswith(text) and len(text) < len(whole)
        assert (reason, tokens) == ("length", limit)
    stop = whole[len(whole) // 2]
    assert ask(stop=["\u2603", stop])[:2] == (whole.partition(stop)[0], "stop")
    assert ask(stop="\u2603") == (whole, "stop", len(ids))


def test_unknown_addresses_and_methods_get_the_protocol_s_error(server: Server) -> None:
    import openai

    for method, path in (
        ("GET", "/v1/completions"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/responses"),
        ("GET", "/v1"),
        ("GET", "/v1/"),
        ("GET", "/v1/models/"),
        ("GET", "/v1/models/gpt-4o"),
    ):
        answer = server.client.request(method, f"{server.url}{path}", headers=AUTH, data={"form": "1"})
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (404, "not_found_error", "404"), path
    for method, path, allowed in (
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/models/news", "GET"),
        ("PUT", "/v1/classify", "POST"),
    ):
        answer = server.client.request(method, f"{server.url}{path}", headers=AUTH)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        assert answer.json()["error"]["message"] == f"this address takes {allowed}"
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    with pytest.raises(openai.NotFoundError, match="there is no such address"):
        client.embeddings.create(model="news", input="a")
    assert client.models.retrieve("ents").id == "ents"


def test_logs_hold_no_document_and_no_key(server: Server) -> None:
    secret = "Geheimbericht-4711"
    for body in ({"text": secret}, {"text": [secret, ""]}, {"text": "a", "labels": [secret, secret]}):
        server.post("/v1/classify", body, **AUTH, x_request_id="my-own-id")
    server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": secret}]}, **AUTH)
    server.get("/v1/models/{secret}", **AUTH)
    server.client.get(f"{server.url}/{secret}?{secret}", headers={"x-request-id": f"{secret} \\n"})
    assert (
        server.post("/v1/classify", {"text": "a"}, **AUTH, x_request_id="a-b.c").headers["x-request-id"]
        == "a-b.c"
    )
    deadline = time.monotonic() + 60
    while not any(line.get("request_id") == "a-b.c" for line in server.events("request")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    log = "".join(server.lines)
    assert secret not in log and KEY not in log and KEY not in server.get("/metrics").text
    assert secret not in server.get("/metrics").text
    line = next(line for line in server.events("request") if line["request_id"] == "my-own-id")
    assert line["route"] == "/v1/classify" and line["status"] == 200 and line["rows"] == 1 and line["ms"] > 0
