"""Models that give a text a vector or a pair of texts a score, measured against their original."""
