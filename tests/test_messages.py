"""Messages in Chinese: the catalogue holds what the source says, and nothing else; only messages are translated."""

from __future__ import annotations

import ast
import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from helpers.commands import command
from helpers.rows import classification_rows, write_jsonl
from labeltune import messages
from labeltune.data.schemas import FAULT_KINDS
from labeltune.messages import chinese, language, localize, spoken, templates

SOURCE = Path(__file__).resolve().parents[1] / "src" / "labeltune"
CHINESE = re.compile("[\u3400-\u9fff]")
HOLE = "7"
#: Put together by the source from more than one string, so that no template stands there in one piece.
COMPOSED = {
    "{where}: {given}, and the model says {suggested} at {n}; {against} stands against it",
    "{where}: {entity} at {start}:{end} and {other} at {begin}:{stop} cross: each holds a part of the other; marks can only nest",
    "{where}: entity {entity} has no place in the text, so no marks can stand around it",
    "step {step}/{steps}  epoch {epoch}",
    "step {step}/{steps}  epoch {epoch}  loss {loss}  lr {rate}",
    "step {step}/{steps}  epoch {epoch}  {speed} examples/s  {left} s left",
    "{word}:{n}: no column {column}; the file has {columns}",
    "{word}:{n}: no columns {columns}; the file has {columns2}",
    "say which one holds it: rename that column to {column}",
    "say which ones hold them: rename those columns",
    "set data.encoding={name}, or convert it with: iconv -f {encoding} -t {wanted} {file} > {new} (or from whatever encoding it has)",
    "give {option} {name}, or convert it with: iconv -f {encoding} -t {wanted} {file} > {new} (or from whatever encoding it has)",
    "not valid UTF-8 at byte {n}; {fix}; the rest was not read",
    "{where}: not valid UTF-8 at byte {n}; {fix}; the rest was not read",
    "the file is UTF-16; {fix}; the rest was not read",
    "{where}: the file is UTF-16; {fix}; the rest was not read",
    "{where}: not valid {word}; {fix}; the rest was not read",
    "{hint}: add {keys} to the command, or {how}",
    "{n} row to look at for their label",
    "{n} rows to look at for their label",
    "{hint}: add {keys} to the command, where COLUMN is its name in the file, or {how}",
    "it seems to be UTF-16 without a byte order mark; set data.encoding={encoding}, or convert it with: iconv -f {encoding2} -t UTF-8 {file} > {new}",
    "convert it with: iconv -f {encoding} -t {wanted} {file} > {new} (or from whatever encoding it has)",
    "{where}: error: {kind}: {message}",
    "{where}: warning: {kind}: {message}",
    "error{rank}: {message}",
    "ok  {what}",
    "note  {what}",
    "LACK  {what}",
    "accuracy: {value}",
    "macro_f1: {value}",
    "micro_f1: {value}",
    "subset_accuracy: {value}",
    "baseline constant_set: micro_f1 {n}",
    "span_f1: {value}",
    "baseline majority: accuracy {n}",
    "baseline uniform_guess: accuracy {n}",
    "baseline dictionary: span_f1 {n}",
    "accuracy: interval (bootstrap) and p (McNemar's test) disagree here; more rows would tell",
    "exact_rows: interval (bootstrap) and p (McNemar's test) disagree here; more rows would tell",
    "subset_accuracy: interval (bootstrap) and p (McNemar's test) disagree here; more rows would tell",
    "exported the adapter to {folder}",
    "exported the merged model to {folder}",
    "baseline linear: accuracy {n}",
    "baseline linear: micro_f1 {n}",
    "baseline crf: span_f1 {n}",
    "accuracy {first} -> {second}, {difference} (95 % interval {low} to {high})",
    "micro_f1 {first} -> {second}, {difference} (95 % interval {low} to {high})",
    "span_f1 {first} -> {second}, {difference} (95 % interval {low} to {high})",
    "{n} training row",
    "{n} training rows",
    "rows: {n} ({seen})",
    "rows: {n}, test ({seen})",
    "rows: {n}, validation (used for selection) ({seen})",
    "rows: {n}, training, out of fold ({seen})",
    "report on training, out of fold rows: {file}",
    "skipped: {kinds}",
    "report on validation (used for selection) rows: {file}",
    "step {step}: validation (used for selection): {figures}",
    "text length in characters: {figures}",
    "text length in tokens: {figures}",
    "{free} GiB of disk free for here ({folder})",
    "{free} GiB of disk free for the cache ({folder})",
    "warning: {message}",
    "{where}: unknown key {key}",
    "error: interrupted",
    "error: a file cannot be written: {reason}",
    "error: the output cannot be written: {reason}",
    "trial {number}: {values}",
    "trial {number} failed: {reason}; {done} of {trials} done{rest}",
    "trial {number}: {figure}, {seconds} s; {done} of {trials} done{rest}",
    "trial {number} has the values of trial {twin}, not trained again; {done} of {trials} done{rest}",
    ", the best is trial {number} with {value}, about {seconds} s left",
    "step {step}/{steps}  epoch {epoch}  loss {loss}  lr {rate}  {speed} examples/s  {left} s left",
    "confidence: temperature {temperature} is kept, {reason}; {rows} validation rows: {figures}",
    "training {n} s",
    "loading and checks {n} s",
    "validation {n} s",
    "confidence and report {n} s",
    "10th percentile {n}",
    "median {n}",
    "90th percentile {n}",
    "99th percentile {n}",
    "longest {n}",
    "{n} errors",
    "{n} pairs",
    "{n} warning",
    "{n} warnings",
    "{reason} (column {n})",
    "{name} ({word}) can be reached",
    "{name} ({word}) cannot be reached: {reason}",
    "{name} ({word}), {name2} ({word2}) cannot be reached: {reason}",
    "{name} ({word}), {name2} ({word2}), SwanLab cannot be reached: {reason}",
    "the two differ only in case",
    "the two differ only in blanks",
    "{label} is not among {whose} ({labels})",
    "unknown key {word}: {word2} ({whose}) needs no key here: {instead}",
    "did you mean {word}? {word2} ({whose}) is {word3} here: {change}",
    "did you mean {word}? {word2} ({whose}) is {word3} here: {change} ({about})",
    "{where}: instruction, candidates and answer alone need {tokens} tokens, {excess} more than prompt.max_length={limit}; prompt.max_length={enough} fits every row",
    "no answer in {n} s",
    "{word} {n} on validation (used for selection)",
    "{word} on validation (used for selection)",
    "{n} of {n2} rows are answered the same",
    "{label} ({rows}, first in line {n})",
    "{label} ({rows}, first in line {n}), {more}",
    "{label} ({rows}, first in row {n})",
    "{label} ({rows}, first in row {n}), {more}",
    "{word} of the texts shortened",
    "{n} times fewer tokens with a shared prefix",
    "accuracy: {first} -> {second}, {difference} (95 % interval {low} to {high}, p = {p})",
    "macro_f1: {first} -> {second}, {difference} (95 % interval {low} to {high}, p = {p})",
    "span_f1: {first} -> {second}, {difference} (95 % interval {low} to {high}, p = {p})",
    "exact_rows: {first} -> {second}, {difference} (95 % interval {low} to {high}, p = {p})",
    "accuracy: {first} -> {second}, no row makes a difference",
    "macro_f1: {first} -> {second}, no row makes a difference",
    "span_f1: {first} -> {second}, no row makes a difference",
    "exact_rows: {first} -> {second}, no row makes a difference",
    "{word}: {reason} (got {value}); {more}",
    "{where}: {word}: {reason} (got {value})",
    "{where}: {word}: {reason} (got {value}); {more}",
    "{file}: column {column} is read as {role}",
    "{n} passed over: {reason}, {more}",
    "{rows} in the pool, {passed}",
}
#: What libraries say, in our messages.
OTHERS = re.compile(
    r"(Error|Usage|Try '|No such |Missing |Got unexpected |Option \{option\} |Invalid value).*|"
    r"Input should be .*|Field required|Expecting .*|Extra data|Unterminated string starting at|Invalid control character at|"
    r"Invalid \\escape|" + "|".join(re.escape(os.strerror(number)) for number in errno.errorcode)
)
#: Everything these print is in the catalogue, and every error they raise.
CONSOLE = """commands/board.py commands/compare.py commands/data.py commands/doctor.py commands/doubts.py commands/evaluate.py commands/export.py
    commands/init.py commands/learning_curve.py commands/main.py commands/next.py commands/options.py commands/plan.py commands/predict.py commands/preparing.py
    commands/serve.py commands/sweep.py commands/train.py config.py config_values.py data/check.py data/columns.py data/convert.py data/containers.py
    data/formats/__init__.py data/formats/base.py data/formats/brat.py data/formats/chats.py data/formats/chinese.py data/formats/docbin.py
    data/formats/doccano.py data/formats/label_studio.py data/formats/prodigy.py data/formats/tags.py data/formats/write.py
    data/labels.py data/loading.py data/records.py data/schemas.py data/sources.py data/standard_input.py data/tables.py
    evaluation/data_report.py evaluation/summary.py export/card.py export/folder.py export/merge.py export/onnx.py export/vllm.py
    inference/calibration.py inference/files.py inference/ray.py io/hubs.py io/lock.py io/outputs.py io/progress.py
    io/run_folder.py models/hub.py models/pocket.py prompts/classification.py prompts/ner.py prompts/template.py
    serve/models.py serve/settings.py sweep/report.py sweep/run.py sweep/space.py sweep/study.py tracking/swanlab.py training/callbacks.py
    training/checkpoints.py training/dataset.py training/preflight.py training/record.py training/run.py
    training/self_check.py training/trainer.py""".split()  # noqa: SIM905
