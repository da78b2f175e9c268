"""Without a GPU, Triton kernels run in Triton's interpreter; it must be told before the import."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
try:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
except ImportError:
    pass
