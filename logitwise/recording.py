"""Recording CUDA graphs that share no memory with one another and leave none behind."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def recording(device: torch.device) -> Iterator[None]:
    """Graphs are recorded in this context, on a GPU; the current stream is put back after it, after a failure too.

    cuBLAS keeps a workspace (64 MiB on an H100) for each stream that it has met, and each recording warms up on another
    one. Workspaces are dropped before, so that the graph's lies in its own memory and no other graph's, and after, so
    that what is left of the warming up is free again (pytorch/pytorch issues 99196 and 193402).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