#: What they say that has no words of its own, or is for a programmer.
SILENT = {
    f"labeltune {HOLE}",
    f"  {HOLE}  {HOLE}",
    f"  labeltune data check {HOLE}.jsonl\n  labeltune train {HOLE}.yaml",
    f"  labeltune evaluate output/{HOLE} --data {HOLE}_test.jsonl",
    f"  cd {HOLE}",
    f"  {HOLE}  {HOLE}  {HOLE}",
    f"{HOLE}: {HOLE}",
    f"{HOLE}  {HOLE}",
    f"{HOLE}: {HOLE}; {HOLE}",
    f"--labels {HOLE}",
    # In the catalogue with each of the words that stand there (COMPOSED).
    f"  text length in {HOLE}: {HOLE}",
    f"rows: {HOLE}, {HOLE}",
    f"baseline {HOLE}: {HOLE} {HOLE}",
    f"exported the {HOLE} to {HOLE}",
    f"report on {HOLE} rows: {HOLE}",
    f"rows: {HOLE}",
    f"{HOLE} must be a list of objects{HOLE}",
    # Commands, and the names of keys.
    f"      labeltune evaluate output/{HOLE} --data {HOLE}_test.jsonl",
}


def variants(node: ast.expr) -> list[str]:
    """What an expression may say, with HOLE for every value that is not known here."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else [HOLE]
    if isinstance(node, ast.JoinedStr):
        return ["".join(parts) for parts in product(*map(variants, node.values))]
    if isinstance(node, ast.FormattedValue):
        return variants(node.value) if isinstance(node.value, ast.IfExp) else [HOLE]
    if isinstance(node, ast.IfExp):
        return variants(node.body) + variants(node.orelse)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in variants(node.left) for b in variants(node.right)]
    return [HOLE]


@cache
def said() -> set[str]:
    """Every text of the source, whole and line by line."""
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
                for text in variants(node):
                    lines = [text, *re.split("\n|; ", text)]
                    found |= {*lines, *(line.strip() for line in lines)}
    return found


def told(path: Path) -> Iterator[tuple[int, str]]:
    """What a module prints or raises."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        raised = name.endswith("Error") and name not in (
            "AssertionError",
            "AttributeError",
            "MissingExtraError",
        )
        if (
            name in ("say", "print", "begin", "note", "tell", "_Problem", "Unreadable", "Interrupted")
            or raised
        ):
            for text in variants(
                node.args[-1] if name in ("_Problem", "Fault", "Unreadable") else node.args[0]
            ):
                yield node.lineno, text


