"""A budget of bits instead of a scheme: which weights get how many (docs/methods/budget.md)."""
