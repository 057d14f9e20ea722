"""Keeps other libraries' chatter off the terminal; their errors still come through."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Call before a command imports transformers or datasets; imports neither."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("MODELSCOPE_LOG_LEVEL", "40")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
