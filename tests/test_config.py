"""Settings: every mistake at once, with the key's path, what is wrong and what to do."""

import re
from pathlib import Path
from typing import Any

import pytest

from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings, recipe_names, to_yaml
from latent_ae_eval.anomaly.settings import AnomalySettings
from latent_ae_train.settings import TrainSettings
from tests.recipes import FOLDER


def message(*words: str, source: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_settings(TrainSettings, source, words)
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("stesp=3", "stesp: no such setting; did you mean steps?"),
        ("optim.learning_rate=3", "optim.learning_rate: no such setting"),
        ("lr=1e-4", "lr: no such setting; did you mean optim.lr?"),
        ("gan.wieght=1", "did you mean gan.weight?"),
        ("modle.latent_channels=4", "modle: no such setting; did you mean model"),
        ("steps=many", "steps: input should be a valid integer"),
        ("steps=true", "steps: true is a yes/no value"),
        ("optim.lr=yes", "optim.lr: true is a yes/no value"),
        ("model.block_out_channels=[true,64]", "model.block_out_channels: [true, 64] is a yes/no value"),
        ("data.flip=3.5", "data.flip: input should be a valid boolean"),
        ("steps=0", "steps: input should be greater than or equal to 1"),
        ("optim.lr=.nan", "optim.lr: input should be"),
        ("precision=fp16", "precision: fp16 needs a loss scale for each of the two networks"),
        ("precision=fp8", "precision: input should be 'fp32' or 'bf16'"),
        ("gan.norm=batch batch_size=8 micro_batch_size=4", "gan.norm: batch takes its statistics from one pass"),
        ("gan.norm=batch batch_size=1", "gan.norm: batch takes its statistics from one pass"),
        ("train=encoder", "gan.adaptive: measures gradients at the decoder's last layer"),
        ("compile=true gan.r1=1", "gan.r1: needs a second derivative"),
        ("gan.init_from=/nowhere", "gan.init_from: no such folder"),
        ("loss.pixel=l3", "loss.pixel: input should be 'l1', 'l2', 'charbonnier', 'bernoulli'"),
        ("report_to=[mlflow]", "report_to: input should be 'tensorboard', 'wandb' or 'trackio'"),
        ("steps", "steps: not understood; write key=value"),
        ("steps.x=3", "steps"),
        ("data.resolution=100 model.block_out_channels=[32,32,32,32]", "data.resolution: 100 is not a multiple"),
        ("data.source=./no/such/folder", "data.source: no such file or folder: ./no/such/folder"),
        ("data.eval_source=/nowhere", "data.eval_source: no such file or folder"),
        ("init_from=/nowhere/vae", "init_from: no such folder"),
        ("weights_dir=/nowhere", "weights_dir: no such folder"),
        ("output_dir=README.md/x", "is a file; name a folder"),
        ("model.norm_num_groups=7", "model.norm_num_groups: 7 does not divide"),
        (
            "data.resolution=8 validate.crop_px=8 loss.perceptual=0 gan.weight=0 model.norm_num_groups=512 "
            "model.block_out_channels=[512,512,512,512]",
            "model.norm_num_groups: 512 groups of 512 channels hold one number each",
        ),
        ("model.out_channels=1", "model.out_channels: 1, but model.in_channels is 3"),
        (
            "model.in_channels=4 model.out_channels=4",
            "loss.perceptual: LPIPS sees 1 or 3 channels, this AutoencoderKL has 4: set loss.backgrounds=",
        ),
        ("model.in_channels=5 model.out_channels=5", "5: set loss.bands to groups of one or three of them, such as"),
        ("loss.pixel_weight=0 loss.perceptual=0", "nothing would be reconstructed"),
        ("data.resize_px=64", "data.resize_px: 64 is smaller than data.resolution"),
        ("data.scaled_decoding=true", "data.scaled_decoding: speeds up data.resize_px, which is null"),
        ("model.init=linear model.latent_channels=2", "model.init: linear needs model.latent_channels >= 3"),
        ("decoder.block_out_channels=[4,8]", "decoder: is for the latents of an existing first stage: give init_from"),
        ("decoder.layers_per_block=2 init_from=a/b train=all", "train: all, and with decoder.* the decoder trains"),
        ("decoder.layers_per_block=2 init_from=a/b model.latent_channels=8", "model: a new decoder's first stage is"),
        ("decoder.layers_per_block=2 init_from=a/b distillation.teacher=a/b", "distillation.teacher: decoder.* is for"),
        ("decoder.latents=x init_from=a/b latents.equivariance=0.5", "latents.equivariance: encodes smaller images"),
        ("decoder.latents=x init_from=a/b data.streaming=true", "data.streaming: decoder.latents belong to stored"),
        (
            'decoder.latents=x init_from=a/b data.mixture=[{"source":photos}]',
            "data.mixture: decoder.latents belong to the",
        ),
        ("gan.layers=8", "gan.layers: 8 need crops of at least"),
        ("gan.layers=999999999999", "gan.layers: input should be less than or equal to 16"),
        ("validate.crop_px=250", "validate.crop_px: 250 is not a multiple of the model's factor 8: use 248"),
        ("data.resolution=16 loss.perceptual_net=alex", "loss.perceptual_net: alex needs images of at least 31 px"),
        ("seed=99999999999999999999999999", "seed: input should be less than"),
        ("data.background=[1,2]", "data.background: has too few values"),
        ("data.scale=0.5", "data.scale: a list in brackets is expected"),
        ("model=3", "model: a section of keys and values is expected, as in {key: value}"),
    ],
)
def test_each_mistake_has_its_message(word: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert expected in message(*word.split())


def test_all_mistakes_at_once() -> None:
    text = message("stesp=1", "optim.lr=true", "batch_size=0", "data.resize_px=8", "data.source=/nowhere/at/all")
    assert text.startswith("5 problems")
    for key in ("stesp:", "optim.lr:", "batch_size:", "data.resize_px:", "data.source:"):
        assert f"\n  {key}" in text


def test_a_wrong_batch_split_depends_on_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    load_settings(TrainSettings, None, ["batch_size=9"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "9 does not divide into 2 processes: set batch_size to 8 or 10" in message("batch_size=9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert "9 does not divide into 16 processes: set batch_size to 16, or" in message("batch_size=9")


@pytest.mark.parametrize(
    ("batch_size", "processes", "most", "expected"),
    [
        (24, 2, 3, (3, 4)),
        (32, 16, 4, (2, 1)),
        (10, 1, 4, (2, 5)),
        (12, 1, 5, (4, 3)),
        (14, 2, 4, (1, 7)),
        (8, 2, None, (4, 1)),
    ],
)
def test_a_pass_holds_the_largest_part_that_divides_the_share(
    batch_size: int, processes: int, most: int | None, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    words = [f"batch_size={batch_size}", f"micro_batch_size={most or 'null'}"]
    settings = load_settings(TrainSettings, None, words)
    assert (settings.micro_batch, settings.accumulation) == expected
    assert processes * settings.micro_batch * settings.accumulation == batch_size


def test_the_documented_command_for_two_machines_has_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parent.parent / "docs/multi-gpu.md").read_text().replace("\\\n", " ")
    (line,) = [
        line for line in page.splitlines() if line.startswith("accelerate launch") and "--num_machines 2" in line
    ]
    launcher, words = line.split(" -m latent_ae ")
    (processes,) = re.findall(r"--num_processes (\d+)", launcher)
    monkeypatch.setenv("WORLD_SIZE", processes)
    places = words.replace("/shared/photos", str(tmp_path)).replace("/shared/runs", str(tmp_path))
    assert main([*places.split(), "--dry-run"]) == 0
    assert (
        "32 = 16 process(es) x 2 micro-batch x 1 accumulation (micro_batch_size 4 is the most"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_sharded_model_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")  # as accelerate's launcher sets it
    assert f"accelerate: its configuration asks for {name}" in message()


def test_yaml_scientific_notation_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {lr: 1e-4}\nsteps: 7\n")
    settings = load_settings(TrainSettings, str(path), ["optim.lr=2e-5", "gan.weight=0", "data.resize_px=null"])
    assert (settings.optim.lr, settings.steps, settings.gan.weight) == (2e-5, 7, 0.0)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("output_dir=2024-05-01", "2024-05-01"),
        ("output_dir=2024", "2024"),
        ("output_dir=yes", "yes"),
        ("output_dir=runs/run #2", "runs/run #2"),
        ("output_dir='run # 2'", "run # 2"),
        ("data.revision=0123456", "0123456"),
        ("data.revision=1e5", "1e5"),
        ("data.revision=null", None),
        ("data.revision=#12", "#12"),
        ("train=decoder", "decoder"),
        ("train=[decoder.*]", ("decoder.*",)),
    ],
)
def test_text_in_a_word_stays_as_it_was_typed(word: str, expected: Any) -> None:
    """YAML would read dates, numbers and comments."""
    value: Any = load_settings(TrainSettings, "quickstart", [word])
    for part in word.partition("=")[0].split("."):
        value = getattr(value, part)
    assert value == expected


def test_text_in_a_word_of_a_phase_stays_as_it_was_typed() -> None:
    phases = "phases=[{steps: 2}, {steps: 2, data: {}}]"
    settings = load_settings(TrainSettings, "quickstart", [phases, "phases.2.data.revision=2024-05-01"])
    assert settings.phases[1]["data"] == {"revision": "2024-05-01"}


def test_a_number_stays_one_where_a_setting_may_be_either() -> None:
    for text, expected in (("1", 1), ("good", "good"), ("2024-05-01", "2024-05-01"), ("007", "007")):
        assert load_settings(AnomalySettings, None, [f"normal_class={text}"]).normal_class == expected


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00steps")
    assert "cannot read" in message(source=str(path))


@pytest.mark.parametrize("text", ["steps: [", "- a\n- b\n", "steps: !!python/object/apply:os.system ['true']"])
def test_a_file_that_is_no_settings(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert "bad.yaml" in message(source=str(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 3\nsteps: 4\n", "steps is given twice"),
        ("optim: {lr: 1.0e-4, lr: 1.0e-3}\n", "lr is given twice"),
        ("on: 3\n", "the key 'on' is read as True"),
        ("data: {1: 3}\n", "the key '1' is read as 1"),
    ],
)
def test_keys_that_yaml_would_swallow(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert expected in message(source=str(path))


def test_a_missing_config_names_the_recipes() -> None:
    text = message(source="quikstart")
    assert "no such config: quikstart" in text and "Did you mean the recipe quickstart?" in text


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_is_valid_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    settings = load_settings(TrainSettings, name, FOLDER.get(name, []))
    path = tmp_path / "copy.yaml"
    path.write_text(to_yaml(settings))
    assert load_settings(TrainSettings, str(path)) == settings


def test_a_wrong_kind_of_model_is_reported_alone() -> None:
    text = message("model.kind=DiscretVAE", "steps=0", source="dvae")
    assert text.startswith("2 problems") and "model.kind: input should be" in text and "steps: " in text


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainSettings().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("words", "key", "recipe"),
    [
        (["train", "flow-decoder"], "init_from: no such folder: runs/quickstart", "quickstart"),
        (["train", "new-decoder"], "init_from: no such folder: runs/quickstart", "quickstart"),
        (["eval", "recon", "runs/vae/export", "photos"], "no such model folder: runs/vae/export", "vae"),
        (["eval", "latents", "runs/vae", "photos"], "no such model folder: runs/vae", "vae"),
        (["encode", "runs/mine", "photos", "OUT"], "no such model folder: runs/mine", ""),
    ],
)
def test_a_missing_run_is_not_looked_up_on_the_hub_and_its_recipe_is_named(
    words: list[str], key: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    lines = capsys.readouterr().err
    command = f"; `latent-ae train {recipe}` makes it" if recipe else ""
    assert f"{key} (from {tmp_path}){command}\n" in lines
