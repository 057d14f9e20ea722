"""The original recipe's entity extractor: `python train_qwen2_ner.py [--model M] [key=value ...]`.

Reads ccfbdci.jsonl in the working folder (fetch it with `labeltune data download ccfbdci`), holds 10 % of it out,
writes ./output/Qwen2-NER.
"""

from labeltune.commands.original import train_main

if __name__ == "__main__":
    train_main("ner")
