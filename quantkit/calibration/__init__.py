"""Calibration: text, tokens, hidden states, statistics of a block."""
