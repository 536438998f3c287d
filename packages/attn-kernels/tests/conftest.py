"""Lets Triton's interpreter run the kernels on CPU tensors, unless a run on a GPU asks for ``TRITON_INTERPRET=0``."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
