"""For all tests."""

import torch

# The models are tiny: a second thread gains nothing, and on a busy machine the first would spend its time waiting for it.
torch.set_num_threads(1)
