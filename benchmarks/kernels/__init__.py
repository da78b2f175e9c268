"""Kernels beside the floor of the card and beside others' kernels."""
