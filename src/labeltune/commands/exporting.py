"""From a run to a folder that others load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from labeltune import __version__
from labeltune.commands.row_hashes import SELECTION_FILE, TRAINING_FILE
from labeltune.commands.verification import rows_to_verify, validation_metrics
from labeltune.errors import ConfigError
from labeltune.export.card import CARD_FILE, Facts, base_license, card, read_metrics, usage
from labeltune.export.folder import (
    DTYPES,
    EXPORT_FILE,
    Dtype,
    check_repo,
    check_target,
    push_folder,
    whole_folder,
)
from labeltune.export.parity import Parity, check_parity, compare_answers
from labeltune.io.progress import tell, track
from labeltune.io.run_folder import RunInfo, public_name, write_json, write_text
from labeltune.models.pocket import POCKET_MODELS
from labeltune.types import Example, Prediction

Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What an export came to.

    Attributes:
        folder: where it is.
        kind: `merged model` or `adapter`.
        dtype: number format of the weights; of the base's, for an adapter.
        parity: how its answers compare with the run's; None when that was not checked.
        commands: what to run next, by what it is for.
        address: where it was pushed, None when it was not.
    """

    folder: Path
    kind: str
    dtype: Dtype
    parity: Parity | None
    commands: dict[str, str]
    address: str | None = None


