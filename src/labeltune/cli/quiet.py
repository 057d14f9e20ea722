"""Keeps other libraries' chatter off the terminal; their errors still come through."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Call before a command imports transformers or datasets."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
