"""The original recipe's data sets, by the names its scripts expect."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from labeltune.config import HubConfig
from labeltune.data.sources import download_dataset
from labeltune.errors import DataError, HubError, OutputError
from labeltune.io.outputs import check_folder

#: name -> (hub, repository, {file name in the repository: file name the scripts expect})
ORIGINALS = {
    "fudan": ("ms", "swift/zh_cls_fudan-news", {"train.jsonl": "train.jsonl", "test.jsonl": "test.jsonl"}),
    "ccfbdci": ("hf", "qgyd2021/chinese_ner_sft", {"ccfbdci.jsonl": "ccfbdci.jsonl"}),
}


def download_original(name: str, folder: Path, hub: HubConfig | None = None) -> list[Path]:
    """Fetch one of `ORIGINALS` into a folder; existing files are left alone.

    Raises:
        DataError: the name is unknown.
        HubError: the hub cannot be reached, or the repository has changed.
        OutputError: the folder cannot be written.
    """
    if name not in ORIGINALS:
        raise DataError(f"unknown data set {name!r}; there are: {', '.join(ORIGINALS)}")
    hub_name, repo, files = ORIGINALS[name]
    targets = [folder / target for target in files.values()]
    check_folder(folder, [], files.values())
    if all(target.exists() for target in targets):
        return targets
    with tempfile.TemporaryDirectory() as temporary:
        fetched = download_dataset(
            hub_name,
            repo,
            hub or HubConfig(),
            local_dir=temporary,
            files=[f"*{f}" for f in files],
            instead=f"put them here: {', '.join(map(str, targets))}",
        )
        for source_name, target_name in files.items():
            if (folder / target_name).exists():
                continue
            found = sorted(fetched.rglob(source_name), key=lambda path: len(path.parts))
            if not found:
                raise HubError(
                    f"{repo} holds no {source_name} any more; look at the repository and fetch the file by hand"
                )
            try:
                folder.mkdir(parents=True, exist_ok=True)
                partial = folder / f".{target_name}.part"
                shutil.copyfile(found[0], partial)
                partial.replace(folder / target_name)
            except OSError as error:
                raise OutputError(f"{folder / target_name} cannot be written: {error}") from error
    return targets