def test_every_template_stands_in_the_source() -> None:
    for english in templates().keys() - COMPOSED:
        if OTHERS.fullmatch(english):
            continue
        pattern = re.compile(
            "".join(
                ".*" if at % 2 else re.escape(part) for at, part in enumerate(re.split(r"\{(\w+)\}", english))
            ),
            re.DOTALL,
        )
        assert any(pattern.fullmatch(text) for text in said()), f"nothing says {english!r} any more"


def test_both_sides_have_the_same_places() -> None:
    found = templates()
    assert len(found) > 250
    for english, translated in found.items():
        names = re.findall(r"\{(\w+)\}", english)
        assert len(set(names)) == len(names), english
        assert sorted(names) == sorted(re.findall(r"\{(\w+)\}", translated)), english
        if re.search("[A-Za-z]{4}", re.sub(r"\{\w+\}|SwanLab|LACK", "", english)):
            assert CHINESE.search(translated), english
        for kept in re.findall(
            r"`[^`]*`|--[a-z-]+|\b[a-z]{2,}\.[a-z_]+\b|[a-z_]+=[^ ;,)]*|[A-Z]+_[A-Z]+",
            re.sub(r"\{\w+\}", "", english),
        ):
            assert kept.rstrip(".") in translated, f"{english!r} lost {kept!r}"


