"""Fully sharded data parallelism (FSDP2) for a method's networks."""

from typing import Any

from torch import nn

from zoo.core.teachers import Frozen


def shard(method: nn.Module, mesh: Any) -> None:
    """Shard every network of ``method`` over the data-parallel dimension of ``mesh``.

    A frozen network is sharded as a whole and always put back after its forward: left gathered, the average would mix
    sharded and whole tensors.

    Args:
        method: whose direct children are sharded, each on its own.
        mesh: the device mesh of Lightning's ``ModelParallelStrategy``.
    """
    from torch.distributed.fsdp import fully_shard

    data_parallel = mesh["data_parallel"]
    for child in method.children():
        if any(True for _ in child.parameters()):
            if isinstance(child, Frozen):
                fully_shard(child, mesh=data_parallel, reshard_after_forward=True)
            else:
                fully_shard(child, mesh=data_parallel)
