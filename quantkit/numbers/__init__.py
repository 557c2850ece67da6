"""Numbers: what a quantized number is, in torch alone."""
