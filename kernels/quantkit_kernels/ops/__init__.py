"""Ops: one file, one torch.library op."""
