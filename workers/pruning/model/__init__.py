"""The model as the method sees it: its blocks, plans of what they give up, and checkpoints of what is left."""
