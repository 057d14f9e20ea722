"""From texts to predictions: the predictor and how it scores, extracts and generates; then whole files, shards and Ray."""
