"""What runs on GPUs, in Triton."""
