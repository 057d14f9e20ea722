"""What a file is, by its name and by how it begins; why it cannot be read is one reason for the whole file, with the fix."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import shlex
import zlib
from dataclasses import dataclass, replace
from typing import IO, Any, BinaryIO, Literal, cast

_TEXT = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (*_TEXT, ".parquet", ".xlsx", *(f"{suffix}.gz" for suffix in _TEXT))
#: Files of annotation tools that hold no rows: words with tags, spaCy's DocBin, brat's two files.
TAGGED = (".txt", ".conll", ".bio", ".bioes", ".bmes", ".iob", ".iob2")
TOOLS = (*TAGGED, ".spacy", ".ann")
#: Bytes that are looked at.
_HEAD = 1 << 16
#: Keys under which one JSON object holds all rows of a file.
ROW_LISTS = frozenset(
    [
        "data",
        "dataset",
        "rows",
        "records",
        "examples",
        "samples",
        "instances",
        "items",
        "train",
        "training",
        "validation",
        "valid",
        "dev",
        "test",
    ]
)
#: Other names of a column, where it has its default name and the file does not.
ALIASES = {
    "text": ("text", "sentence", "content", "文本", "内容", "正文", "input"),
    "output": ("output", "label", "标签", "类别", "类", "标注"),
    "labels": ("labels", "label", "output", "tags", "intents", "topics", "标签", "类别"),
    "entities": ("entities",),
}
#: The names that the README gives: nobody has to be told how they are read.
WELL_KNOWN = ("label", "标签", "文本")
#: Where rows of instruction, input and output have no input, their text is the instruction.
INSTRUCTION = "instruction"
#: An object with a string under one of these names is a row, whatever lists it has.
_ROW_COLUMNS = frozenset([*ALIASES["text"], INSTRUCTION, *ALIASES["output"]])
#: Lists of turns of a conversation, which is a row.
_TURNS = frozenset(["messages", "conversations"])
_SEPARATORS = {",": "','", "\t": "a tab", ";": "';'", "|": "'|'", "，": "'，'"}
#: How files begin that are something else: (bytes, what it is, what to do about it).
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"\xd0\xcf\x11\xe0", "an old Excel or Office file", "save it as .xlsx or .csv"),
    (b"BZh", "compressed by bzip2", "unpack it with: bunzip2"),
    (b"\xfd7zXZ\0", "compressed by xz", "unpack it with: unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with: unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!", "a rar archive", "unpack it"),
    (b"%PDF", "a PDF", "its text has to be taken out first"),
    (b"SQLite format 3\0", "an SQLite database", "write its rows to .csv or .jsonl"),
    (b"ARROW1", "an Arrow file", "write its rows to .parquet"),
    (b"\x93NUMPY", "a numpy file", "write its rows to .csv or .jsonl"),
    (b"version https://git-lfs.", "a Git LFS pointer, not the data", "fetch the data with: git lfs pull"),
)
#: Byte order marks of UTF-16.
_MARKS = (b"\xff\xfe", b"\xfe\xff")
_HTML = re.compile(rb"\s*<(!doctype html|html|head|body)[\s>]", re.IGNORECASE)
#: One JSON object that begins with its list of rows.
_ROW_LIST = re.compile(r'\{\s*"(' + "|".join(sorted(ROW_LISTS)) + r')"\s*:\s*\[\s*\{')

Kind = Literal["lines", "json", "table", "parquet", "sheet", "tagged", "docbin"]


@dataclass(frozen=True)
class Format:
    """How a file is read.

    Attributes:
        kind: `lines` of JSON; `json`, values that go over lines; `table`, lines of cells; `parquet`; `sheet`, an Excel file; `tagged`,
            lines of words with tags; `docbin`, spaCy's.
        delimiter: what separates the cells of a table.
        encoding: of its text, by Python's name.
        problem: why it cannot be read at all, with the fix.
        tool: the reader of `data.formats` that makes rows of what it holds; empty where it holds rows.
    """

    kind: Kind
    gzip: bool = False
    delimiter: str = ","
    encoding: str = "utf-8"
    problem: str = ""
    tool: str = ""

    @property
    def plain(self) -> bool:
        """Whether any line of the file can be found and read by itself."""
        return (
            self.kind == "lines" and not (self.gzip or self.problem or self.tool) and self.encoding == "utf-8"
        )

    @property
    def readable_parquet(self) -> bool:
        """Whether it is parquet, whose rows are found by its metadata."""
        return self.kind == "parquet" and not (self.problem or self.tool)


def is_data_file(name: str) -> bool:
    """Whether a file is one of data, by the end of its name."""
    return name.lower().endswith(SUFFIXES)


def find_format(name: str, file: BinaryIO, encoding: str = "utf-8") -> Format:
    """Look at the beginning of an open file; it is positioned at its beginning again.

    Args:
        name: ends in one of `SUFFIXES`.
        encoding: of its text, where it is a text file.
    """
    suffix = name.lower()
    zipped = suffix.endswith(".gz")
    suffix = suffix.removesuffix(".gz")
    kinds: dict[str, Kind] = {
        ".csv": "table",
        ".tsv": "table",
        ".parquet": "parquet",
        ".xlsx": "sheet",
        ".spacy": "docbin",
    }
    kinds |= dict.fromkeys(TAGGED, "tagged")
    end = next((end for end in kinds if suffix.endswith(end)), ".jsonl")
    found = Format(
        kinds.get(end, "lines"), zipped, "\t" if end == ".tsv" else ",", codecs.lookup(encoding).name
    )
    if found.encoding == "utf-8-sig":
        found = replace(found, encoding="utf-8")
    file.seek(0)
    head = file.read(_HEAD)
    file.seek(0)
    if head and zipped:
        if not head.startswith(b"\x1f\x8b"):
            return replace(
                found, problem=f"it is not gzip-compressed; rename it to {_base(name).removesuffix('.gz')}"
            )
        head = _unpacked(file)
        file.seek(0)
    problem = _something_else(name, found, head, file)
    if problem or found.kind in ("parquet", "sheet", "docbin"):
        return replace(found, problem=problem)
    if head.startswith(_MARKS) and found.encoding == "utf-8":
        return found  # UTF-16 is named where its first line is decoded
    try:
        text = codecs.getincrementaldecoder(encoding)("replace").decode(head).removeprefix("\ufeff")
    except UnicodeError:  # UTF-16 and UTF-32
        ends = f"{found.encoding}-le or {found.encoding}-be, or the encoding that the file has"
        return replace(
            found, problem=f"it has no byte order mark, as {found.encoding} needs; set data.encoding={ends}"
        )
    if "\n" not in text and "\r" in text.strip() and len(head) < _HEAD:
        if found.kind == "lines" and is_whole_json(name, text):
            return replace(found, kind="json")
        return replace(
            found, problem="its lines end in CR alone, as on old Macs; save it with line ends LF or CRLF"
        )
    if found.kind == "tagged":
        return found
    if found.kind == "table":
        return replace(found, problem=_table_problem(name, text, found.delimiter))
    if is_whole_json(name, text):
        return replace(found, kind="json")
    return replace(found, problem=_lines_problem(name, text))


def opened(file: BinaryIO, form: Format) -> IO[bytes]:
    """The text of a file as UTF-8: unpacked, and from its encoding. What cannot be decoded is the byte 0xff."""
    unpacked = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if form.gzip else file
    return unpacked if form.encoding == "utf-8" else io.BufferedReader(_Recoded(unpacked, form.encoding))


#: What reading gzip data that is cut or damaged raises.
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


class _Recoded(io.RawIOBase):
    """A file in any encoding, as UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        codecs.register_error("labeltune-mark", _marked)
        self._decoder = codecs.getincrementaldecoder(encoding)("labeltune-mark")
        # What is there, and no more: standard input may go on for hours.
        self._read = getattr(file, "read1", file.read)
        self._left = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._left and not self._ended:
            raw = self._read(1 << 16)
            self._ended = not raw
            self._left = self._decoder.decode(raw, self._ended).encode("utf-8", "labeltune-mark")
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def _marked(error: UnicodeError) -> tuple[str | bytes, int]:
    """The byte 0xff for what cannot be decoded, and for half a surrogate pair, which UTF-7 can say and UTF-8 cannot."""
    assert isinstance(error, UnicodeDecodeError | UnicodeEncodeError)
    return "\udcff" if isinstance(error, UnicodeDecodeError) else b"\xff", error.end


