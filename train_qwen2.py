"""The original recipe's classifier: `python train_qwen2.py [--model M] [key=value ...]`.

Reads train.jsonl in the working folder (fetch it with `labeltune data download fudan`), writes ./output/Qwen2.
"""

from labeltune.commands.original import train_main

if __name__ == "__main__":
    train_main("classification")
