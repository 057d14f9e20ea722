"""Prediction: the original page's code on our checkpoints, order and ids, escapes, and the plain twins of batching."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

import labeltune
from helpers import forks
from helpers.rows import LABELS, classification_rows, ner_rows, read_jsonl, write_jsonl
from helpers.tiny_models import make_model
from labeltune.config import PromptConfig, RunConfig, build_config
from labeltune.default_prompts import NER_LABELS
from labeltune.errors import DataError, ModelError
from labeltune.inference.generation import generate_answers
from labeltune.prompts import make_task
from labeltune.types import Entity, Example


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> RunConfig:
    """A short run on learnable rows; ./output/Qwen2 in its own working folder."""
    folder = tmp_path_factory.mktemp("run")
    data = write_jsonl(folder / "train.jsonl", classification_rows(48))
    config = build_config(
        {
            "model": str(model_folder),
            "output_dir": str(folder / "output" / "Qwen2"),
            "tracking": "none",
            "data": {"train": str(data)},
            "training": {"epochs": 2, "learning_rate": 1e-2, "batch_size": 8},
        }
    )
    labeltune.train(config)
    return config


def test_the_original_prediction_code_runs_unchanged(trained: RunConfig, model_folder: Path) -> None:
    """Line for line what the original page does, but for its paths and the device."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = next(Path(trained.output_dir).glob("checkpoint-*"))
    device = "cpu"
    tokenizer = AutoTokenizer.from_pretrained(str(model_folder), use_fast=False, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(model_folder), device_map=None, torch_dtype=torch.float32
    )
    model = PeftModel.from_pretrained(model, model_id=str(checkpoint))
    test_texts = {
        "instruction": "你是一个文本分类领域的专家，你会接收到一段文本和几个潜在的分类选项，请输出文本内容的正确类型",
        "input": f"文本:rocket number 7 rocket,类型选型:{LABELS}",
    }
    messages = [
        {"role": "system", "content": test_texts["instruction"]},
        {"role": "user", "content": test_texts["input"]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    model_inputs = tokenizer([text], return_tensors="pt").to(device)
    generated_ids = model.generate(model_inputs.input_ids, max_new_tokens=8, do_sample=False)
    generated_ids = [
        output_ids[len(input_ids) :]
        for input_ids, output_ids in zip(model_inputs.input_ids, generated_ids, strict=True)
    ]
    response = tokenizer.batch_decode(generated_ids, skip_special_tokens=True)[0]
    with labeltune.load_predictor(checkpoint) as predictor:
        predictor.generation = predictor.generation.model_copy(update={"batch_size": 1})
        ours = predictor.predict([Example("0", "rocket number 7 rocket", tuple(LABELS))])[0]
    assert ours.answer and response.startswith(ours.answer)


def test_batched_generation_equals_one_row_at_a_time(tokenizer: Any) -> None:
    model = make_model(len(tokenizer)).eval()
    prompts = [list(range(3, 3 + n)) for n in (4, 19, 7, 11, 2)]
    options = {"stop_ids": [2], "max_new_tokens": 6}
    batched = generate_answers(model, tokenizer, prompts, batch_size=4, **options)
    single = [generate_answers(model, tokenizer, [p], batch_size=1, **options)[0] for p in prompts]
    assert batched == single


def test_generation_stops_at_any_stop_id(tokenizer: Any) -> None:
    model = make_model(len(tokenizer)).eval()
    whole = generate_answers(model, tokenizer, [[5, 6, 7]], stop_ids=[2], max_new_tokens=6, batch_size=1)[0]
    cut = generate_answers(
        model, tokenizer, [[5, 6, 7]], stop_ids=[whole[2]], max_new_tokens=6, batch_size=1
    )[0]
    assert cut == whole[: whole.index(whole[2])]


def test_predict_file_keeps_ids_and_order(trained: RunConfig, in_folder: Path) -> None:
    rows = [{"id": f"r{9 - i}", "text": f"rocket {'x' * (7 * i % 30)}", "category": LABELS} for i in range(9)]
    write_jsonl(in_folder / "in.jsonl", rows)
    done = forks.run(["-m", "labeltune", "predict", trained.output_dir, "in.jsonl", "-o", "out.jsonl"])
    assert done.returncode == 0, done.stderr
    found = read_jsonl(in_folder / "out.jsonl")
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert set(found[0]) == {"id", "label", "confidence", "ranking", "answer", "parsed"}


def test_a_runs_column_names_are_remembered(in_folder: Path, model_folder: Path) -> None:
    rows = [{"content": row["text"], "label": row["output"]} for row in classification_rows(12)]
    write_jsonl(in_folder / "rows.jsonl", rows)
    config = build_config(
        {
            "model": str(model_folder),
            "output_dir": "out",
            "tracking": "none",
            "data": {"train": "rows.jsonl", "columns": {"text": "content", "output": "label"}},
            "training": {"max_steps": 1},
        }
    )
    labeltune.train(config)
    assert labeltune.evaluate("out", "rows.jsonl", progress=False)["rows"] == 12


def test_predict_text_and_stdin(trained: RunConfig, in_folder: Path) -> None:
    command = ["-m", "labeltune", "predict", trained.output_dir]
    by_text = forks.run([*command, "--text", "rocket one"])
    by_stdin = subprocess.run(
        [sys.executable, *command],
        input='rocket one\n{"id": "b", "text": "match"}\n',
        capture_output=True,
        text=True,
    )
    assert by_text.returncode == by_stdin.returncode == 0, by_stdin.stderr
    alone, in_company = json.loads(by_text.stdout), json.loads(by_stdin.stdout.splitlines()[0])
    # How rows are cut into passes changes probabilities by rounding.
    chances = [[entry.pop("probability") for entry in row["ranking"]] for row in (alone, in_company)]
    assert chances[0] == pytest.approx(chances[1], abs=1e-5)
    assert alone.pop("confidence") == pytest.approx(in_company.pop("confidence"), abs=1e-5)
    assert alone == in_company
    assert json.loads(by_stdin.stdout.splitlines()[1])["id"] == "b"


def test_predict_errors_are_short(trained: RunConfig, in_folder: Path) -> None:
    for arguments, message in (
        (["no-such-run", "--text", "x"], "does not exist"),
        ([trained.output_dir, "missing.jsonl"], "missing.jsonl"),
        ([trained.output_dir, "--text", " "], "empty"),
    ):
        done = forks.run(["-m", "labeltune", "predict", *arguments])
        assert done.returncode == 2
        assert message in done.stderr and "Traceback" not in done.stderr


def test_rows_without_candidates_use_the_label_set_of_the_adapter(trained: RunConfig) -> None:
    with labeltune.load_predictor(trained.output_dir) as predictor:
        assert predictor.task.labels == ("Art", "Space", "Sports")
        prompt = predictor.template.tokenizer.decode(predictor.builder.prompt(Example("0", "x")).ids)
        assert "['Art', 'Space', 'Sports']" in prompt
        assert "['a', 'b']" in predictor.template.tokenizer.decode(
            predictor.builder.prompt(Example("0", "x", ("a", "b"))).ids
        )


def test_evaluate_untuned_model_of_a_config(trained: RunConfig, in_folder: Path) -> None:
    write_jsonl(in_folder / "test.jsonl", classification_rows(6))
    (in_folder / "run.yaml").write_text(json.dumps(trained.model_dump(mode="json")), encoding="utf-8")
    before = labeltune.evaluate("run.yaml", "test.jsonl", progress=False)
    base = labeltune.evaluate(trained.output_dir, "test.jsonl", base=True, progress=False)
    assert before["rows"] == 6 and before["accuracy"] == base["accuracy"]
    assert before["baselines"]["uniform_guess"]["value"] == pytest.approx(1 / 3)


def test_evaluate_stops_on_faults_or_skips_them(trained: RunConfig, in_folder: Path) -> None:
    write_jsonl(in_folder / "test.jsonl", [*classification_rows(3), {"text": "", "output": "Art"}])
    with pytest.raises(DataError, match=r"test\.jsonl:4"):
        labeltune.evaluate(trained.output_dir, "test.jsonl", progress=False)
    metrics = labeltune.evaluate(trained.output_dir, "test.jsonl", on_error="skip", progress=False)
    assert metrics["rows"] == 3 and metrics["skipped"] == {"empty_field": 1}
    rows = [{"text": text, "output": label} for text, label in (("a", "Art"), ("b", "art"), ("", "Art"))]
    write_jsonl(in_folder / "test.jsonl", [{**row, "category": ["Art", "art"]} for row in rows])
    metrics = labeltune.evaluate(trained.output_dir, "test.jsonl", on_error="skip", progress=False)
    assert metrics["rows"] == 2 and metrics["skipped"] == {"empty_field": 1}  # label_twins is a warning
    (in_folder / "test.csv").write_text("text;output\na;b\n")
    with pytest.raises(
        DataError, match=r"1 error:\n  test\.csv:1: error: unparsable_line: .* separated by ';'"
    ):
        labeltune.evaluate(trained.output_dir, "test.csv", on_error="skip", progress=False)


def test_original_scripts(trained: RunConfig, in_folder: Path) -> None:
    """predict_qwen2.py finds the newest checkpoint in ./output/Qwen2 and reads its own document."""
    root = Path(__file__).resolve().parents[1]
    here = Path(trained.output_dir).parents[1]
    done = forks.run([root / "predict_qwen2.py"], cwd=here)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    done = forks.run([root / "predict_qwen2.py"], cwd=in_folder)
    assert done.returncode == 2 and "train first" in done.stderr


@pytest.mark.parametrize(
    ("script", "file", "rows"),
    [
        ("train_qwen2.py", "train.jsonl", classification_rows(30)),
        ("train_qwen2_ner.py", "ccfbdci.jsonl", ner_rows(30)),
    ],
)
def test_original_training_scripts(
    script: str, file: str, rows: list[Any], in_folder: Path, model_folder: Path
) -> None:
    root = Path(__file__).resolve().parents[1]
    write_jsonl(in_folder / file, rows)
    settings = ("training.max_steps=1", "prompt.max_length=600", "generation.max_new_tokens=4")
    done = forks.run([root / script, "--model", model_folder, *settings], cwd=in_folder)
    assert done.returncode == 0, done.stderr
    output = "Qwen2" if "ner" not in script else "Qwen2-NER"
    assert (in_folder / "output" / output / "checkpoint-1" / "labeltune.json").is_file()
    assert "27 training rows, 3 validation rows" in done.stderr
    assert (in_folder / "swanlog").is_dir()


def test_a_folder_without_checkpoints_is_an_error(in_folder: Path) -> None:
    with pytest.raises(ModelError, match="train first"):
        labeltune.load_predictor(in_folder)


_characters = st.text(st.sampled_from(list('ab"\\\n\t{}:,\u2028\x00é南🚀／１')), min_size=1, max_size=6)


@given(st.lists(_characters, min_size=1, max_size=4), st.data())
@settings(max_examples=200, deadline=None)
def test_ner_escape_round_trip(pieces: list[str], data: st.DataObject) -> None:
    text, entities = "", []
    for index, piece in enumerate(pieces):
        text += f"<{index}>"
        label = data.draw(st.sampled_from(NER_LABELS))
        entities.append(Entity(piece, label, len(text), len(text) + len(piece)))
        text += piece
    task = make_task("ner", NER_LABELS, PromptConfig())
    target = task.target(Example("0", text, entities=tuple(entities)))
    assert len(target.split("\n")) == len(pieces), "one line an entity"
    prediction = task.parse(Example("0", text), target)
    assert prediction.parsed
    assert [(e.text, e.label) for e in prediction.entities or ()] == [(e.text, e.label) for e in entities]
    for entity in prediction.entities or ():
        assert entity.start is not None and text[entity.start : entity.end] == entity.text


@pytest.mark.parametrize(
    ("answer", "count", "parsed"),
    [
        ("没有找到任何实体", 0, True),
        ('{"entity_text": "南京", "entity_label": "地点"}', 1, True),
        ('{"entity_text": "南京", "entity_label": "地点"}\n{"entity_text": "南', 1, False),
        ('{"entity_text": "南京", "entity_label": "城市"}', 0, False),
        ('{"entity_text": "", "entity_label": "地点"}', 0, False),
        ('{"entity_text": ["南京"], "entity_label": "地点"}', 0, False),
        ('{"entity_text": "南京", "entity_label": ["地点"]}', 0, False),
        ("[" * 5000, 0, False),
        ("", 0, False),
        ("南京", 0, False),
    ],
)
def test_ner_answers_that_are_not_well_formed(answer: str, count: int, parsed: bool) -> None:
    prediction = make_task("ner", NER_LABELS, PromptConfig()).parse(Example("0", "南京"), answer)
    assert (len(prediction.entities or ()), prediction.parsed) == (count, parsed)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Space", "Space"),
        (" space.", "Space"),
        ("'Space'", "Space"),
        ("Spaceship", None),
        ("", None),
        ("类型:Space", None),
    ],
)
def test_classification_answers(answer: str, label: str | None) -> None:
    task = make_task("classification", LABELS, PromptConfig())
    prediction = task.parse(Example("0", "x"), answer)
    assert prediction.label == label and prediction.parsed == (label is not None)


