"""What the block loop needs beside the loop: what to gather, and healing."""
