"""Roundings: one file = one way to choose codes for given scales."""
