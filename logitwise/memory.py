"""How much memory a device has left."""

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Bytes that a device could still give; of a GPU, what torch keeps for later is given back first."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free
