"""What a person types wrong is told what was meant, and --help lists what there is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from latent_ae.__main__ import main
from latent_ae.command_line import meanings, topic_text, written
from latent_ae.config import Settings, all_keys, hint_for, key_of, load_settings, names_of, recipe_names
from latent_ae.convert.settings import ConvertSettings
from latent_ae.data.settings import CheckSettings
from latent_ae.latents.settings import EncodeSettings
from latent_ae.other_names import OTHER_NAMES
from latent_ae_eval.anomaly.settings import AnomalySettings
from latent_ae_eval.factors.settings import FactorsSettings
from latent_ae_eval.generation.settings import DiffusionSettings
from latent_ae_eval.ifid.settings import IfidSettings
from latent_ae_eval.interpolate.settings import InterpolateSettings
from latent_ae_eval.latents.settings import LatentsSettings
from latent_ae_eval.likelihood.settings import LikelihoodSettings
from latent_ae_eval.probe.settings import ProbeSettings
from latent_ae_eval.recon.settings import ReconSettings
from latent_ae_eval.sample.settings import SampleSettings
from latent_ae_eval.text.settings import TextSettings
from latent_ae_train.settings import TrainSettings
from tests.recipes import FOLDER

JOBS = {
    "recon": ReconSettings,
    "latents": LatentsSettings,
    "interpolate": InterpolateSettings,
    "probe": ProbeSettings,
    "anomaly": AnomalySettings,
    "likelihood": LikelihoodSettings,
    "sample": SampleSettings,
    "factors": FactorsSettings,
    "ifid": IfidSettings,
    "text": TextSettings,
    "diffusion": DiffusionSettings,
}
COMMANDS = {
    ("train",): TrainSettings,
    ("encode",): EncodeSettings,
    ("convert",): ConvertSettings,
    ("data",): CheckSettings,
    **{("eval", job): settings for job, settings in JOBS.items()},
}


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("command", "kind"), COMMANDS.items(), ids=["-".join(command) for command in COMMANDS])
def test_help_lists_each_setting_with_its_default(
    command: tuple[str, ...], kind: type[Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, *command, "--help")
    assert text.startswith("usage: latent-ae " + " ".join(command)) and "\nexample" in text
    sections = {key.split(".")[0] for key in all_keys(kind) if "." in key}
    for section in sections:
        assert f"\n  {section}.*" in text
        text += shown(capsys, *command, "--help", section)
    settings = kind()
    for key in all_keys(kind):
        value = settings
        for part in key.split("."):
            value = getattr(value, next(name for name in names_of(type(value)) if key_of(type(value), name) == part))
        assert f"\n  {key}={written(value)} " in text, key
        # and what is printed can be typed
        assert load_settings(kind, None, [f"{key}={written(value)}"]) == settings


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=["-".join(command) for command in COMMANDS])
def test_each_setting_has_a_meaning(kind: type[Settings]) -> None:
    sections = [kind, *(field.annotation for field in kind.model_fields.values())]
    for section in sections:
        if isinstance(section, type) and issubclass(section, Settings):
            nested = {name for name in section.model_fields if isinstance(getattr(section(), name), Settings)}
            assert section.model_fields.keys() - nested - meanings(section).keys() == set()


def test_a_meaning_is_that_of_the_nearest_class_that_gives_one() -> None:
    class Base(Settings):
        one: int = 1
        """First."""
        two: int = 2
        """Second,
        in two lines."""

    class Further(Base):
        """With another default."""

        one: int = 3
        """Changed."""
        two: int = 3

    assert meanings(Base) == {"one": "First.", "two": "Second, in two lines."}
    assert meanings(Further) == {"one": "Changed.", "two": "Second, in two lines."}
    assert topic_text(Further, "two") == "  two=3" + 33 * " " + "integer\n      Second, in two lines."


def test_help_on_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "train", "quickstart", "-h", "optim.warmup")
    assert text.splitlines() == [
        "  optim.warmup=1000                     integer",
        "      Steps over which the learning rate rises from 0.",
    ]
    assert "--help optm: no such setting or section; did you mean optim?" in told(capsys, "train", "--help", "optm")
    assert shown(capsys, "train", "--help", "steps=3") == shown(capsys, "train", "quickstart", "--help")


def test_help_and_mistakes_load_nothing_heavy() -> None:
    code = (
        "import sys; from latent_ae.__main__ import main\n"
        "for words in (['eval', 'recon'], ['eval', 'diffusion'], ['encode'], ['convert'], ['data']):\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'diffusers', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert main(['train', 'quickstart', 'stesp=1']) == 2\n"
        # torch is there: objectives have their settings beside their gradients
        "heavy = {'diffusers', 'datasets', 'accelerate', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "did you mean steps?" in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train quickstart --steps 3", "give steps=3 in place of --steps 3"),
        ("train --steps 3 quickstart --optim.lr=1e-4", "give steps=3 optim.lr=1e-4 in place of --steps 3 --optim.lr="),
        ("train quickstart --gan.blur", "give gan.blur=true in place of --gan.blur"),
        ("train quickstart --learning-rate 3", "--learning-rate: no such option; here it is optim.lr"),
        ("train quickstart --dryrun", "--dryrun: no such option; did you mean --dry-run?"),
        ("train quickstart --xyzzy", "--xyzzy: no such option (settings are written key=value"),
        ("eval recon model photos --limit=5", "give limit=5 in place of --limit=5"),
        ("encode model photos --data.split test", "give split=test in place of --"),
        ("data check photos --channels 5", "give channels=5 in place of --channels 5"),
        ("trian quickstart", "no such command: trian; did you mean train?"),
        ("data chek photos", "no such action: chek; did you mean check? (latent-ae data check DATA)"),
        ("eval rcon", "no such command: rcon; did you mean recon?"),
        ("train quickstart optimizer.lr=1", "optimizer: no such setting; did you mean optim.lr?"),
        ("train quickstart image_column=img", "image_column: no such setting; did you mean data.image_column?"),
        ("train quickstart optim.learning_rate=1", "optim.learning_rate: no such setting; here it is optim.lr"),
        ("train quickstart max_train_steps=1", "max_train_steps: no such setting; here it is steps"),
        ("train quickstart num_train_epochs=1", "here it is steps (a run counts updates"),
        ("train quickstart loss.disc_start=1", "loss.disc_start: no such setting; here it is gan.start"),
        ("train quickstart resume_from_checkpoint=latest", "the same command with the same output_dir resumes"),
        ("train quickstart model.params.ddconfig.ch_mult=[1,2]", "here it is model.block_out_channels"),
        ("train quickstart mixed_precision=bf16", "here it is precision"),
        ("eval recon model photos mixed_precision=bf16", "here it is dtype"),
        ("data check photos in_channels=5", "here it is channels"),
        (
            "train quickstart model.in_channels=9",
            "model.init: linear needs model.latent_channels >= 9, or set model.init=d",
        ),
    ],
)
def test_what_was_meant(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in told(capsys, *words.split())


def test_each_name_of_others_leads_to_a_setting_of_ours() -> None:
    kinds = [TrainSettings, *COMMANDS.values()]
    names = {kind: {name for key in all_keys(kind) for name in (key, key.split(".")[0])} for kind in kinds}
    for other, text in OTHER_NAMES.items():
        targets = text.partition(": ")[0].split() if not text.startswith(": ") else []
        for target in targets:
            assert any(target in known for known in names.values()), f"{other}: {target}"
        assert other not in names[TrainSettings], f"{other} is a setting of ours"
        assert targets or hint_for(TrainSettings, [other]) == text.removeprefix(": ")
        # of a remark, what is written key=value or as a key is there
        for key in re.findall(r"\b[a-z_]+\.[a-z_]+\b(?=[= ,]|$)", text):
            assert key.endswith(".md") or key in names[TrainSettings], f"{other}: {key}"


def test_data_settings_have_one_spelling_everywhere() -> None:
    for kind in (EncodeSettings, CheckSettings, *JOBS.values()):
        both = [load_settings(kind, None, [f"{key}=img"]) for key in ("image_column", "data.image_column")]
        assert both[0] == both[1] and both[0].image_column == "img"
    assert load_settings(ReconSettings, None, ["data.revision=v1"]).data_revision == "v1"
    assert load_settings(CheckSettings, None, ["data.revision=v1"]).revision == "v1"


def test_messages_name_the_key_that_the_command_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "a.parquet")
    error = told(capsys, "data", "check", str(tmp_path / "a.parquet"))
    assert "latent-ae data: image_column: " in error and "data.image_column" not in error


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_shape_of_init_from_replaces_that_of_a_recipe(recipe: str) -> None:
    more = [word for word in FOLDER.get(recipe, []) if not word.startswith("init_from")]
    settings = load_settings(TrainSettings, recipe, ["init_from=someone/vae", *more])
    assert settings.model == TrainSettings().model
    if settings.decoder.wanted:  # it has no first stage without init_from
        return
    given = load_settings(TrainSettings, recipe, ["init_from=null", *more])
    assert given.model == load_settings(TrainSettings, recipe, more).model


def test_words_on_the_model_stay_beside_init_from() -> None:
    settings = load_settings(TrainSettings, "quickstart", ["init_from=someone/vae", "model.latent_channels=8"])
    assert settings.model.latent_channels == 8 and settings.model.block_out_channels == (32, 64, 64)


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_a_part_that_stays_random_is_warned_of(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "quickstart", "--dry-run", f"train={part}", "gan.adaptive=false"]
    warning = f"train={part} without init_from: the {'encoder' if part == 'decoder' else 'decoder'} stays at its"
    assert main(words) == 0
    assert f"warning:       {warning} linear start" in capsys.readouterr().out
    assert main([*words, "model.init=default"]) == 0
    assert f"{warning} random start" in capsys.readouterr().out
    assert not list(
        load_settings(TrainSettings, "quickstart", [f"train={part}", "init_from=a/b"] + words[4:]).warnings()
    )
