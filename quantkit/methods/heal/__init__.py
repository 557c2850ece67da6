"""Healing: one file = one way to train what is quantized on the whole model's outputs."""
