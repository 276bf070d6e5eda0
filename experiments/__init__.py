"""Programs that train and measure: each runs as ``python -m experiments.NAME``."""
