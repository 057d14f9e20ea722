"""Models and tokenizers: finding, loading, adapting."""
