"""The original recipe's prediction: `python predict_qwen2.py [--text T] [--category A,B] [--checkpoint DIR]`.

Without arguments: the newest checkpoint in ./output/Qwen2 reads a built-in document on aerospace engineering.
"""

from labeltune.commands.original import predict_main

if __name__ == "__main__":
    predict_main()
