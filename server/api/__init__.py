"""The API process: event loop, tokenising, detokenising, metrics."""
