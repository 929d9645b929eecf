"""How a job's checkpoints are served, as data: what they say of themselves, the commands that serve them, manifests.

Nothing here starts, reads or asks anything; `pdtrim.command.serve` and the gateway do.
"""
