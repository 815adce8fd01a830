"""Importing this lets Triton's interpreter run kernels where there is no GPU; Triton looks when it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
