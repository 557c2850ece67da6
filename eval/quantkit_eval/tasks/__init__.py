"""Tasks: multiple choice, lm-evaluation-harness, completions."""
