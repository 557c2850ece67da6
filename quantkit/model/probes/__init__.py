"""What is found out about a block by changing what its products put out."""
