"""What stands beside the stack of blocks: towers for images and sound, and their projectors."""
