"""Rotations: one file per part."""
