"""What test_validate.py runs on one or two processes, DATA OUT: each rank writes the summary of its validation."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from latent_ae.data.images import bicubic_down_up
from latent_ae.data.loader import open_images
from latent_ae.pretrained.lpips import LPIPS
from latent_ae_train.settings import TrainSettings
from latent_ae_train.validate import Validator

data, out = sys.argv[1:]
torch.set_num_threads(1)
values = {"source": data, "eval_source": data, "resolution": 32, "num_workers": 0}
settings = TrainSettings.model_validate({"data": values, "gan": {"weight": 0.0}, "validate": {"images": 51}})
accelerator = Accelerator(cpu=True)
validator = Validator(settings, accelerator, open_images(settings.data, "held_out"), 3, 4, LPIPS("vgg"))
summary = validator.measure(lambda images, _: bicubic_down_up(images, 4), Path(f"{out}.png"))
Path(f"{out}.rank{accelerator.process_index}.json").write_text(json.dumps(summary))
accelerator.end_training()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
