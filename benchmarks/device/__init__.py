"""The parts of gpu.py: the method on a device beside the CPU, and a model of 8 billion weights."""
