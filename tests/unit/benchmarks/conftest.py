from __future__ import annotations

import torch

# The tensors are tiny: one thread is as fast, and does not spin while other processes want the cores.
torch.set_num_threads(1)
