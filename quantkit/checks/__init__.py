"""Checks: is it whole, is it right, what is in it."""
