"""What may go: scores, the losses of sets of blocks, and the search among them."""
