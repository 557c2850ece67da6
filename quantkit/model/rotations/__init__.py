"""Models in a rotated basis, where their weights can make up for it."""
