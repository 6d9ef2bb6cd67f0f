"""Command-line entry points: training, evaluation, data preparation, export."""
