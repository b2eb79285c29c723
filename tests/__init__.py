import os

import torch

# Triton reads it when it is first imported: without a GPU its interpreter runs the portable kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
