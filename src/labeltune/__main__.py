"""`python -m labeltune ...`, also for `accelerate launch -m labeltune train ...`."""

from labeltune.commands.main import run

if __name__ == "__main__":
    run()
