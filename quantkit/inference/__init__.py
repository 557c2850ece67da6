"""Inference: what a checkpoint runs on."""
