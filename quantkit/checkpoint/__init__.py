"""Checkpoints: tensors by name in ranges, shards out, durable output."""
