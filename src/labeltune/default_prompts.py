"""Prompts that a config does not name: Chinese as in the original recipe, and English ones for English rows."""

from __future__ import annotations

CLASSIFICATION_SYSTEM = (
    "你是一个文本分类领域的专家，你会接收到一段文本和几个潜在的分类选项，请输出文本内容的正确类型"
)
CLASSIFICATION_USER = "文本:{text},类型选型:{category}"
NER_SYSTEM = (
    "你是命名实体识别方面的专家。请找出用户所给文本中的全部实体，实体类型只有：{labels}。"
    '每个实体单独占一行，写成一个合法的JSON对象，形如 {"entity_text": "实体原文", "entity_label": "实体类型"}，'
    "按照在文本中出现的先后顺序输出。如果文本中一个实体也没有，只输出“{no_entities}”。"
)
NER_MARKS_SYSTEM = (
    "你是命名实体识别方面的专家。请找出用户所给文本中的全部实体，实体类型只有：{labels}。"
    "原样重复整段文本，并标出其中的每个实体，形如 [实体原文|实体类型]；"
    "文本自身的 [ ] | \\ 前面加上反斜杠。如果文本中一个实体也没有，只输出“{no_entities}”。"
)
NER_USER = "文本:{text}"
#: For English rows; `prompt` of a config has to name them, as the original recipe's are the default. A prompt without instructions and
#: candidates is as good once the model is trained, and shorter (docs/accuracy.md); `candidates` is for rows that have candidates of their own and
#: for labels with descriptions, `labels_first` for that layout, which moves all that stands behind the text.
ENGLISH_PROMPTS: dict[str, dict[str, str]] = {
    "classification": {"system": "", "user": "Text: {text}\nLabel:"},
    "candidates": {"system": "", "user": "Labels: {category}\nText: {text}\nLabel:"},
    "labels_first": {"system": "", "user": "Labels: {category}\n{text}"},
    "multilabel": {
        "system": "Say of every label whether it applies to the text: write the label and {positive} or {negative}.",
        "user": "{text}",
        "positive": ": yes",
        "negative": ": no",
    },
    "ner": {
        "system": (
            "Extract all named entities of the types {labels}. Write one JSON object a line: "
            '{"entity_text": ..., "entity_label": ...}. If there is none, write: {no_entities}'
        ),
        "user": "{text}",
        "no_entities": "none",
    },
    "ner_marks": {
        "system": (
            "Mark all named entities of the types {labels}. Repeat the text as it is, each entity written as "
            "[entity|type]; put a backslash before [ ] | \\ of the text. If there is none, write: {no_entities}"
        ),
        "user": "{text}",
        "no_entities": "none",
    },
}
#: The same for Chinese rows.
CHINESE_PROMPTS: dict[str, dict[str, str]] = {
    "classification": {"system": "", "user": "文本：{text}\n类别："},
    "candidates": {"system": "", "user": "候选类别：{category}\n文本：{text}\n类别："},
}
MULTILABEL_PROMPT = {
    "system": "你是文本分类领域的专家。一段文本可以同时属于多个类别，也可以不属于任何类别。对每个类别，文本属于它就写“{positive}”，不属于就写“{negative}”。",
    "user": "文本:{text}",
    "positive": "：是",
    "negative": "：否",
}
#: The original's, and what is like it, by task; those of classification are the defaults of `prompt` itself.
PROMPTS: dict[str, dict[str, str]] = {
    "multilabel": MULTILABEL_PROMPT,
    "ner": {"system": NER_SYSTEM, "user": NER_USER},
    "ner_marks": {"system": NER_MARKS_SYSTEM, "user": NER_USER},
}
NER_LABELS = ("地点", "人名", "地理实体", "组织")
