"""What test_eval_latents.py runs on two processes: MODEL DATA OUT. Each rank writes its own result."""

import json
import sys
from pathlib import Path

from accelerate import PartialState

from latent_ae_eval.latents.measure import evaluate_latents
from tests.eval.latents_small import SETTINGS

model, data, out = sys.argv[1:]
result = evaluate_latents(model, data, SETTINGS, out=out)
Path(f"{out}.rank{PartialState().process_index}.json").write_text(json.dumps(result))
PartialState().destroy_process_group()