def iconv(name: str, encoding: str, wanted: str = "UTF-8") -> str:
    """The command that writes a file in another encoding beside it.

    >>> iconv("my data/a.csv", "gb18030")
    "iconv -f GB18030 -t UTF-8 'my data/a.csv' > 'my data/a.utf8.csv'"
    """
    end = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    suffix = name[len(name) - len(end) :]
    new = f"{name[: len(name) - len(end)]}.{wanted.lower().replace('-', '')}{suffix}"
    return f"iconv -f {encoding.upper()} -t {wanted.upper()} {shlex.quote(name)} > {shlex.quote(new)}"


def _base(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def _unpacked(file: BinaryIO) -> bytes:
    """How gzip data begins, as far as it can be read."""
    head = b""
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            while len(head) < _HEAD and (more := unpacked.read1(1 << 13)):
                head += more
    except DAMAGED:
        pass  # reading the rows says where
    return head


def _something_else(name: str, found: Format, head: bytes, file: BinaryIO) -> str:
    """Why a file is not what its name says."""
    base, kind = _base(name), found.kind
    stem = base.rpartition(".")[0] if not found.gzip else base
    if head.startswith(b"\x1f\x8b"):
        if kind in ("parquet", "sheet", "docbin"):
            return "it is gzip-compressed; unpack it with: gunzip"
        return f"it is gzip-compressed; rename it to {base}.gz"
    if head.startswith(b"PK\x03\x04") and kind != "sheet":
        if b"xl/" in head or b"[Content_Types].xml" in head:
            return f"it is an Excel file; rename it to {stem}.xlsx"
        return "it is a zip archive; unpack it and give the file inside"
    if head.startswith(b"PAR1") and kind != "parquet":
        return f"it is a parquet file; rename it to {stem}.parquet"
    for begins, what, fix in _OTHERS:
        if head.startswith(begins):
            return f"it is {what}; {fix}"
    if _HTML.match(head):
        return "it is a web page; perhaps a download needed a login"
    if kind == "sheet" and not head.startswith(b"PK\x03\x04"):
        return f"it is no Excel file{'' if head else ', it is empty'}; save it again as .xlsx, or as .csv"
    if kind in ("lines", "table") and found.encoding == "utf-8" and not head.startswith(_MARKS):
        begins = head[:400]
        for encoding, nuls in (("utf-16-le", begins[1::2]), ("utf-16-be", begins[::2])):
            if len(begins) >= 8 and nuls.count(0) > 0.6 * len(nuls) and begins.count(0) < 0.7 * len(begins):
                return (
                    f"it seems to be UTF-16 without a byte order mark; set data.encoding={encoding}, "
                    f"or convert it with: {iconv(name, encoding)}"
                )
    return ""


def _table_problem(name: str, text: str, delimiter: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    if lines[0].lstrip().startswith(("{", "[")):
        return f"its lines look like JSON; rename it to {_renamed(name, '.jsonl')}"
    announced = re.fullmatch(r"\"?sep=(.)\"?", lines[0].strip(" \r\n,;")) or re.fullmatch(
        r"sep=(.)", lines[0].strip("\r\n")
    )
    outside = re.sub(r'"(?:[^"]|"")*"', "", lines[0])
    other = announced[1] if announced else max((s for s in _SEPARATORS if s != delimiter), key=outside.count)
    if other == delimiter or other not in _SEPARATORS:
        return ""
    if not announced and outside.count(other) <= outside.count(delimiter):
        return ""
    if delimiter == "\t" or other == "\t":
        fix = f"rename it to {_renamed(name, '.csv' if other == ',' else '.tsv')}"
        if other not in ",\t":
            fix = "save it with tabs, or with commas as .csv"
    else:
        fix = "save it with commas (in Excel: CSV UTF-8 with a list separator of ','), or as .xlsx"
    return f"its columns seem to be separated by {_SEPARATORS[other]}, not by {_SEPARATORS[delimiter]}; {fix}"


def _renamed(name: str, suffix: str) -> str:
    base = _base(name)
    end = ".gz" if base.lower().endswith(".gz") else ""
    return re.sub(r"\.[^.]+$", "", base[: len(base) - len(end)]) + suffix + end


def _lines_problem(name: str, text: str) -> str:
    lines = [line.strip() for line in text.splitlines()[:20] if line.strip()]
    if len(lines) < 2 or any(line.startswith(("{", "[")) for line in lines):
        return ""
    separator = max(_SEPARATORS, key=lines[0].count)
    if not all(separator in line for line in lines[:3]):
        return ""
    return (
        f"its lines are no JSON objects, they look like cells separated by {_SEPARATORS[separator]}; "
        f"rename it to {_renamed(name, '.tsv' if separator == chr(9) else '.csv')}"
    )


def is_whole_json(name: str, text: str) -> bool:
    """Whether a file holds a JSON array, one object with a list of rows, or objects that go over several lines."""
    text = text.lstrip()
    if text.startswith("["):
        if name.lower().removesuffix(".gz").endswith(".json"):
            return True
        # In .jsonl a list is a line that is wrong; a list of objects is the file.
        return re.match(r"\[\s*(\{|\]\s*$|$)", text) is not None
    if not text.startswith("{"):
        return False
    first, _, rest = text.partition("\n")
    try:
        # An object with another one below it is a line of JSONL, also where it has a list that could be one of rows.
        return bool(row_lists(json.loads(first))) and not rest.lstrip().startswith("{")
    except (ValueError, RecursionError):
        pass
    if _ROW_LIST.match(text):
        return True
    # A line that is torn is a fault of its own; one that goes on below is not.
    end, begin = first.rstrip()[-2:], rest.lstrip()[:1]
    return (
        (end.endswith("{") and begin in ('"', "}"))
        or (end.endswith("[") and begin in ("{", '"', "]", "["))
        or (end == "}," and begin == "{")
        or (end.endswith(",") and begin == '"')
    )


def is_row(values: dict[str, Any]) -> bool:
    """Whether an object has a text or a label of its own, and so is no mere holder of rows."""
    return any(isinstance(v, str) and key.strip().casefold() in _ROW_COLUMNS for key, v in values.items())


def row_lists(value: object) -> list[str]:
    """Names of the lists of rows that one JSON object holds; none where it is a row itself."""
    if not isinstance(value, dict) or is_row(value):
        return []
    lists = [
        key
        for key, rows in value.items()
        if key not in _TURNS
        and isinstance(rows, list)
        and rows
        and all(isinstance(row, dict) for row in rows)
    ]
    return lists if len(value) == 1 else [key for key in lists if key.lower() in ROW_LISTS]
