"""Decoders trained by flow matching beside others, on the same encoder, with what each cost.

    python -m benchmarks.flow_decoder --data TRAIN_FOLDER --held-out TEST_FOLDER --scratch FOLDER

The first stage is the recipe `quickstart` with factor 8 and 4 latent channels, so that a decoder has much to invent.
The contestants differ in more than one respect, so no single pair of rows says what flow matching brings:

* What they begin with. "plain, trained on", with and without a GAN, goes on with the first stage's decoder; flows of
  residuals and the regression of residuals add a network to it and leave it as it is; "plain, of equal size" and "flow
  of pixels" begin at random weights. `started_from_seconds` are those of the whole training of the first stage (its
  encoder, which all use, learned in them, too) for those that use its decoder, and 0 for the others.
* Size. The decoders of "plain, of equal size", "flow of pixels" and those of residuals have about the same number of
  parameters in all (to 5 %), "plain, trained on" about half of it, and of those of residuals less than half trains.
* Losses. Plain decoders have L1, LPIPS with weight 1 and, but for one, a GAN; the others have the squared error of the
  velocity, or the distance to the teacher, LPIPS with weight 0.5 and no GAN.

"regression of residuals" is the control of "flow of residuals": the same networks, losses, noise, steps and seed, but
it always looks at the beginning of the path, where there is noise alone and the weight 1 / (1 - t)^2 of the squared
error is 1, so that it learns the mean of what is open. It decodes in one step. `processor_seconds` are those of a
contestant's own training, with those of the flow for the one that is distilled from it. The steps of each are in
CONTESTANTS. Killed, it goes on when started again with the same scratch folder. Each is added to
benchmarks/results/flow-decoder.json when it is measured.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import earlier, save
from benchmarks.runs import evaluate, folder_name, seconds_of, train
from latent_ae.models.loading import load_first_stage
from latent_ae.models.new_decoder import decoder_parameters

FIRST = "model.block_out_channels=[32,64,64,64] model.latent_channels=4 steps=480 gan.start=320"
COMMON = "precision=bf16 validate.every=1000000 checkpoint.every=1000000 validate.crop_px=128 validate.images=20"
GAN = "gan.weight=1 gan.start={} gan.discriminator_warmup=15 gan.warmup=15 gan.channels=32 gan.layers=2"
FLOW = "phases=[] decoder.config.noise_scale=0.15"


class Contestant(NamedTuple):
    """How a decoder is trained."""

    recipe: str
    settings: str
    """Changes to the recipe."""
    sampled: tuple[int, ...] = ()
    """Steps that it takes from noise, each measured."""
    begins_with: str = ""
    """The contestant that it begins with; empty for the first stage."""
    fresh: bool = False
    """Whether it makes no use of the first stage's decoder."""


CONTESTANTS = {
    "plain, trained on": Contestant(
        "new-decoder", f"decoder={{}} train=decoder optim.lr=3e-4 steps=900 {GAN.format(600)}"
    ),
    "plain, trained on, no GAN": Contestant("new-decoder", "decoder={} train=decoder optim.lr=3e-4 steps=900"),
    "plain, of equal size": Contestant(
        "new-decoder", f"decoder.block_out_channels=[80,80,80,80] steps=600 {GAN.format(400)}", fresh=True
    ),
    "flow of pixels": Contestant(
        "flow-decoder",
        f"{FLOW} decoder.block_out_channels=[48,96] decoder.config.noise_scale=0.5 decoder.config.residual=false "
        "steps=600",
        (1, 2, 4, 8),
        fresh=True,
    ),
    "regression of residuals": Contestant("flow-decoder", f"{FLOW} steps=480 flow.time_mean=-50", (1,)),
    "flow of residuals": Contestant("flow-decoder", f"{FLOW} steps=480", (1, 2, 4, 8)),
    "distilled to one step": Contestant(
        "flow-decoder", f"{FLOW} decoder={{}} train=decoder flow.teacher_steps=8 steps=120", (1,), "flow of residuals"
    ),
}
RESULT, FIRST_STAGE = "flow-decoder", "first stage"
EVALUATION = "limit=200 crop_px=128 resize_px=null latents=[mode] lpips=[vgg] frechet=[vgg16] baseline=false"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS, metavar="NAME")
    words = parser.parse_args()
    torch.set_num_threads(1)
    data = [f"data.source={words.data}", f"data.eval_source={words.held_out}", *COMMON.split()]
    facts = {"data": words.data.parent.name, "evaluation": EVALUATION, "first": FIRST, "common": COMMON}
    earlier(RESULT, facts)  # ends here rather than after a training
    first = words.scratch / "first"
    train(first, "quickstart", *FIRST.split(), *data)
    add({FIRST_STAGE: measured(first, words.held_out, ())}, facts)
    for name in words.only:
        contestant, run = CONTESTANTS[name], words.scratch / folder_name(name)
        before = words.scratch / folder_name(contestant.begins_with) if contestant.begins_with else first
        train(run, contestant.recipe, f"init_from={before / 'export'}", *contestant.settings.split(), *data)
        found = measured(run, words.held_out, contestant.sampled)
        found["started_from_seconds"] = 0.0 if contestant.fresh else seconds_of(first)
        found["settings"] = f"{contestant.recipe} {contestant.settings}"
        if contestant.begins_with:
            found["processor_seconds"] += seconds_of(before)
        add({name: found}, facts)


def add(found: dict[str, Any], facts: dict[str, Any]) -> None:
    """Add rows to the result."""
    rows = earlier(RESULT, facts) | found
    save(
        RESULT,
        {**facts, "rows": {name: rows[name] for name in (FIRST_STAGE, *CONTESTANTS) if name in rows}},
        added=True,
    )


def measured(run: Path, held_out: Path, sampled: tuple[int, ...]) -> dict[str, Any]:
    """What the decoder of a run makes of held-out photographs, each figure with its interval, by its steps from noise
    ("" if it takes none)."""
    stage = load_first_stage(str(run / "export"))
    assert stage.module is not None
    figures: dict[str, dict[str, list[Any]]] = {}
    for steps, export in exports(run, sampled):
        out = run / (f"recon-own-noise{steps}" if steps else "recon")  # each image has its own; once they shared it
        result = evaluate(out, "recon", export, held_out, *EVALUATION.split(), "num_workers=0")
        keys = ("psnr", "ssim", "lpips_vgg", "frechet_vgg16")
        figures[steps] = {key: [result[part]["mode"].get(key) for part in ("metrics", "intervals")] for key in keys}
    fixed = sum(weight.numel() for name, weight in stage.module.named_parameters() if name.startswith("base."))
    return {
        "processor_seconds": seconds_of(run),
        "decoder_parameters": decoder_parameters(stage.module),
        "trained_parameters": decoder_parameters(stage.module) - fixed,
        "figures": figures,
    }


def exports(run: Path, sampled: tuple[int, ...]) -> Iterator[tuple[str, Path]]:
    """The run's export, with each number of steps in its config."""
    if not sampled:
        yield "", run / "export"
    for steps in sampled:
        folder = run / f"export-{steps}"
        shutil.copytree(run / "export", folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"sampling_steps": steps}, indent=2))
        yield str(steps), folder


if __name__ == "__main__":
    main()