@pytest.mark.parametrize("module", CONSOLE)
def test_what_the_console_says_is_in_the_catalogue(module: str) -> None:
    for line, text in told(SOURCE / module):
        if text.strip() and text not in SILENT and re.search("[A-Za-z]{3}", text):
            assert CHINESE.search(chinese(text)), f"{module}:{line}: {text!r}"


def test_every_kind_of_fault_is_in_the_catalogue() -> None:
    assert [meaning for _, meaning in FAULT_KINDS.values() if not CHINESE.search(chinese(meaning))] == []


@pytest.mark.parametrize(
    ("english", "translated"),
    [
        ("error: config file a b.yaml does not exist; `labeltune init classification` writes one",
         "错误：配置文件 a b.yaml 不存在；`labeltune init classification` 可生成一个"),
        ("error on rank 1: training: no room", "错误（进程 1）：训练参数：no room"),
        ("rows.jsonl:5: error: empty_field: text is empty", "rows.jsonl:5：错误：empty_field：text 为空"),
        ("rows.csv:5: error: empty_field: 文本 is empty", "rows.csv:5：错误：empty_field：文本为空"),
        ("\nrows.jsonl: 4 rows, 3 usable, 1 errors, 0 warnings\n", "\nrows.jsonl：共 4 行，可用 3 行，错误 1 个，警告 0 个\n"),
        ("error: the data holds 1 error:\n  a.csv:2: error: empty_field: text is empty\nRepair them, or evaluate with --on-error skip",
         "错误：数据中有 1 处错误：\n  a.csv:2：错误：empty_field：text 为空\n请修正，或评测时加 --on-error skip"),
        ("x.yaml: unknown key 'lora.rank'; did you mean 'lora.r'?", "x.yaml：未知的配置项 'lora.rank'；是否想写 'lora.r'？"),
        ("accuracy: 0.800  (95 % interval 0.700 to 0.900)", "准确率：0.800（95% 置信区间 0.700 至 0.900）"),
        ("confidence: temperature 1.00 is kept, at least 100 rows are needed to fit one; 9 validation rows: ECE 0.1, NLL 0.2, Brier 0.3",
         "置信度：温度保持为 1.00，拟合温度至少需要 100 行；验证集 9 行：ECE 0.1, NLL 0.2, Brier 0.3"),
        ("confidence: temperature 1.10; 200 validation rows: ECE 0.1 -> 0.2, NLL 0.5 -> 0.4, Brier 0.3 -> 0.4 (after: cross-fitted)",
         "置信度：温度 1.10；验证集 200 行：ECE 0.1 -> 0.2，NLL 0.5 -> 0.4，Brier 0.3 -> 0.4（拟合后为交叉拟合结果）"),
        ("steps: packing=padded, at most 1,768 tokens at a time; 29 tokens computed per example of 48; gradient checkpointing off (8 kB of activations per token, 19.1 GB free)",
         "训练步：packing=padded，每次前向最多 1,768 个 token；公共前缀只算一次，平均每条 48 个 token 只计算 29 个；梯度检查点：关（每个 token 的激活 8 kB，可用 19.1 GB）"),
        ("rows: 40 (36 of them trained on, 4 used for selection); skipped: empty_field 1, wrong_type 2",
         "样本：40 行（其中 36 行参与过训练，4 行用于选择 checkpoint）；跳过：empty_field 1, wrong_type 2"),
        ("rows: 40, test (none seen in training)", "样本：40 行，测试集（训练时均未出现过）"),
        ("accuracy: worse than always answering 'a b' (0.500)", "准确率：比始终回答 'a b' 还低（0.500）"),
        ("1 row could not be predicted; its line holds an error", "1 行无法预测；输出中的对应行含 error"),
        ("... predicting 12 validation rows (15 s)", "…… 正在预测 12 行验证数据（已用 15 秒）"),
        ("r.jsonl:2: error: span_mismatch: entities[0]: text[0:2] is 'xy', not 'yz'; both offsets are 3 too small: the nearest 'yz' stands at 3:5",
         "r.jsonl:2：错误：span_mismatch：entities[0]：原文 text[0:2] 是 'xy'，而不是 'yz'；两个偏移都小了 3：最近的 'yz' 位于 3:5"),
        ("error: command line: training.epochs: Input should be greater than 0 (got -1); unknown key 'lora.rank'; did you mean 'lora.r'?",
         "错误：命令行：training.epochs：应大于 0（当前为 -1）；未知的配置项 'lora.rank'；是否想写 'lora.r'？"),
        ("a.yaml: training.epochs: Input should be a valid number, unable to parse string as a number (got 'x'); lora.r: Input should be greater than 0 (got 0); task: Input should be 'classification' or 'ner' (got 'c')",
         "a.yaml：training.epochs：应为数字（当前为 'x'）；lora.r：应大于 0（当前为 0）；task：应为 'classification' 或 'ner'（当前为 'c'）"),
        ("  ok  22.6 GiB of memory free", "  ok  可用内存 22.6 GiB"),
        ("note  ModelScope (modelscope.cn) cannot be reached: no answer in 3 s\n      its models need a local folder instead",
         "提示  无法访问 ModelScope（modelscope.cn）：3 秒内无响应\n      该平台的模型需改用本地目录"),
        ("a.csv:4: error: unparsable_line: the header names 2 columns, this row has 3; put a value that holds the separator into double quotes",
         "a.csv:4：错误：unparsable_line：表头有 2 列，该行有 3 列；含分隔符的值请加双引号"),
        ("n.json:1: error: missing_field: entities is missing; write [] for a text without entities",
         "n.json:1：错误：missing_field：entities 缺失；没有实体的文本请写 []"),
        ("e.jsonl:4: error: unparsable_line: not valid JSON: Expecting property name enclosed in double quotes (column 2)",
         "e.jsonl:4：错误：unparsable_line：不是合法的 JSON：键应写在双引号中（第 2 列）"),
        ("e.jsonl:1: error: no_rows: the file holds no rows", "e.jsonl:1：错误：no_rows：文件中没有数据"),
        ("e.jsonl:1: error: unknown_label: 'x' is not among the labels of out/zh; did you mean 'y'?",
         "e.jsonl:1：错误：unknown_label：'x' 不在 out/zh 的标签中；是否想写 'y'？"),
        ("a.yaml: task: Input should be 'classification' or 'ner' (got 'c'); unknown key 'q'; did you mean 'lora.r'?; lora.r: Input should be greater than 0 (got 0)",
         "a.yaml：task：应为 'classification' 或 'ner'（当前为 'c'）；未知的配置项 'q'；是否想写 'lora.r'？lora.r：应大于 0（当前为 0）"),
        ("accuracy: 0.100 -> 0.200, +0.100 (95 % interval -0.100 to +0.300, p = 0.2)",
         "准确率：0.100 -> 0.200，+0.100（95% 置信区间 -0.100 至 +0.300，p = 0.2）"),
        ("a.yaml: task: Input should be 'classification' or 'ner' (got 'c'); unknown key 'lora_rank'; did you mean 'lora.r'? lora_rank (LLaMA-Factory, ms-swift) is lora.r here: lora.r=3; unknown key 'flash_attn': flash_attn (LLaMA-Factory) needs no key here: the attention is picked by itself",
         "a.yaml：task：应为 'classification' 或 'ner'（当前为 'c'）；未知的配置项 'lora_rank'；是否想写 'lora.r'？lora_rank（LLaMA-Factory, ms-swift）在这里对应 lora.r：lora.r=3；未知的配置项 'flash_attn'：flash_attn（LLaMA-Factory）在这里无需配置：注意力实现自动选择"),
        ("error: the data holds 2 errors:\n  a:1: error: wrong_type: output must be a string, not int; integers are read as labels where all rows have them\n  a:2: error: empty_field: text is empty\n  ... and 7 more\nRepair them, or leave faulty rows out with data.on_error=skip; `labeltune data check` lists all of them",
         "错误：数据中有 2 处错误：\n  a:1：错误：wrong_type：output 应为字符串，而不是 int；仅当所有行都是整数时才按标签读取\n  a:2：错误：empty_field：text 为空\n  …… 另有 7 个\n请修正，或用 data.on_error=skip 跳过有问题的行；`labeltune data check` 可列出全部"),
        ("a:1: error: soft_label: output is no soft label: the shares sum to 0.9; they must sum to 1",
         "a:1：错误：soft_label：output 不是合法的软标签：各标签的比例之和为 0.9，应为 1"),
        ("error: training.class_weights names an unknown label: 'art' is not among the labels of the training rows; did you mean 'Art'?",
         "错误：training.class_weights 中有未知的标签：'art' 不在训练集的标签中；是否想写 'Art'？"),
        ("class weights: from 0.5 (Art a) to 1.25 (Farm)", "类别权重：0.5（Art a）至 1.25（Farm）"),
        ("done in 481 s (training 232 s, loading and checks 200 s): output/a/best -> checkpoint-7",
         "训练完成，用时 481 秒（训练 232 秒，加载和检查 200 秒）：output/a/best -> checkpoint-7"),
        ("  5.0 s  loading the run a b", "  5.0 s  loading the run a b"),
        ("loading the run a b", "正在加载 a b"),
        ("checking a: whether its first answer is that of plain computation", "正在核对 a：首次回答与逐条计算的结果是否一致"),
        ("the page is ready: http://127.0.0.1:1/", "试用页面已就绪：http://127.0.0.1:1/"),
        ("ready at http://127.0.0.1:1: documentation /docs; clients' base_url http://127.0.0.1:1/v1",
         "已就绪：http://127.0.0.1:1，文档 /docs；客户端的 base_url 为 http://127.0.0.1:1/v1"),
        ("serving a (ner, 4 labels)", "提供服务：a（ner，4 个标签）"),
        ("Serve with vLLM", "用 vLLM 部署"),
        ("note  ModelScope (modelscope.cn), Hugging Face (huggingface.co), SwanLab cannot be reached: no answer in 3 s, no connection",
         "提示  无法访问 ModelScope（modelscope.cn）、Hugging Face（huggingface.co）和 SwanLab：3 秒内无响应，连接失败"),
        ("Error: Invalid value for '--port': Input should be less than or equal to 65535", "错误：'--port' 的值无效：应小于或等于 65535"),
        ("Error: No such option: --nope (Possible options: --model)", "错误：没有选项 --nope（相近的选项：--model）"),
        ("stopped at step 7 of 40; checkpoint-7 is saved, go on with: labeltune train a.yaml --resume",
         "已在第 7/40 步停止；checkpoint-7 已保存，继续训练：labeltune train a.yaml --resume"),
        ("a:1: warning: label_twins: these differ only in case, width, blanks or characters that cannot be seen: 'Art' (57 rows, first in line 1), 'art' (1 row, first in line 158)",
         "a:1：警告：label_twins：以下标签只差大小写、全角/半角、空白或不可见字符：'Art'（57 行，首次出现在第 1 行）、'art'（1 行，首次出现在第 158 行）"),
        ("report: a.html: 93 pairs of near-duplicates, 1 row to look at for their label, 0.0% of the texts shortened, 1.14 times fewer tokens with a shared prefix",
         "报告：a.html：近似重复 93 对，标签待复核 1 行，0.0% 的文本被截短，共享前缀可把 token 计算量降到 1/1.14"),
        ("nd:1: error: span_mismatch: entities[0]: text[0:7] is 'x y ', not 'x y'; the two differ in blanks at their ends; without them it is 0:6",
         "nd:1：错误：span_mismatch：entities[0]：原文 text[0:7] 是 'x y '，而不是 'x y'；两者只差首尾空白；去掉后为 0:6"),
        ("parity in fp32: 4 of 4 rows are answered the same; largest shift of a probability 9e-08",
         "fp32 一致性：4 行中有 4 行回答相同；概率最大变化 9e-08"),
        # Quoted words are joined as lists are in Chinese, somebody's sentence is not.
        ("no columns 'text', 'output'; the file has 'a', 'b'; 'text' may also be called 'sentence', 'content'; 'output' may also be called 'label', '类'",
         "没有列 'text'、'output'（文件的列为 'a'、'b'）；列名 'sentence'、'content' 也会识别为 'text'；列名 'label'、'类' 也会识别为 'output'"),
        ("'a' and 'b' may both be meant, say which: add data.columns.text=a to the command, or rename that column to 'text'",
         "'a'、'b' 都有可能，需指明：请在命令后加上 data.columns.text=a，或把该列改名为 'text'"),
        ("data set 'x, y': no file a.jsonl in it", "数据集 'x, y' 中没有文件 a.jsonl"),
        ("a.csv:1: error: encoding: not valid UTF-8 at byte 0; set data.encoding=gb18030, or convert it with: iconv -f GB18030 -t UTF-8 d/a.csv > d/a.utf8.csv (or from whatever encoding it has); the rest was not read",
         "a.csv:1：错误：encoding：字节 0 处不是合法的 UTF-8；请设置 data.encoding=gb18030，或转换编码：iconv -f GB18030 -t UTF-8 d/a.csv > d/a.utf8.csv（编码名以文件实际为准）；其后内容未读取"),
        ("error: a.csv:1: not valid UTF-8 at byte 0; give --encoding gb18030, or convert it with: iconv -f GB18030 -t UTF-8 a.csv > a.utf8.csv (or from whatever encoding it has); the rest was not read",
         "错误：a.csv:1：字节 0 处不是合法的 UTF-8；请加上 --encoding gb18030，或转换编码：iconv -f GB18030 -t UTF-8 a.csv > a.utf8.csv（编码名以文件实际为准）；其后内容未读取"),
        ("Error: No such command 'trian'. Did you mean 'train'?", "错误：没有命令 'trian'，是否想写 'train'？"),
        ("3.5 rows/s", "3.5 行/秒"),
        ("report: a.html: 1 pair of near-duplicates, 0 rows to look at for their label; Training would stop with this error: x",
         "报告：a.html：近似重复 1 对，标签待复核 0 行；训练会因以下错误停止：x"),
        ("... predicting the rows (14 s)", "…… 正在预测（已用 14 秒）"),
        ("predictions: a.csv (12 rows, 1 error, 3 s)", "预测结果：a.csv（12 行，错误 1 个，用时 3 秒）"),
        ("exported the merged model to out", "合并后的模型已导出到 out"),
        ("baseline majority: accuracy 0.125", "基线（多数类）：准确率 0.125"),
        ("... converting Gemma 3 270M to safetensors, once; later runs take it from the cache (15 s)",
         "…… 正在把 Gemma 3 270M 转换为 safetensors（只需一次，以后直接读取缓存）（已用 15 秒）"),
        # A number is not any text.
        ("  many rows", "  many rows"),
        ("trial 2: macro_f1 0.5000 on validation (used for selection), 3 s; 2 of 4 done, the best is trial 1 with 0.7500, about 6 s left",
         "试验 2：验证集 macro_f1 0.5000，3 秒；已完成 2/4，目前最好的是试验 1（0.7500），约剩 6 秒"),
        # Values are nobody's messages: a folder named like a figure, labels, an unknown reason.
        ("exported the adapter to test", "适配器已导出到 test"),
        ("data set 'ms:a/b': no file majority in it", "数据集 'ms:a/b' 中没有文件 majority"),
        ("{\"text\": \"the same row stands again\"}", "{\"text\": \"the same row stands again\"}"),
        ("something else altogether", "something else altogether"),
        ("", ""),
    ],
)  # fmt: skip
def test_messages_in_chinese(english: str, translated: str) -> None:
    assert chinese(english) == translated


