"""What test_reliability.py runs on two processes, OUT: each writes what it is told before and after one bit changed."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from latent_ae.config import UserError
from latent_ae_train.agreement import stop_on_drift

accelerator, answers = Accelerator(cpu=True), []
torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
for change in (False, True):
    if change and accelerator.process_index == 1:
        network[1].weight.data[2, 3] += 1e-7
    try:
        stop_on_drift(accelerator, 50, [network])
        answers.append("equal")
    except UserError as error:
        answers.append(str(error))
Path(f"{sys.argv[1]}.rank{accelerator.process_index}").write_text("\n".join(answers))
torch.distributed.destroy_process_group()
