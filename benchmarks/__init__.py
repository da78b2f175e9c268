"""What the README's numbers come from: each file is run as `python -m benchmarks.NAME`."""
