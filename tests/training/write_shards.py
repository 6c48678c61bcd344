"""Writes a checkpoint's content again as Lightning's FSDP strategy does: each process its part of every weight.

torchrun ... write_shards.py CHECKPOINT FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def main() -> None:
    """Of each of several processes."""
    source, folder = sys.argv[1:]
    content = torch.load(source, weights_only=True)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weights = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in content.pop("state_dict").items() if t.ndim}
    (optimizer,) = content.pop("optimizer_states")
    checkpoint.save({"model": weights, "optimizer_0": optimizer}, checkpoint_id=folder)
    if dist.get_rank() == 0:
        torch.save(content, Path(folder) / "meta.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