def export(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    merged: bool = False,
    dtype: str | None = None,
    ollama: bool = False,
    onnx: bool = False,
    verify: bool = True,
    verify_data: str | None = None,
    max_rows: int | None = None,
    tolerance: float = 0.0,
    metrics: str | os.PathLike[str] | None = None,
    push: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    say: Say = tell,
    progress: bool = True,
) -> Exported:
    """Write a run in a form that transformers, vLLM, Ollama or ONNX Runtime load, and check that it answers alike.

    Args:
        run: a run folder, a checkpoint, or one on a hub.
        output: folder to make; it appears whole or not at all.
        merged: a whole model; otherwise the adapter by itself. Implied by `ollama` and `onnx`.
        dtype: `bf16`, `fp16` or `fp32` for a merged model; the format of the base's weights when None.
        verify: predict rows with run and export, and fail where they differ.
        verify_data: labelled rows for that; the run's validation rows when None.
        max_rows: only the first rows of `verify_data`.
        tolerance: share of rows that may differ.
        metrics: a `metrics.json` of `evaluate`, for the card.
        push: `hf:org/name` or `ms:org/name`.
        name: what servers call it; the folder's name when None.
        overwrite: replace an earlier export.

    Raises:
        ConfigError: options that do not go together, or optimum is missing.
        DataError: the rows to verify with, or the metrics file, cannot be used.
        HubError: the hub cannot be reached or refuses; the folder is complete.
        ModelError: the run or its base cannot be loaded, or not be exported this way.
        OutputError: the folder is not empty or cannot be written.
        ParityError: the export answers otherwise; nothing was exported.
        PromptError: the chat template cannot be written as a Modelfile.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if not 0 <= tolerance < 1:
        raise ConfigError(f"--tolerance is a share of rows, from 0 to below 1, not {tolerance:g}")
    if not verify and verify_data is not None:
        raise ConfigError("--verify and --no-verify contradict each other")
    merged = merged or ollama or onnx
    if dtype is not None and not merged:
        raise ConfigError("--dtype is for --merged; an adapter is exported as it was trained")
    if push is not None:
        check_repo(push)

    from labeltune.export import ollama as ollama_form
    from labeltune.export import onnx as onnx_form
    from labeltune.export import vllm
    from labeltune.export.merge import save_whole_model, stored_dtype, whole_model
    from labeltune.inference.load import checkpoint_of
    from labeltune.models.hub import load_tokenizer, resolve_model
    from labeltune.prompts import make_task
    from labeltune.prompts.template import ChatTemplate

    write_onnx = onnx_form.exporter() if onnx else None
    checkpoint = checkpoint_of(run)
    info = RunInfo.load(checkpoint)
    target = Path(output).expanduser()
    check_target(
        target, checkpoint, overwrite, [given for given in (verify_data, metrics) if given is not None]
    )
    test_metrics = read_metrics(Path(metrics), info.task) if metrics is not None else None
    called = name or target.resolve().name
    if not info.adapter and not merged:
        raise ConfigError("this run trained all weights and has no adapter; export it with --merged")
    base = resolve_model(info.model, info.hub).folder if info.adapter else checkpoint
    adapter = None if merged else vllm.read_adapter(checkpoint)
    if adapter is not None and push is not None and not _found_by_others(info.model):
        raise ConfigError(
            f"the adapter's base is {info.model}, a folder of this machine that nobody else has; push the whole model "
            "(--merged), or train on a hub's model (ms: or hf:)"
        )
    tokenizer = load_tokenizer(checkpoint, info.runs_code())
    tokenizer.chat_template = info.chat_template
    template = ChatTemplate(tokenizer)
    task = make_task(info.task, info.labels, info.prompt)
    modelfile = (
        ollama_form.modelfile(template, info.prompt.system or "", info.prompt.max_length) if ollama else ""
    )
    form: Dtype = dtype or stored_dtype(base)  # type: ignore[assignment]
    kind = "merged model" if merged else "adapter"
    rows = rows_to_verify(checkpoint, info, verify_data, max_rows, say) if verify else []

    commands: dict[str, str] = {}
    with whole_folder(target) as folder:
        if adapter is None:
            say(f"writing the whole model in {form}")
            model = whole_model(base, checkpoint if info.adapter else None, form, info.runs_code())
            save_whole_model(model, template, folder)
            del model
            commands["Serve with vLLM"] = vllm.merged_command(target, called, info.runs_code())
        else:
            vllm.save_adapter(checkpoint, tokenizer, vllm.base_name(info.model), info.hub.revision, folder)
            commands["Serve with vLLM"] = vllm.adapter_command(
                info.model, info.hub, base, target, called, adapter
            )
        for file in ("calibration.json", SELECTION_FILE, TRAINING_FILE):
            if (checkpoint / file).is_file():
                shutil.copyfile(checkpoint / file, folder / file)
        asked = vllm.request(task, tokenizer, called, info.generation.max_new_tokens)
        write_json(folder / vllm.REQUEST_FILE, asked)
        commands["Ask it"] = vllm.request_command(target)
        _public(info, merged, push is not None).save(folder)
        parity = _verified(checkpoint, folder, base if info.adapter else None, form, rows, say, progress)
        if parity is not None:
            say(f"parity in {form}: {parity}")
            check_parity(parity, tolerance, f"the exported {kind} ({form})")
        if ollama:
            write_text(folder / ollama_form.MODELFILE, modelfile)
            commands |= _gguf(folder, target, form, called, say)
            commands["Ask Ollama"] = ollama_form.ask_command(called, asked["messages"][-1]["content"])
        if write_onnx is not None:
            say("writing onnx/ (the parity gate has not seen it)")
            onnx_form.write_onnx(write_onnx, folder)
        facts = Facts(
            called,
            kind,
            form,
            base_license(info.model, base),
            validation_metrics(checkpoint),
            test_metrics,
            parity,
            asked["messages"],
            usage(info, merged, ollama, push, called),
        )
        write_text(folder / CARD_FILE, card(info, facts))
        made = {"labeltune": __version__, "kind": kind, "dtype": form, "base": public_name(info.model)}
        write_json(folder / EXPORT_FILE, {**made, "parity": None if parity is None else parity.to_dict()})
    say(f"exported the {kind} to {target}")
    address = push_folder(target, push) if push is not None else None
    if address is not None:
        say(f"pushed to {address}")
    return Exported(target, kind, form, parity, commands, address)


def _found_by_others(model: str) -> bool:
    return model.startswith(("ms:", "hf:")) or model in POCKET_MODELS


def _public(info: RunInfo, merged: bool, pushed: bool) -> RunInfo:
    """`labeltune.json` of the export; one that others read, or that needs no base, names no folder of this machine."""
    if not merged and not pushed:
        return info
    hub = info.hub.model_copy(update={"cache_dir": None})
    test = info.data.get("test")
    data = {**info.data, "test": public_name(test)} if isinstance(test, str) else info.data
    model = public_name(info.model) if merged else info.model
    return replace(info, hub=hub, model=model, adapter=not merged, data=data)


def _verified(
    checkpoint: Path,
    folder: Path,
    base: Path | None,
    form: Dtype,
    rows: list[Example],
    say: Say,
    progress: bool,
) -> Parity | None:
    """Run and export on the same rows, one after the other, in the precision of the export."""
    if not rows:
        return None
    say(f"verifying {len(rows)} rows with the run and with the export, in {form}")
    before = _answers(checkpoint, base, form, rows, progress)
    after = _answers(folder, base, form, rows, progress)
    return compare_answers(rows, before, after)


def _answers(
    folder: Path, base: Path | None, form: Dtype, rows: list[Example], progress: bool
) -> list[Prediction]:
    from labeltune.inference.load import load_predictor

    with load_predictor(folder, precision=form, base_folder=base) as predictor:
        return list(track(predictor.stream(rows), len(rows), shown=progress))


def _gguf(folder: Path, target: Path, form: Dtype, called: str, say: Say) -> dict[str, str]:
    """Convert where a converter is installed; the commands that are left."""
    from labeltune.export import ollama as ollama_form

    commands = {}
    converter = ollama_form.find_converter()
    if converter is None:
        say(
            f"no {ollama_form.CONVERTER} on PATH or in the folder LLAMA_CPP; convert the weights yourself before `ollama create`"
        )
        commands["Convert with llama.cpp"] = ollama_form.convert_command(target, form)
    else:
        say(f"writing {ollama_form.GGUF_FILE} with {converter} (the parity gate has not seen it)")
        ollama_form.convert(converter, folder, form)
    commands["Add to Ollama"] = ollama_form.create_command(target, called)
    return commands
