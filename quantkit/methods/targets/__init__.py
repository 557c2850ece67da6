"""Targets: one file = one way to say what a weight's codes are to reproduce."""
