"""Run by test_stream.py: predicts a file in child processes that are killed at random moments, resuming each time.

python kill_predict.py RUN INPUT OUTPUT KILLS
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from labeltune import load_predictor
from labeltune.inference import files

run, source, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
files.CHUNK_ROWS = 8
part = output.with_name(f".{output.name}.part")
predictor = load_predictor(run)
generator = random.Random(0)
begun = time.monotonic()
files.predict_file(predictor, source, output.with_suffix(".whole"))
seconds = time.monotonic() - begun
whole = output.with_suffix(".whole").read_bytes()
killed, wanted = 0, int(sys.argv[4])
while killed < wanted:
    output.unlink(missing_ok=True)
    while not output.exists():
        child = os.fork()
        if child == 0:
            files.predict_file(predictor, source, output, resume=part.with_suffix(".part.json").exists())
            os._exit(0)
        if killed < wanted:
            time.sleep(generator.uniform(0.0, seconds / 8))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
    assert output.read_bytes() == whole
print(killed)
