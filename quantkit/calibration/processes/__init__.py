"""The processes that share a run: who has which sequences, sums and tasks."""
