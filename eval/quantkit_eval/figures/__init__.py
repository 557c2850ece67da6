"""Figures: what is measured, and how sure it is."""
