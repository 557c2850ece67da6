"""What is calibrated on: documents, conversations with images, windows of tokens."""
