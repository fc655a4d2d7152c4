"""What test_eval_recon.py runs on two processes, MODEL INCEPTION DINOV2 DATA OUT [DATA OUT ...]; each rank writes."""

import json
import sys
from pathlib import Path

from accelerate import PartialState

from latent_ae.config import UserError
from latent_ae_eval.recon.measure import evaluate_reconstruction
from latent_ae_eval.recon.settings import ReconSettings

model, inception, dinov2, *words = sys.argv[1:]
sizes = {"resize_px": None, "crop_px": 32, "batch_size": 2, "num_workers": 0, "limit": 4, "max_bad_fraction": 1.0}
features = {"frechet": ("inception", "dinov2"), "precision_recall": ("dinov2",), "dinov2_model": dinov2}
settings = ReconSettings(lpips=(), inception_weights=inception, **features, **sizes)
for data, out in zip(words[::2], words[1::2], strict=True):
    try:
        result = evaluate_reconstruction(model, data, settings, out=out)
    except UserError as error:
        result = {"error": str(error)}
    Path(f"{out}.rank{PartialState().process_index}.json").write_text(json.dumps(result))
PartialState().destroy_process_group()