@pytest.mark.parametrize(
    ("environment", "spoken_there"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "en_US.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LANGUAGE": "zh_CN:en"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8", "LANGUAGE": "zh"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LABELTUNE_LANG": "en"}, "en"),
        ({"LC_ALL": "C", "LABELTUNE_LANG": "zh"}, "zh"),
    ],
)
def test_the_locale_decides(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], spoken_there: str
) -> None:
    for name in ("LABELTUNE_LANG", "LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert language() == spoken_there
    assert localize("the same row stands again") == (
        "同一行重复出现" if spoken_there == "zh" else "the same row stands again"
    )


def test_a_stream_speaks_and_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABELTUNE_LANG", "zh")
    kept = io.StringIO()
    monkeypatch.setattr(sys, "stderr", kept)
    with spoken("stderr"):
        print("warning: nothing known", "test", file=sys.stderr)
        print("writing the whole model in bf16", file=sys.stderr, flush=True)
        assert not sys.stderr.isatty()
    assert sys.stderr is kept
    assert kept.getvalue() == "警告：nothing known test\n正在以 bf16 写出完整模型\n"


def test_the_catalogue_is_read_in_chinese_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABELTUNE_LANG", "en")
    monkeypatch.setattr(messages, "templates", lambda: pytest.fail("the catalogue was read"))
    messages._catalogue.cache_clear()
    assert localize("the same row stands again") == "the same row stands again"


def test_the_command_line_speaks_chinese_and_its_json_does_not(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(in_folder / "rows.jsonl", [*classification_rows(6), {"text": "", "output": "Art"}])

    def labeltune(*arguments: str, lang: str = "zh") -> tuple[int, str, str]:
        monkeypatch.setenv("LABELTUNE_LANG", lang)
        return command(monkeypatch, capsys, *arguments)

    code, out, err = labeltune("data", "check", "rows.jsonl")
    assert (code, err) == (1, "")
    assert "rows.jsonl:7：错误：empty_field：text 为空\n" in out
    assert "\nrows.jsonl：共 7 行，可用 6 行，错误 1 个，警告 0 个\n" in out
    asked = ("data", "check", "rows.jsonl")
    assert "rows.jsonl:7: error: empty_field: text is empty\n" in labeltune(*asked, lang="en")[1]
    asked = (*asked, "--json")
    assert labeltune(*asked)[1] == labeltune(*asked, lang="en")[1] != ""
    code, out, err = labeltune("train", "nowhere.yaml")
    assert (code, out) == (2, "")
    assert err == "错误：配置文件 nowhere.yaml 不存在；`labeltune init classification` 可生成一个\n"
    code, out, err = labeltune("predict")
    assert (code, out) == (2, "") and err.startswith("用法：labeltune predict ")
    assert "\n查看帮助：labeltune predict --help\n" in err and err.endswith("\n错误：缺少参数 'run'\n")
    assert labeltune("predict", "run", "--top-k", "a")[2].endswith("\n错误：'--top-k' 的值无效：应为整数\n")
    assert labeltune("nonsense")[2].endswith("\n错误：没有命令 'nonsense'\n")
    assert labeltune("train", "--help")[1] == labeltune("train", "--help", lang="en")[1]
    assert "下一步：\n  cd new\n  labeltune data check ner.jsonl\n" in labeltune("init", "ner", "new")[1]
    assert "一切就绪" in labeltune("doctor", "--offline")[1]


def test_what_somebody_wrote_is_not_translated(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in ('{"text": "He came; the box is empty; she left"}', "labels 'a; text is empty' here"):
        assert chinese(line) == line
    rows = [*classification_rows(2), {"text": "a", "output": "item is missing"}]
    write_jsonl(in_folder / "rows.jsonl", rows)
    monkeypatch.setenv("LABELTUNE_LANG", "zh")
    assert "33.3%  item is missing\n" in command(monkeypatch, capsys, "data", "check", "rows.jsonl")[1]