@pytest.fixture(scope="module")
def gb_run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder with a run whose files are GB18030, with integers for its labels, and those files."""
    folder = tmp_path_factory.mktemp("gb")
    lines = [
        json.dumps({"text": f"第{i}条 {'好' if i % 2 else '坏'}", "output": i % 2}, ensure_ascii=False)
        for i in range(24)
    ]
    for name, part in (("train", lines[:16]), ("test", lines[16:])):
        (folder / f"{name}.jsonl").write_bytes(("\n".join(part) + "\n").encode("gb18030"))
    data = {"encoding": "gb18030", "labels": ["Neg", "Pos"]}
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    config = build_config(
        {
            "model": str(model_folder),
            "output_dir": str(folder / "out"),
            "tracking": "none",
            "hub": {"cache_dir": str(folder / "hub")},
            "data": {**data, **files},
            "training": {"max_steps": 1},
        }
    )
    labeltune.train(config)
    return folder


def test_a_run_is_measured_on_files_in_the_encoding_and_with_the_numbers_of_its_own(gb_run: Path) -> None:
    from labeltune.commands.evaluate import describe_run, labelled_rows

    about = describe_run(gb_run / "out")
    assert about.data.encoding == "gb18030"
    assert about.hub is not None and about.hub.cache_dir == str(gb_run / "hub")
    rows = labelled_rows(about, str(gb_run / "test.jsonl"), "stop", None)
    found = [(rows.example(i).text, rows.example(i).label) for i in range(len(rows.dataset))]
    assert found[:2] == [("第16条 坏", "Neg"), ("第17条 好", "Pos")] and rows.audit.counts == {}
    assert labeltune.evaluate(gb_run / "out", str(gb_run / "test.jsonl"), progress=False)["rows"] == 8
    with labeltune.load_predictor(gb_run / "out") as predictor:
        assert describe_run(predictor).data == about.data
    wrong = gb_run / "wrong.jsonl"
    wrong.write_bytes(b'{"text": "\x81\xff", "output": 1}\n')
    with pytest.raises(DataError) as error:
        labeltune.evaluate(gb_run / "out", str(wrong), progress=False)
    # `evaluate RUN` has no key and no option for it.
    assert f"not valid gb18030; convert it with: iconv -f UTF-8 -t GB18030 {wrong} > " in str(error.value)


def test_a_runs_encoding_is_saved_and_those_without_one_are_utf8(gb_run: Path) -> None:
    from labeltune.io.run_folder import RUN_FILE, RunInfo

    best = gb_run / "out" / "best"
    values = json.loads((best / RUN_FILE).read_text("utf-8"))
    assert values.pop("encoding") == "gb18030" == RunInfo.load(best).encoding
    (gb_run / "old").mkdir()
    (gb_run / "old" / RUN_FILE).write_text(json.dumps(values), encoding="utf-8")
    assert RunInfo.load(gb_run / "old").encoding == "utf-8"
    (gb_run / "old" / RUN_FILE).write_text(json.dumps({**values, "encoding": "gb-none"}), encoding="utf-8")
    with pytest.raises(ModelError, match="is damaged"):
        RunInfo.load(gb_run / "old")


def test_predict_reads_what_the_run_was_trained_on_unless_told_otherwise(
    gb_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from labeltune.commands.predict import predict_command as command
    from labeltune.io import progress

    monkeypatch.chdir(gb_run)
    monkeypatch.setattr(progress, "_noted", set())

    def predict(
        encoding: str | None = None, file: str | None = None, given: bytes = b""
    ) -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(given)))
        with contextlib.suppress(typer.Exit):
            command("out", file, encoding=encoding, with_text=True)
        printed, said = capsys.readouterr()
        rows = [json.loads(line) for line in printed.splitlines()]
        return [row.get("text", row.get("error")) for row in rows], said

    texts, said = predict(file="test.jsonl")
    assert texts[:2] == ["第16条 坏", "第17条 好"] and len(texts) == 8
    assert "note: test.jsonl is read as gb18030, as the run's data was; --encoding names another" in said
    row = '{"text": "今天"}\n明天\n'
    assert predict(given=row.encode("gb18030"))[0] == ["今天", "明天"]
    progress._noted.clear()
    texts, said = predict("utf-8", given=row.encode())
    assert texts == ["今天", "明天"] and "is read as" not in said
    assert predict("utf-16", given=row.encode("utf-16"))[0] == ["今天", "明天"]
    (text,), _ = predict("utf-8", given=row.encode("gb18030"))
    assert "encoding: not valid UTF-8 at byte 10; give --encoding gb18030, or convert it with: iconv" in text
