"""Ranges: one file = one way to choose scale and zero per group."""
