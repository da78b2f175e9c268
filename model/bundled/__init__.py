"""The model "recall": its facts, its training, its evaluation and its checkpoint."""
