"""Refinements: one file = one way to move the weights of a block for the sake of its outputs."""
