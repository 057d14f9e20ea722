"""A run as others load it: merged or as an adapter, for transformers, vLLM, Ollama and ONNX, with a card and a parity gate."""
