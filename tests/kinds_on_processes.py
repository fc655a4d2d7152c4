"""Trains one run after the other, each given by its command line; run by test_family.py on two processes.

The argument is a JSON list of lists of words. Runs end after their last checkpoint.
"""

import json
import sys

import torch
from accelerate import Accelerator

from latent_ae.__main__ import _leave_the_others, main
from latent_ae_train import loop

if __name__ == "__main__":
    torch.set_num_threads(1)
    loop.finish_run = lambda *_: {}
    Accelerator.end_training = lambda _: None  # it would end the group that the next run needs
    codes = [main(words) for words in json.loads(sys.argv[1])]
    _leave_the_others()
    sys.exit(max(codes))
