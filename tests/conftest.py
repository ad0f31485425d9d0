"""Before anything is imported: Triton kernels run on CPU tensors, in Triton's interpreter."""

import os

os.environ["TRITON_INTERPRET"] = "1"
