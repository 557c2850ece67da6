"""Transforms: one file = one way to rewrite a block into an equivalent one."""
