"""Whether all processes still hold the same weights."""

import torch
from accelerate import Accelerator
from torch import nn

from latent_ae.config import UserError


def stop_on_drift(accelerator: Accelerator, done: int, networks: list[nn.Module]) -> None:
    """Compares a checksum of the weights' bits over processes. Every process calls this, and all raise UserError.

    Equal gradients give equal weights, so a difference means a process that missed an update or a device that
    computes wrongly: from then on the processes would train different models and average their gradients.
    """
    if accelerator.num_processes == 1:
        return
    parameters = [parameter.detach() for network in networks for parameter in network.parameters()]
    sums = torch.stack([weight.contiguous().view(torch.int32).sum(dtype=torch.int64) for weight in parameters])
    # weighted, or two weights that changed places would pass
    checksum = (sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum()
    everywhere = accelerator.gather(checksum[None]).tolist()
    others = [rank for rank, value in enumerate(everywhere) if value != everywhere[0]]
    if others:
        raise UserError(
            f"after step {done:,} the weights of process {', '.join(map(str, others))} differ from those of process 0: "
            "an update was missed, or a device computes wrongly. Check the machines; the last checkpoint was written "
            "by process 0, compare its validation with the ones before"
        )
