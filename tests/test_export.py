"""An export answers as its run does, or does not come into being."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import labeltune
from helpers import forks
from helpers.rows import LABELS, classification_rows, ner_rows, write_jsonl
from helpers.tiny_models import make_model, make_tokenizer
from helpers.training import config_for
from labeltune import load_predictor
from labeltune.commands import export as export_page
from labeltune.config import build_config, load_config
from labeltune.errors import ConfigError, DataError, ModelError, OutputError, ParityError
from labeltune.export.folder import Exported
from labeltune.export.job import Job
from labeltune.export.merge import stored_dtype, whole_model
from labeltune.export.parity import check_parity, compare_answers
from labeltune.io.run_folder import RunInfo
from labeltune.types import Entity, Example, Prediction

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "classification": ("classification", {}),
    "ner": ("ner", {}),
    "dora": ("classification", {"dora": True}),
    "rslora": ("classification", {"rslora": True}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    """kind -> the run folder of an adapter that was trained for a few steps."""
    found = {}
    for kind, (task, lora) in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        config = config_for(folder, model_folder, task, max_steps=3)
        config = build_config(
            {
                **config.model_dump(exclude_unset=True),
                "lora": {"dropout": 0.0, **lora},
                "output_dir": str(folder / "out"),
            }
        )
        labeltune.train(config, say=lambda _: None)
        found[kind] = folder / "out"
    return found


def quiet_export(run: Path, output: Path, **options: Any) -> Exported:
    return export_page.export(run, output, say=lambda _: None, progress=False, **options)


def shown(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rows_of(kind: str) -> list[str]:
    return [row["text"] for row in (ner_rows(9) if kind == "ner" else classification_rows(9))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_the_adapter_on_its_base(kind: str, runs: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = quiet_export(runs[kind], tmp_path / "out", merged=True)
    assert done.kind == "merged model" and done.dtype == "fp32" and done.parity is not None
    assert done.parity.rows == 5 and not done.parity.differences
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    info = RunInfo.load(tmp_path / "out")
    assert not info.adapter and info.model == "Qwen2-1___5B-Instruct"
    assert tokenizer.chat_template == info.chat_template
    assert plain.generation_config.eos_token_id == tokenizer.eos_token_id
    texts = rows_of(kind)
    with load_predictor(runs[kind]) as run, load_predictor(tmp_path / "out") as exported:
        before, after = run.predict(texts), exported.predict(texts)
        for old, new in zip(before, after, strict=True):
            assert old.label == new.label and old.entities == new.entities
            assert dict(old.ranking) == pytest.approx(dict(new.ranking), abs=1e-5)
        prompt = torch.tensor([run.builder.prompt(Example("0", texts[0], tuple(LABELS))).ids])
        with torch.no_grad():
            logits = run.model(prompt).logits
            assert torch.allclose(logits, plain(prompt).logits, atol=1e-4)
            with run.model.disable_adapter():
                assert not torch.allclose(logits, run.model(prompt).logits, atol=1e-4)
        answers = [
            model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :].tolist()
            for model in (run.model, plain)
        ]
        assert answers[0] == answers[1]
    best = runs[kind] / "best"
    for name in ("calibration.json", "selection.u64"):
        assert (best / name).is_file() == (tmp_path / "out" / name).is_file()
    assert (tmp_path / "out" / "selection.u64").read_bytes() == (best / "selection.u64").read_bytes()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_other_formats_are_rounded_once(
    dtype: Any, runs: dict[str, Path], tmp_path: Path, model_folder: Path
) -> None:
    done = quiet_export(runs["classification"], tmp_path / "out", merged=True, dtype=dtype, tolerance=0.5)
    assert done.dtype == dtype == stored_dtype(tmp_path / "out")
    exact = whole_model(model_folder, runs["classification"] / "best", "fp32").state_dict()
    rounded = whole_model(model_folder, runs["classification"] / "best", dtype).state_dict()
    for name, weights in exact.items():
        assert torch.equal(weights.to(rounded[name].dtype), rounded[name]), name


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning:peft")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning:peft")
def test_an_adapted_output_layer_leaves_the_tied_input_alone(tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    config = type(model.config)(**{**model.config.to_dict(), "tie_word_embeddings": True})
    tied = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tied.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(
        tied, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"])
    )
    for name, weights in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted = wrapped.eval()(ids).logits
    whole_model(tmp_path / "base", tmp_path / "adapter", "fp32").save_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(
            wanted, AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, atol=1e-4
        )


@pytest.mark.filterwarnings("ignore:prediction uses")
@pytest.mark.parametrize("merged", [True, False])
def test_a_damaged_export_fails_the_gate(
    merged: bool, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    verified = Job.verified

    def damaged(job: Job, folder: Path, *rest: Any) -> Any:
        (path,) = folder.glob("*model.safetensors")
        weights = load_file(path)
        # One of an adapter's two matrices, every weight of a merged model.
        touched = {n: v * -300 if "lora_B" in n or merged else v for n, v in weights.items()}
        save_file(touched, path, {"format": "pt"})
        return verified(job, folder, *rest)

    rows = str(write_jsonl(tmp_path / "rows.jsonl", classification_rows(12)))
    with monkeypatch.context() as patched:
        patched.setattr(Job, "verified", damaged)
        with pytest.raises(ParityError) as raised:
            quiet_export(runs["classification"], tmp_path / "out", merged=merged, verify_data=rows)
    message = str(raised.value)
    assert "of 12 rows differ" in message and "margin 0." in message and "rows.jsonl:" in message
    assert raised.value.exit_code == 1
    assert shown(tmp_path) == ["rows.jsonl"], "nothing may be left behind"
    done = quiet_export(runs["classification"], tmp_path / "out", merged=merged, verify_data=rows)
    assert done.parity is not None and done.parity.rows == 12 and not done.parity.differences


def test_the_gate_counts_labels_and_entities() -> None:
    examples = [Example(str(i), "a b", source=f"f:{i}") for i in range(30)]
    before = [Prediction(e.id, "A", label="A", ranking=(("A", 0.6), ("B", 0.4))) for e in examples]
    after = [Prediction(e.id, "B", label="B", ranking=(("B", 0.7), ("A", 0.3))) for e in examples]
    parity = compare_answers(examples, before, [*before[:3], *after[3:]])
    assert parity.share == 0.9 and parity.largest_shift == pytest.approx(0.3)
    assert str(parity.differences[0]) == "f:3: A -> B (margin 0.2000)"
    check_parity(parity, 0.9, "it")
    with pytest.raises(ParityError, match=r"27 of 30 rows differ[^$]*and 7 more"):
        check_parity(parity, 0.89, "it")
    found = [Prediction("0", "", entities=(Entity("a", "X", 0, 1),)), Prediction("0", "", entities=())]
    parity = compare_answers(examples[:2], [found[0], found[1]], [found[1], found[1]])
    assert [str(d) for d in parity.differences] == ["f:0: a (X, 0-1) -> no entity"]
    assert compare_answers([], [], []).share == 0.0


def test_without_rows_the_gate_says_that_it_is_open(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree((runs["classification"] / "best").resolve(), tmp_path / "alone")
    said: list[str] = []
    done = export_page.export(tmp_path / "alone", tmp_path / "out", say=said.append, progress=False)
    assert done.parity is None and any("nothing is verified" in line for line in said)
    assert "was not compared" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    quiet = quiet_export(runs["classification"], tmp_path / "out2", verify=False)
    assert quiet.parity is None


def test_an_export_never_replaces_what_it_should_not(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["classification"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(OutputError, match="not empty"):
        quiet_export(run, tmp_path / "full")
    with pytest.raises(OutputError, match=r"no export\.json"):
        quiet_export(run, tmp_path / "full", overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        quiet_export(run, tmp_path / "full" / "precious")
    for own in (run, run / "best", run.parent):
        with pytest.raises(OutputError, match="holds the run"):
            quiet_export(run, own, overwrite=True)
    (tmp_path / "empty").mkdir()
    quiet_export(run, tmp_path / "empty", verify=False)
    (tmp_path / "empty" / "left over").touch()
    with pytest.raises(OutputError, match="--overwrite"):
        quiet_export(run, tmp_path / "empty", verify=False)
    quiet_export(run, tmp_path / "empty", verify=False, overwrite=True)
    assert "left over" not in shown(tmp_path / "empty")
    assert shown(tmp_path) == ["empty", "full"]
    assert not [path for path in (tmp_path / "empty").rglob("*") if path.suffix in {".bin", ".pt", ".pth"}]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"dtype": "fp8", "merged": True}, "bf16, fp16, fp32"),
        ({"dtype": "bf16"}, "--dtype is for --merged"),
        ({"tolerance": 1.0}, "--tolerance"),
        ({"verify": False, "verify_data": "x.jsonl"}, "contradict"),
        ({"push": "org/name"}, "hf:org/name"),
        ({"push": "hf:a/b/c"}, "hf:org/name"),
        ({"onnx": True}, "optimum-cli export onnx"),
        ({"push": "hf:org/name"}, "folder of this machine"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, Any], part: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=part):
        quiet_export(runs["classification"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_errors_are_one_message(runs: dict[str, Path], tmp_path: Path) -> None:
    done = forks.run(["-m", "labeltune", "export", tmp_path / "none", "out"], cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if not line.startswith("... ")]
    assert done.returncode == 2 and len(said) == 1 and said[0].startswith("error: run folder")
    assert not done.stdout
    run = runs["classification"]
    with pytest.raises(ModelError, match="does not exist"):
        quiet_export(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ModelError, match="DoRA"):
        quiet_export(runs["dora"], tmp_path / "out")
    with pytest.raises(DataError):
        quiet_export(run, tmp_path / "out", verify_data=str(tmp_path / "none.jsonl"))
    (tmp_path / "metrics.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"no metrics\.json"):
        quiet_export(run, tmp_path / "out", metrics=tmp_path / "metrics.json")
    assert shown(tmp_path) == ["metrics.json"]


def test_a_run_of_all_weights(model_folder: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path, model_folder, max_steps=2, method="full")
    labeltune.train(config, say=lambda _: None)
    with pytest.raises(ConfigError, match="--merged"):
        quiet_export(tmp_path / "out", tmp_path / "exported")
    done = quiet_export(tmp_path / "out", tmp_path / "exported", merged=True)
    assert done.parity is not None and done.parity.rows and not done.parity.differences


def test_the_card_says_what_is_known(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["classification"]
    write_jsonl(tmp_path / "secret_place.jsonl", classification_rows(9))
    labeltune.evaluate(run, str(tmp_path / "secret_place.jsonl"), output=tmp_path / "report", progress=False)
    quiet_export(run, tmp_path / "titles", merged=True, metrics=tmp_path / "report" / "metrics.json")
    text = (tmp_path / "titles" / "README.md").read_text(encoding="utf-8")
    for part in (
        "# titles\n",
        "43 rows of `classification.jsonl`; 5 validation rows",
        "| Space | 1",
        "On 5 validation (used for selection) rows (decoding=exact)",
        "On 9 ",
        "`secret_place.jsonl`",
        "95 % interval",
        "5 of 5 rows are answered the same",
        "['Art', 'Space', 'Sports']",
        "at most 512 tokens",
        "unknown here",
        'load_predictor("titles")',
    ):
        assert part in text, part
    for file in (tmp_path / "titles").glob("*"):
        if file.suffix in {".json", ".md", ".jinja"}:
            assert str(tmp_path) not in file.read_text(encoding="utf-8"), file
            assert str(run) not in file.read_text(encoding="utf-8"), file
    # A link to the checkpoint brings the same figures and rows.
    (tmp_path / "link").symlink_to(run / "best")
    done = quiet_export(tmp_path / "link", tmp_path / "linked", merged=True)
    assert done.parity is not None and done.parity.rows == 5
    assert "(used for selection) rows" in (tmp_path / "linked" / "README.md").read_text(encoding="utf-8")
    # Another checkpoint than the one the figures belong to brings none.
    other = next(path for path in run.glob("checkpoint-*") if path.resolve() != (run / "best").resolve())
    quiet_export(other, tmp_path / "other", merged=True, verify=False)
    assert "holds no figures" in (tmp_path / "other" / "README.md").read_text(encoding="utf-8")


def test_vllm_gets_an_adapter_folder(runs: dict[str, Path], tmp_path: Path, model_folder: Path) -> None:
    done = quiet_export(runs["classification"], tmp_path / "my-adapter")
    assert done.kind == "adapter" and done.parity is not None and not done.parity.differences
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "labeltune.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
        "export.json",
        "vllm_request.json",
    } <= set(shown(tmp_path / "my-adapter"))
    assert not {"optimizer.pt", "training_args.bin"} & set(shown(tmp_path / "my-adapter"))
    config = json.loads((tmp_path / "my-adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(model_folder)
    assert (
        not config["modules_to_save"]
        and config["bias"] == "none"
        and isinstance(config["target_modules"], list)
    )
    assert done.commands["Serve with vLLM"] == (
        f"vllm serve {model_folder} --enable-lora --lora-modules my-adapter={tmp_path}/my-adapter --max-lora-rank 8 "
        f"--chat-template {tmp_path}/my-adapter/chat_template.jinja"
    )
    asked = json.loads((tmp_path / "my-adapter" / "vllm_request.json").read_text(encoding="utf-8"))
    assert asked["structured_outputs"] == {"choice": ["Art", "Space", "Sports"]}
    assert asked["model"] == "my-adapter" and asked["temperature"] == 0
    with load_predictor(tmp_path / "my-adapter") as predictor:
        example = Example("0", "The text to be read goes here.")
        assert asked["messages"] == predictor.task.conversation(example).messages()
        # The base's own settings, which Qwen2 has, would punish the labels that stand in the prompt.
        assert asked["repetition_penalty"] == 1
        assert asked["stop_token_ids"] == predictor.builder.template.stop_ids


def test_a_pushed_folder_is_whole_and_names_no_path(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    seen: list[tuple[Path, str, list[str]]] = []

    def fake_push(folder: Path, spec: str) -> str:
        seen.append((folder, spec, shown(folder)))
        return "https://hub/org/name"

    monkeypatch.setattr("labeltune.export.folder.push_folder", fake_push)
    done = quiet_export(
        runs["ner"], tmp_path / "out", merged=True, ollama=True, verify=False, push="hf:org/name"
    )
    assert done.address == "https://hub/org/name"
    ((folder, spec, names),) = seen
    assert folder == tmp_path / "out" and spec == "hf:org/name"
    assert {"README.md", "labeltune.json", "Modelfile", "model.safetensors"} <= set(names)
    for file in ("README.md", "labeltune.json", "config.json", "export.json", "Modelfile"):
        assert str(model_folder.parent) not in (folder / file).read_text(encoding="utf-8"), file
    assert 'load_predictor("hf:org/name")' in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:prediction uses the model.s own cache")
def test_all_weights_go_into_the_class_that_is_published(tmp_path: Path) -> None:
    import transformers

    from zoo.families import BY_NAME, save_family

    base = save_family(BY_NAME["qwen3_5"], tmp_path / "base")
    (base / "tokenizer.model").write_bytes(b"words")
    config = config_for(tmp_path, base, max_steps=2)
    values = {**config.model_dump(exclude_unset=True, exclude={"lora"}), "output_dir": str(tmp_path / "run")}
    values["training"] = {**values["training"], "method": "full", "learning_rate": 1e-3}
    labeltune.train(build_config(values), say=lambda _: None)
    with load_predictor(tmp_path / "run") as run, torch.no_grad():
        prompt = torch.tensor([run.builder.prompt(Example("0", rows_of("qwen3_5")[0], tuple(LABELS))).ids])
        wanted = run.model(prompt).logits
    done = quiet_export(tmp_path / "run", tmp_path / "whole", merged=True)
    assert done.parity is not None and not done.parity.differences
    kind = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    plain, merged = kind.from_pretrained(base).eval(), kind.from_pretrained(tmp_path / "whole").eval()
    assert merged.config.architectures == plain.config.architectures
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=prompt).logits, wanted, atol=1e-4)
        assert not torch.allclose(plain(input_ids=prompt).logits, wanted, atol=1e-4)
    # What other programs read of a base goes with its weights.
    assert (tmp_path / "whole" / "tokenizer.model").read_bytes() == b"words"


@pytest.mark.filterwarnings("ignore:prediction uses the model.s own cache")
@pytest.mark.filterwarnings(
    "ignore:Casting complex values"
)  # Llama 4's table of image positions, which is not saved
@pytest.mark.parametrize("family", ["qwen3_5", "llama4"])
@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, o_proj]"])
def test_layers_have_the_names_of_the_class_that_is_published(
    family: str, targets: str, tmp_path: Path
) -> None:
    """The text part alone is trained; a server that loads the whole model ignores an adapter whose names it does not know."""
    import peft
    import transformers

    from zoo.families import BY_NAME, save_family

    base = save_family(BY_NAME[family], tmp_path / "base")
    config = config_for(tmp_path, base, max_steps=2)
    values = {
        **config.model_dump(exclude_unset=True),
        "lora": {
            "dropout": 0.0,
            "target_modules": load_config(None, [f"lora.target_modules={targets}"]).lora.target_modules,
        },
        "output_dir": str(tmp_path / "run"),
    }
    labeltune.train(build_config(values), say=lambda _: None)
    kind = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    with load_predictor(tmp_path / "run") as run:
        prompt = torch.tensor([run.builder.prompt(Example("0", rows_of(family)[0], tuple(LABELS))).ids])
        with torch.no_grad():
            wanted = run.model(prompt).logits
            with run.model.disable_adapter():
                assert not torch.allclose(wanted, run.model(prompt).logits, atol=1e-4)

    done = quiet_export(tmp_path / "run", tmp_path / "adapter")
    assert done.parity is not None and not done.parity.differences
    plain = kind.from_pretrained(base)
    known = {name for name, _ in plain.named_modules()}
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert set(told["target_modules"]) <= known and not any(
        "vision" in name for name in told["target_modules"]
    )
    adapted = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.allclose(adapted(input_ids=prompt).logits, wanted, atol=1e-4)

    done = quiet_export(tmp_path / "run", tmp_path / "merged", merged=True)
    assert done.parity is not None and not done.parity.differences
    merged = kind.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.architectures == plain.config.architectures
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=prompt).logits, wanted, atol=1e-4)
