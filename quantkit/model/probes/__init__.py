"""What is found out about blocks by running them: on noise with changed outputs, or as they are."""
