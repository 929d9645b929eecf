"""The method, in plain PyTorch: score blocks, search what to remove, repair what is left, write checkpoints."""
