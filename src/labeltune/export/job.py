"""One export: a run, the folder that it goes to, and the comparison with what was written."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune import __version__
from labeltune.errors import ConfigError, DataError, LabeltuneError, ModelError
from labeltune.evaluation.compare import compare_predictions
from labeltune.export import card, engines, llama_cpp, merge, ollama, onnx, vllm
from labeltune.export.folder import EXPORT_FILE, Asked, Dtype, Exported
from labeltune.export.parity import Parity, check_parity, compare_answers, costs_told
from labeltune.inference.calibration import CALIBRATION_FILE, LINEAR_FILE, Calibration
from labeltune.inference.load import load_predictor, run_template
from labeltune.io.outputs import is_hub_name, write_json, write_text
from labeltune.io.progress import Say, begin, row_progress, track
from labeltune.io.run_folder import SELECTION_FILE, TRAINING_FILE, RunInfo, public_name, validation_file
from labeltune.models.hub import published_shell, resolve_model
from labeltune.models.pocket import POCKET_MODELS
from labeltune.prompts import Task, make_task
from labeltune.prompts.builder import PromptBuilder
from labeltune.prompts.template import ChatTemplate
from labeltune.types import Example, Prediction

if TYPE_CHECKING:
    import torch


def prepare(checkpoint: Path, info: RunInfo, target: Path, asked: Asked) -> Job:
    """Look at the run and its base, and refuse what cannot be exported before anything is written.

    Raises:
        ConfigError: what is asked for does not go with the run, or llama.cpp is missing.
        ModelError: the run or its base cannot be loaded, or vLLM does not load the adapter.
        PromptError: the chat template cannot be written as a Modelfile.
    """
    if not info.adapter and not asked.merged:
        raise ConfigError("this run trained all weights and has no adapter; export it with --merged")
    base = resolve_model(info.model, info.hub).folder if info.adapter else checkpoint
    adapter = None if asked.merged else vllm.read_adapter(checkpoint)
    if adapter is not None and asked.push is not None and not _found_by_others(info.model):
        raise ConfigError(
            f"the adapter's base is {info.model}, a folder of this machine that nobody else has; push the whole model "
            "(--merged), or train on a hub's model (ms: or hf:)"
        )
    if asked.engine == "ollama" and info.task == "multilabel":
        raise ConfigError(
            "Ollama tells no probabilities, and a run of several labels needs them; ask another engine"
        )
    python = asked.python or sys.executable
    if shutil.which(python) is None:
        raise ModelError(
            f"--engine-python {python} is no program; name the python of the engine's environment"
        )
    template = run_template(checkpoint, info)
    dtype: Dtype = asked.dtype or merge.stored_dtype(base)  # type: ignore[assignment]
    gguf = asked.gguf
    starts = asked.engine in ("llama.cpp", "ollama") and asked.url is None
    if gguf is None and (starts or (asked.ollama and llama_cpp.find_tool(llama_cpp.CONVERTER) is not None)):
        gguf = llama_cpp.type_of(dtype)
    if gguf is not None:
        server = {"llama.cpp": llama_cpp.SERVER, "ollama": ollama.PROGRAM}.get(asked.engine or "")
        llama_cpp.needed(*llama_cpp.tools(gguf, adapter is not None, server if starts else None))
    modelfile = (
        ollama.modelfile(template, info.prompt.system or "", info.prompt.max_length) if asked.ollama else None
    )
    return Job(
        checkpoint,
        info,
        target,
        asked,
        base,
        adapter,
        template,
        dtype,
        gguf,
        asked.name or target.resolve().name,
        modelfile,
    )


@dataclass(frozen=True)
class Job:
    """A run that is exported to `target`, and how.

    Attributes:
        base: folder of the base's weights; the checkpoint where it has all weights.
        adapter: what is exported; None for a whole model.
        gguf: type of the weights for llama.cpp; None where none are written.
        name: what servers call it.
        modelfile: for Ollama; None when it is not asked for.
    """

    checkpoint: Path
    info: RunInfo
    target: Path
    asked: Asked
    base: Path
    adapter: vllm.Adapter | None
    template: ChatTemplate
    dtype: Dtype
    gguf: str | None
    name: str
    modelfile: str | None

    @property
    def kind(self) -> str:
        """What the folder holds."""
        return "merged model" if self.adapter is None else "adapter"

    @property
    def form(self) -> str:
        """What an engine is asked about."""
        return self.gguf if self.asked.engine in ("llama.cpp", "ollama") and self.gguf else self.dtype

    @property
    def task(self) -> Task:
        """What the run does."""
        return make_task(self.info.task, self.info.labels, self.info.prompt, self.info.entities)

    @property
    def python(self) -> str:
        """Of the engine's environment."""
        return self.asked.python or sys.executable

    @cached_property
    def request(self) -> dict[str, Any]:
        """The body of a request to vLLM, with a sample text."""
        return vllm.request(self.task, self.template, self.name, self.info.generation.max_new_tokens)

    def write(
        self,
        folder: Path,
        rows: list[Example],
        test_metrics: dict[str, Any] | None,
        exporter: Callable[..., None] | None,
        say: Say,
        progress: bool,
    ) -> Exported:
        """All forms that are wanted, compared with the run.

        Args:
            folder: that becomes `target`.
            rows: to compare on; none for no comparison.
            exporter: what `onnx.exporter` gave; None for no ONNX.

        Raises:
            ParityError: more rows than allowed are answered otherwise.
        """
        asked = self.asked
        commands = self.write_model(folder, say)
        parity, before = self.verified(folder, rows, say, progress)
        if parity is not None:
            say(f"parity in {self.dtype}: {parity}")
            check_parity(parity, asked.tolerance, f"the exported {self.kind} ({self.dtype})")
        if self.gguf is not None:
            commands |= self.write_gguf(folder, say)
            if asked.engine not in ("llama.cpp", "ollama"):
                say("note: nobody has asked llama.cpp about the GGUF file; --engine llama.cpp or ollama does")
        if asked.ollama:
            commands |= self.write_for_ollama(folder, say)
        served: Parity | None = None
        costs: dict[str, Any] = {}
        if asked.engine is not None:
            served, costs = self.asked_of_engine(folder, rows, before, say, progress)
            say(f"parity in {asked.engine} ({self.form}): {served}")
            if costs:
                say(f"{asked.engine} ({self.form}) beside the run: {costs_told(costs)}")
            what = f"the exported {self.kind} in {asked.engine} ({self.form})"
            check_parity(served, asked.tolerance, what)
        if exporter is not None:
            begin("writing onnx/ (the parity gate has not seen it)", say)
            onnx.write_onnx(exporter, folder)
        self.describe(folder, test_metrics, parity, served, costs)
        return Exported(
            self.target, self.kind, self.dtype, parity, commands, engine_parity=served, engine_figures=costs
        )

    def write_model(self, folder: Path, say: Say) -> dict[str, str]:
        """Weights, and what labeltune needs to load them; returns the commands to run next."""
        info, text_only = self.info, self._published is not None
        if self.adapter is None:
            adapter = self.checkpoint if info.adapter else None
            merging = adapter is not None
            begin(
                f"{'merging the adapter and ' if merging else ''}writing the whole model in {self.dtype}", say
            )
            rest = self._base_folder if adapter is None and self._published is not None else None
            model = merge.whole_model(self.base, adapter, self.dtype, info.runs_code(), rest)
            merge.save_whole_model(model, self.template, folder, self.base)
            command = vllm.merged_command(str(self.target), self.name, info.runs_code(), text_only)
        else:
            name = vllm.base_name(info.model)
            vllm.save_adapter(
                self.checkpoint, self.template.tokenizer, name, info.hub.revision, folder, self._published
            )
            base = info.model if is_hub_name(info.model) else str(self.base)
            command = vllm.adapter_command(
                base, info.hub, str(self.target), self.name, self.adapter, text_only
            )
        for file in (CALIBRATION_FILE, LINEAR_FILE, SELECTION_FILE, TRAINING_FILE):
            if (self.checkpoint / file).is_file():
                shutil.copyfile(self.checkpoint / file, folder / file)
        write_json(folder / vllm.REQUEST_FILE, self.request)
        calibration = Calibration.load(self.checkpoint)
        told = vllm.client_file(
            self.task,
            self.template,
            self.name,
            info.prompt,
            calibration,
            max_new_tokens=info.generation.max_new_tokens,
            adapter=self.adapter is not None,
        )
        if told is not None:
            write_json(folder / engines.CLIENT_FILE, told)
        _public(info, self.adapter is None, self.asked.push is not None).save(folder)
        return {"Serve with vLLM": command, "Ask it": vllm.request_command(self.target)}

    @cached_property
    def _published(self) -> torch.nn.Module | None:
        """Of a model whose text part alone was trained, the whole one as servers know it, without weights; None of others."""
        folder = self._base_folder
        return None if folder is None else published_shell(folder, self.info.runs_code())

    @cached_property
    def _base_folder(self) -> Path | None:
        """Folder of the base model. A run of all weights needs it no more, and it may have gone: it is looked for, which may be a download,
        where the run has the text part alone of something larger."""
        if self.info.adapter:
            return self.base
        kind = json.loads((self.checkpoint / "config.json").read_text(encoding="utf-8")).get("model_type", "")
        if not str(kind).endswith("_text"):
            return None
        try:
            return resolve_model(self.info.model, self.info.hub).folder
        except LabeltuneError:
            return None

    def write_gguf(self, folder: Path, say: Say) -> dict[str, str]:
        """The weights for llama.cpp, and its request; returns the commands to run next."""
        assert self.gguf is not None
        file = folder / (llama_cpp.MODEL if self.adapter is None else llama_cpp.ADAPTER)
        begin(f"writing {file.name} with llama.cpp", say)
        commands: dict[str, str] = {}
        base = None
        if self.adapter is None:
            llama_cpp.write_model(folder, file, self.gguf, self.dtype, self.python)
        else:
            llama_cpp.write_adapter(folder, self.base, file, self.dtype, self.python)
            called = Path(public_name(self.info.model)).name
            base = self.target.resolve().parent / f"{called}-{self.gguf}.gguf"
            commands["Convert the base"] = llama_cpp.convert_command(
                str(self.base), base, self.gguf, self.dtype
            )
        task, extra = self.task, self.info.generation.max_new_tokens
        write_json(folder / llama_cpp.REQUEST_FILE, llama_cpp.request(task, self.template, self.name, extra))
        commands["Serve with llama.cpp"] = llama_cpp.serve_command(
            self.target, base, self.name, self.template
        )
        return commands | {"Ask llama.cpp": llama_cpp.request_command(self.target)}

    def write_for_ollama(self, folder: Path, say: Say) -> dict[str, str]:
        """A Modelfile; returns the commands that are left."""
        assert self.modelfile is not None
        write_text(folder / ollama.MODELFILE, self.modelfile)
        commands = {}
        if self.gguf is None:
            say(
                f"no {llama_cpp.CONVERTER} on PATH or in the folder LLAMA_CPP; convert the weights yourself before `ollama create`"
            )
            file = self.target / llama_cpp.MODEL
            commands["Convert with llama.cpp"] = llama_cpp.convert_command(
                str(self.target), file, llama_cpp.type_of(self.dtype), self.dtype
            )
        commands["Add to Ollama"] = ollama.create_command(self.target, self.name)
        commands["Ask Ollama"] = ollama.ask_command(self.name, self.request["messages"][-1]["content"])
        return commands

    def verified(
        self, folder: Path, rows: list[Example], say: Say, progress: bool
    ) -> tuple[Parity | None, list[Prediction]]:
        """Run and export on the same rows, one after the other, in the precision of the export; and what the run answers."""
        if not rows:
            return None, []
        begin(f"verifying {len(rows)} rows with the run and with the export, in {self.dtype}", say)
        before = self._answers(self.checkpoint, rows, progress)
        after = self._answers(folder, rows, progress)
        if Calibration.load(folder).linear:
            alone = compare_answers(rows, before, self._answers(folder, rows, progress, linear=False))
            say(
                f"warning: the run adds a linear model's scores, which other engines do not: without them {alone}"
            )
        return compare_answers(rows, before, after), before

    def _answers(
        self, folder: Path, rows: list[Example], progress: bool, linear: bool = True
    ) -> list[Prediction]:
        base = self.base if self.info.adapter else None
        with load_predictor(folder, precision=self.dtype, base_folder=base) as predictor:
            if not linear:
                predictor.linear = None
            return list(track(predictor.stream(rows), len(rows), shown=progress))

    def asked_of_engine(
        self, folder: Path, rows: Sequence[Example], before: Sequence[Prediction], say: Say, progress: bool
    ) -> tuple[Parity, dict[str, Any]]:
        """Serve the export with its engine, and compare its answers with the run's.

        Returns:
            The comparison; and the figures of run and engine with intervals of their difference, where rows have right answers.

        Raises:
            ConfigError: there is no row to ask about.
            ModelError: the engine does not start, or cannot be understood.
            ParityError: it ignores the adapter, or reads another prompt.
        """
        builder = PromptBuilder(self.task, self.template)
        fitting = engines.rows_that_fit(builder, rows)
        if not fitting:
            raise ConfigError(
                "an engine does not shorten texts, and none of the rows fits; name others with --verify FILE"
            )
        if self.task.name == "multilabel" and not (folder / engines.CLIENT_FILE).is_file():
            raise ConfigError(
                "the labels of this run can be asked about by labeltune.client alone, which does not read this tokenizer's prompts; "
                "leave out --engine"
            )
        if len(fitting) < len(rows):
            say(f"{len(rows) - len(fitting)} rows are left out, as a server does not shorten their texts")
        chosen, known = [rows[number] for number in fitting], [before[number] for number in fitting]
        extra = self.info.generation.max_new_tokens
        served = engines.Served(
            folder,
            None if self.adapter is None else self.base,
            self.name,
            self.dtype,
            1 if self.adapter is None else self.adapter.max_rank,
            2 * self.info.prompt.max_length + extra,
            extra,
            builder,
            self.info.runs_code(),
            self._published is not None,
        )
        with self._engine(served, say) as (engine, url):
            if served.base is not None:
                engines.check_heard(engine, url, builder.prompt(chosen[0]).ids)
            with row_progress(len(chosen), f"asking {engine.name}", progress) as advance:
                found = engines.answers(engine, url, chosen, advance)
        labelled = all((e.label, e.entities, e.labels) != (None, None, None) for e in chosen)
        costs = compare_predictions(chosen, known, found)["differences"] if labelled else {}
        return compare_answers(chosen, known, found), costs

    @contextmanager
    def _engine(self, served: engines.Served, say: Say) -> Iterator[tuple[engines.Engine, str]]:
        """The engine, and its address."""
        url = self.asked.url
        with tempfile.TemporaryDirectory(dir=served.folder.parent, prefix=".labeltune-") as beside:
            if self.asked.engine == "llama.cpp":
                base = None if served.base is None else Path(beside) / llama_cpp.BASE
                if base is not None and url is None:
                    begin("converting the base for llama.cpp", say)
                    assert self.gguf is not None
                    llama_cpp.write_model(self.base, base, self.gguf, self.dtype, self.python)
                engine: engines.Engine = llama_cpp.LlamaServer(served, base)
            elif self.asked.engine == "ollama":
                engine = ollama.OllamaServer(served, Path(beside))
            elif self.asked.engine == "transformers":
                engine = vllm.TransformersServer(served, self.python)
            else:
                engine = vllm.VllmServer(served, self.python)
            if url is not None:
                yield engine, url.rstrip("/").removesuffix("/v1")
                return
            begin(f"starting {engine.name} with the export", say)
            with engines.running(engine) as address:
                yield engine, address

    def describe(
        self,
        folder: Path,
        test_metrics: dict[str, Any] | None,
        parity: Parity | None,
        served: Parity | None,
        costs: Mapping[str, Any],
    ) -> None:
        """The model card, and `export.json`."""
        facts = card.Facts(
            self.name,
            self.kind,
            self.dtype,
            card.base_license(self.info.model, self.base),
            validation_metrics(self.checkpoint),
            test_metrics,
            parity,
            self.request["messages"],
            card.usage(
                self.info,
                self.adapter,
                self.modelfile is not None,
                self.asked.push,
                self.name,
                self._published is not None,
            ),
        )
        write_text(folder / card.CARD_FILE, card.card(self.info, facts))
        base = public_name(self.info.model)
        made = {"labeltune": __version__, "kind": self.kind, "dtype": self.dtype, "base": base}
        if self.gguf is not None:
            # An adapter stays in the format of its base; the type is that of the base that it was asked with.
            own = {"gguf": llama_cpp.type_of(self.dtype), "gguf_base": self.gguf}
            made |= {"gguf": self.gguf} if self.adapter is None else own
        if served is not None:
            made |= {"engine": str(self.asked.engine), "engine_form": self.form}
        told = {"parity": parity, "engine_parity": served}
        costs = {"engine_figures": dict(costs)} if costs else {}
        write_json(
            folder / EXPORT_FILE,
            {**made, **{key: value and value.to_dict() for key, value in told.items()}, **costs},
        )


def _found_by_others(model: str) -> bool:
    return is_hub_name(model) or model in POCKET_MODELS


def _public(info: RunInfo, merged: bool, pushed: bool) -> RunInfo:
    """`labeltune.json` of the export; one that others read, or that needs no base, names no folder of this machine."""
    if not merged and not pushed:
        return info
    hub = info.hub.model_copy(update={"cache_dir": None})
    test = info.data.get("test")
    data = {**info.data, "test": public_name(test)} if isinstance(test, str) else info.data
    model = public_name(info.model) if merged else info.model
    return info.model_copy(update={"hub": hub, "model": model, "adapter": not merged, "data": data})


def validation_metrics(checkpoint: Path) -> dict[str, Any] | None:
    """The run's figures on its validation rows, if this is the checkpoint they were measured with."""
    file = validation_file(checkpoint, "metrics.json")
    if file is None or (file.parents[1] / "best").resolve() != checkpoint.resolve():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is damaged: {error}") from error
