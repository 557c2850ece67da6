"""Methods: from weights and statistics to numbers."""
