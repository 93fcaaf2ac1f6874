"""Option names of other trainers in errors, and `loraline init --from`."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from flows.coming_from.options import OPTIONS, TRAINERS, find_option
from flows.coming_from.read import read_source
from flows.coming_from.write import convert_settings
from flows.spec import Head, PipelineSpec, load_spec
from lora_engine.data.spec import CaptionSettings
from tasks.errors import SpecError
from tasks.step import STEPS
from tasks.steps.combine import Combine
from tasks.steps.train import Train
from tests.flows.commands import loraline_here, say
from tests.flows.made import write_random
from tests.flows.shared import draw_noise
from tests.support.untrained import save_tiny_vae, write_untrained_base

Write = Callable[..., Path]

LINE = """\
name: stripes
base: tiny
steps:
  photos:   {uses: ingest, images: images/}
  captions: {uses: caption, dataset: photos, trigger: sks, class_word: star}
  adapter:  {uses: train, dataset: captions, steps: 4, KEY: 1}
"""


def models_of(hint: Any) -> Iterator[type[BaseModel]]:
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield hint
    for inner in get_args(hint):
        yield from models_of(inner)


def exists(model: type[BaseModel], path: str) -> bool:
    """Returns True if some member of the unions on the way has the field."""
    key, _, rest = path.partition(".")
    field = model.model_fields.get(key)
    return field is not None and (not rest or any(exists(inner, rest) for inner in models_of(field.annotation)))


@pytest.mark.parametrize("ours", sorted({option.ours for option in OPTIONS if option.ours}))
def test_every_named_setting_exists(ours: str) -> None:
    step, _, path = ours.partition(".")
    assert exists(Head if step == "file" else STEPS[step].spec, path)


def test_a_setting_that_does_not_exist_is_noticed() -> None:
    assert not exists(Train, "objective.loss.deltas")
    assert exists(Train, "objective.loss.delta")


def test_an_option_without_a_setting_has_a_reason_and_no_name_is_in_a_column_twice() -> None:
    assert [option for option in OPTIONS if not option.ours and not option.note] == []
    for trainer in TRAINERS:
        counts = Counter(name for option in OPTIONS for name in option.names(trainer))
        assert [name for name, count in counts.items() if count > 1] == []


NAMES = sorted(
    {name for option in OPTIONS for trainer in ("sd", "diffusers") for name in option.names(trainer)}
    - set(Train.model_fields)
)


def test_a_name_of_another_trainer_is_answered_with_ours(pipeline: Write) -> None:
    assert len(NAMES) > 150
    for name in NAMES:
        option = find_option(name)
        assert option is not None
        with pytest.raises(SpecError) as caught:
            load_spec(pipeline(LINE.replace("KEY", name), images=1))
        assert caught.value.problem == f"unknown key 'adapter.{name}'"
        assert caught.value.where.endswith("pipeline.yaml:6:56")
        assert caught.value.remedy == option.hint("train")


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("network_dim", "use `rank`"),
        ("lr", "use `learning_rate`"),
        ("max_train_steps", "use `steps`"),
        ("resolution", "use `resolution` of the step `preprocess`"),
        ("flip_aug", "use `captions.flip`"),
        ("pretrained_model_name_or_path", "use `base` at the top of the file"),
        ("resume", "automatic: run the same command again"),
        ("save_every_n_steps", "use `save_every`"),
        ("save_last_n_steps", "not available"),
        ("huber_c", "use `objective.loss.delta`"),
    ],
)
def test_the_refusal_says_which_setting_to_use(key: str, fix: str, pipeline: Write) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(pipeline(LINE.replace("KEY", key)))
    assert caught.value.remedy.startswith(fix)


def test_a_misspelled_name_of_ours_still_gets_the_nearest_match(pipeline: Write) -> None:
    with pytest.raises(SpecError, match="did you mean 'accumulate'"):
        load_spec(pipeline(LINE.replace("KEY", "acumulate")))


def test_options_with_several_numbers_can_be_set_in_a_file(pipeline: Write) -> None:
    spec = load_spec(pipeline(LINE.replace("KEY: 1", "rates: {optimiser: {name: adamw, betas: [0.8, 0.9]}}")))
    assert spec.steps["adapter"].model_dump()["rates"]["optimiser"]["betas"] == (0.8, 0.9)
    with pytest.raises(SpecError, match="betas"):
        load_spec(pipeline(LINE.replace("KEY: 1", "rates: {optimiser: {name: adamw, betas: [0.8, 2]}}")))


KOHYA = """\
[model_arguments]
pretrained_model_name_or_path = "tiny"
[dataset_arguments]
train_data_dir = "img"
reg_data_dir = "reg"
resolution = "64,64"
shuffle_caption = true
keep_tokens = 1
caption_extension = ".txt"
[training_arguments]
output_name = "My Lora"
network_module = "networks.lora"
network_dim = 16
max_train_epochs = 2
train_batch_size = 2
unet_lr = 1e-4
text_encoder_lr = "5e-5"
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 0.1
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.1", "betas=0.9,0.99"]
mixed_precision = "no"
min_snr_gamma = 5
noise_offset = 0.05
cache_latents = true
no_half_vae = true
huggingface_token = "hf_secret"
clip_skip = 2
seed = 42
save_precision = "fp16"
min_bucket_reso = 256
network_args = ["conv_dim=4"]
"""
DATASET = """\
[general]
shuffle_caption = true
[[datasets]]
resolution = [64, 64]
batch_size = 3
  [[datasets.subsets]]
  image_dir = "img/10_sks star"
  class_tokens = "sks ring"
  num_repeats = 4
  keep_tokens = 2
  [[datasets.subsets]]
  image_dir = "reg/1_star"
  class_tokens = "ring"
  is_reg = true
"""
TOOLKIT = """\
job: extension
config:
  name: my_first_lora
  process:
    - type: sd_trainer
      trigger_word: p3r5on
      network: {type: lora, linear: 16, linear_alpha: 16}
      save: {dtype: float16, save_every: 250}
      datasets:
        - {folder_path: img, caption_ext: txt, caption_dropout_rate: 0.05, resolution: [64, 128], buckets: true}
      train: {batch_size: 1, steps: 20, optimizer: adamw8bit, lr: 1e-4, dtype: bf16, train_text_encoder: false,
              gradient_checkpointing: true, ema_config: {use_ema: true, ema_decay: 0.99}}
      model: {name_or_path: tiny, quantize: true}
      sample: {sample_every: 10, width: 64, height: 128, neg: "dull, grey",
               sampler: ddim, prompts: ["a man, 'x': y"], seed: 42, guidance_scale: 4, sample_steps: 20}
"""
ONE_TRAINER = {
    "training_method": "LORA",
    "base_model_name": "tiny",
    "batch_size": 2,
    "learning_rate": 0.0003,
    "resolution": "64",
    "epochs": 5,
    "learning_rate_scheduler": "COSINE",
    "learning_rate_warmup_steps": 10,
    "text_encoder": {"train": False},
    "loss_weight_fn": "CONSTANT",
    "loss_weight_strength": 5.0,
    "masked_training": True,
    "unmasked_weight": 0.1,
    "optimizer": {"optimizer": "PRODIGY", "beta1": 0.9, "beta2": 0.99},
    "train_dtype": "BFLOAT_16",
    "aspect_ratio_bucketing": False,
    "ema": "OFF",
    "ema_decay": 0.999,
    "secrets": {"huggingface_token": "hf_secret"},
    "concepts": [{"name": "a", "path": "img/10_sks star", "enabled": True, "balancing": 3.0}],
}
SCRIPT = """\
#!/bin/bash
export MODEL_NAME="tiny"
INSTANCE_DIR=img    # a comment
accelerate launch --num_processes=1 train_dreambooth_lora.py \\
  --pretrained_model_name_or_path=$MODEL_NAME \\
  --instance_data_dir="${INSTANCE_DIR}" --instance_prompt="a photo of sks star" \\
  --class_prompt "a photo of star" --with_prior_preservation --prior_loss_weight=0.5 --num-class-images=8 \\
  --resolution=64 --train_batch_size=1 --learning_rate=1e-4 --lr_warmup_steps=0 --max_train_steps=50 \\
  --validation_prompt="A photo of sks star" --snr_gamma 5.0 --train_text_encoder --push_to_hub
"""
FILES = {
    "config.toml": KOHYA,
    "toolkit.yaml": TOOLKIT,
    "trainer.json": json.dumps(ONE_TRAINER),
    "run.sh": SCRIPT,
}


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes one of `FILES` beside folders of images."""

    def write(name: str, text: str | None = None) -> Path:
        for index in range(3):
            draw_noise(tmp_path / "img" / "10_sks star" / f"{index}.png", index)
        draw_noise(tmp_path / "reg" / "1_star" / "0.png", 9)
        path = tmp_path / name
        path.write_text(FILES[name] if text is None else text)
        return path

    (tmp_path / "img" / "10_sks star").mkdir(parents=True)
    (tmp_path / "reg" / "1_star").mkdir(parents=True)
    return write


def converted(path: Path, *arguments: object) -> tuple[PipelineSpec, str]:
    """Converts a file by the verb; returns the pipeline and the output."""
    folder, home = path.parent / "out", path.parent / "home"
    output = say("init", folder, "--from", path, *arguments, home=home)
    planned = json.loads(say("plan", folder / "pipeline.yaml", "--json", home=home))
    spec = load_spec(folder / "pipeline.yaml")
    assert [step["name"] for step in planned] == list(spec.steps)
    return spec, output


def train_of(spec: PipelineSpec) -> Train:
    (train,) = [step for step in spec.steps.values() if isinstance(step, Train)]
    return train


def test_a_configuration_of_sd_scripts_becomes_a_pipeline(settings: Write) -> None:
    spec, output = converted(settings("config.toml"))
    train = train_of(spec)
    assert (spec.name, spec.seed, spec.base) == ("my-lora", 42, "tiny")
    assert (train.rank, train.alpha, train.batch, train.learning_rate) == (16, 1.0, 2, 1e-4)
    assert (train.steps, train.warmup, train.clip_skip) == ("2 epochs", "10%", 2)
    assert train.schedule.model_dump() == {"name": "cosine-restarts", "cycles": 3, "floor": 0.0}
    assert (train.rates.text, train.rates.optimiser.options()["betas"], train.weight_decay) == (5e-5, (0.9, 0.99), 0.1)
    assert train.targets == ["all", "text"], "with conv_dim"
    (override,) = train.overrides.values()
    assert (override.rank, override.alpha) == (4, 1.0)
    assert (train.objective.weighting.name, train.objective.noise_offset) == ("min_snr", 0.05)
    assert (train.captions.shuffle, train.captions.keep_tokens, train.precision) == (True, 1, "fp32")
    assert (train.method.name, train.class_dataset) == ("dreambooth", "class_captions")
    caption = spec.steps["captions"]
    assert isinstance(caption, CaptionSettings)
    assert caption.template == "sks star"
    assert spec.steps["photos"].model_dump()["repeats"] == "folders"
    assert spec.steps["prepared"].model_dump()["crop"] == "center"
    assert spec.steps["exports"].model_dump()["dtype"] == "float16"
    assert "huggingface_token" in output
    assert "cache_latents" not in output, "it is automatic"
    text = (Path(spec.folder) / "pipeline.yaml").read_text()
    assert "hf_secret" not in output + text


def test_a_dataset_file_of_sd_scripts_is_read_with_its_options(settings: Write) -> None:
    path = settings("config.toml", KOHYA.replace('train_data_dir = "img"', 'dataset_config = "dataset.toml"'))
    path.with_name("dataset.toml").write_text(DATASET)
    spec, _ = converted(path)
    train = train_of(spec)
    assert (train.batch, train.captions.keep_tokens, train.captions.shuffle) == (3, 2, True)
    assert spec.steps["photos"].model_dump()["repeats"] == {"*": 4}
    assert spec.steps["captions"].model_dump()["template"] == "sks ring"
    assert train.class_dataset == "class_captions"
    assert train.steps == "2 epochs"


SEVERAL = {
    "config.toml": KOHYA.replace('train_data_dir = "img"', 'dataset_config = "dataset.toml"'),
    "toolkit.yaml": TOOLKIT.replace(
        "      train: {batch",
        """\
        - {folder_path: other, num_repeats: 3, loss_multiplier: 0.5, flip_x: true, default_caption: "old [trigger]",
           resolution: 64}
        - {folder_path: reg/1_star, is_reg: true, default_caption: star}
      train: {batch""",
    ),
    "trainer.json": json.dumps(
        ONE_TRAINER
        | {
            "concepts": [
                {"name": "off", "path": "img", "enabled": False},
                {"name": "a", "path": "img/10_sks star", "balancing": 3.0, "balancing_strategy": "REPEATS"},
                {"name": "b", "path": "other", "loss_weight": 0.5, "balancing": 0.4, "type": "STANDARD",
                 "image": {"enable_random_flip": True}, "text": {"enable_tag_shuffling": True}},
                {"name": "c", "path": "img", "type": "VALIDATION"},
            ]
        }
    ),
}  # fmt: skip
SECOND = """\
  [[datasets.subsets]]
  image_dir = "other"
  num_repeats = 2
  caption_prefix = "a sketch, "
  shuffle_caption = false
  flip_aug = true
[[datasets]]
resolution = 32
batch_size = 5
  [[datasets.subsets]]
  image_dir = "third"
  class_tokens = "old ring"
  [[datasets.subsets]]
  image_dir = "nowhere"
"""
PARTS: dict[str, list[dict[str, Any]]] = {
    "config.toml": [
        {"repeats": 4},
        {"repeats": 2, "prefix": "a sketch, ", "shuffle": False, "keep_tokens": 1, "flip": True},
        {"keep_tokens": 1},
    ],
    "toolkit.yaml": [{}, {"repeats": 3, "weight": 0.5, "flip": True, "caption_dropout": 0.0}],
    "trainer.json": [{"repeats": 3}, {"weight": 0.5, "flip": True, "shuffle": True}],
}


def several(settings: Write, name: str) -> Path:
    path = settings(name, SEVERAL[name])
    path.with_name("dataset.toml").write_text(DATASET + SECOND)
    for number, folder in enumerate(("other", "third")):
        path.with_name(folder).mkdir()
        draw_noise(path.with_name(folder) / "0.png", 20 + number)
        (path.with_name(folder) / "0.txt").write_text("a ring, old")
    return path


@pytest.mark.parametrize("name", SEVERAL)
def test_several_folders_become_datasets_with_settings_of_their_own(name: str, settings: Write) -> None:
    spec, output = converted(several(settings, name))
    combined = spec.steps["images"]
    assert isinstance(combined, Combine)
    assert [part.model_dump(exclude_unset=True) for part in combined.parts] == PARTS[name]
    assert combined.datasets == tuple(f"captions_{number}" for number in range(1, len(PARTS[name]) + 1))
    assert (train_of(spec).dataset, spec.steps["report"].model_dump()["dataset"]) == ("images", "images")
    folders = [step.model_dump()["images"] for name, step in spec.steps.items() if name.startswith("photos")]
    first = "img" if name == "toolkit.yaml" else "10_sks star"
    assert [Path(folder).name for folder in folders] == [first, "other", "third"][: len(folders)]
    sizes = [step.model_dump()["resolution"] for name, step in spec.steps.items() if name.startswith("prepared")]
    assert sizes == {"config.toml": [64, 64, 32], "toolkit.yaml": [128, 64], "trainer.json": [64, 64]}[name]
    for line in {
        "config.toml": ["nowhere", "one value for all datasets; 3 was taken"],
        "toolkit.yaml": ["128 was taken"],
        "trainer.json": ["is disabled", "for validation", "repeats are whole numbers; 1 was taken"],
    }[name]:
        assert line in output


def test_captions_of_several_folders_are_their_own_and_class_images_have_theirs(settings: Write) -> None:
    spec, _ = converted(several(settings, "config.toml"))
    captions = {name: step.model_dump() for name, step in spec.steps.items() if isinstance(step, CaptionSettings)}
    assert {name: (settings["captioner"], settings["template"]) for name, settings in captions.items()} == {
        "class_captions": ("files", "ring"),
        "captions_1": ("files", "sks ring"),
        "captions_2": ("files", captions["captions_2"]["template"]),
        "captions_3": ("files", "old ring"),
    }
    assert captions["captions_2"]["template"] not in ("sks ring", "old ring")
    assert train_of(spec).class_dataset == "class_captions"


def test_several_folders_are_found_by_name_in_the_folder_of_the_user(settings: Write, tmp_path: Path) -> None:
    path = several(settings, "config.toml")
    for name in ("10_sks star", "nowhere"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        draw_noise(tmp_path / "mine" / name / "0.png", 30)
    spec, output = converted(path, "--images", tmp_path / "mine")
    folders = [step.model_dump()["images"] for name, step in spec.steps.items() if name.startswith("photos")]
    assert [Path(folder).relative_to(tmp_path).as_posix() for folder in folders] == ["mine/10_sks star", "mine/nowhere"]
    assert "no such folder in the one of --images" in output


def test_words_of_several_folders_of_sd_scripts_are_captions(settings: Write, tmp_path: Path) -> None:
    path = settings("config.toml")
    (tmp_path / "img" / "2_old ring").mkdir()
    draw_noise(tmp_path / "img" / "2_old ring" / "0.png", 30)
    assert "words of several folders" not in converted(path)[1]
    draw_noise(tmp_path / "img" / "outside.png", 31)
    (tmp_path / "out" / "pipeline.yaml").unlink()
    assert "words of several folders" in converted(path)[1]


@pytest.mark.nightly
def test_a_converted_configuration_with_several_folders_runs(settings: Write, tmp_path: Path) -> None:
    path = several(settings, "config.toml")
    path.write_text(path.read_text().replace("max_train_epochs = 2", "max_train_steps = 2").replace("= 16", "= 2"))
    path.with_name("dataset.toml").write_text((DATASET + SECOND).replace("64", "32"))
    spec, _ = converted(path)
    done = loraline_here("run", spec.folder / "pipeline.yaml", home=tmp_path / "home")
    assert done.returncode == 0, done.stderr


def test_a_file_of_ai_toolkit_becomes_a_pipeline(settings: Write) -> None:
    spec, output = converted(settings("toolkit.yaml"))
    train = train_of(spec)
    assert (spec.name, train.rank, train.alpha, train.steps, train.batch) == ("my_first_lora", 16, 16.0, 20, 1)
    assert (train.rates.optimiser.name, train.targets, train.caption_dropout) == ("adamw-8bit", "attention+ff", 0.05)
    assert train.rates.ema is not None
    assert train.rates.ema.decay == 0.99
    assert train.running.gradient_checkpointing
    assert train.running.quantise == "fp8", "quantize is qfloat8 there"
    assert train.samples is not None
    assert (train.samples.prompts, train.samples.seeds, train.samples.every) == (
        ("a man, 'x': y --w 64 --h 128 --ss ddim --n dull, grey",),
        (42,),
        10,
    )
    assert spec.steps["captions"].model_dump()["trigger"] == "p3r5on"
    assert spec.steps["prepared"].model_dump()["crop"] == "bucket"
    assert spec.steps["report"].model_dump()["dataset"] == "captions", "every bucket size is evaluated"
    assert "128 was taken" in output


def test_a_file_of_one_trainer_becomes_a_pipeline_and_what_cannot_work_is_changed(settings: Write) -> None:
    spec, output = converted(settings("trainer.json"))
    train = train_of(spec)
    assert (train.rank, train.alpha, train.targets) == (16, 1.0, "all")
    assert (train.rates.optimiser.name, train.learning_rate) == ("prodigy", 1.0)
    assert train.method.model_dump()["mask"]["floor"] == 0.1
    assert train.rates.ema is None
    assert train.objective.weighting.name == "none"
    assert train.steps == "5 epochs"
    assert "prodigy estimates" in output
    assert "hf_secret" not in output


def test_transparency_as_a_mask_is_carried_over(settings: Write) -> None:
    path = settings("toolkit.yaml")
    text = path.read_text()
    path.write_text(text.replace("caption_ext: txt", "caption_ext: txt, alpha_mask: true"))
    assert "alpha_mask" in path.read_text()
    spec, _ = converted(path)
    assert spec.steps["photos"].model_dump()["alpha"] == "mask"
    assert train_of(spec).method.model_dump()["mask"] is not None


def test_captions_of_which_one_is_drawn_stay_several(settings: Write) -> None:
    spec, _ = converted(settings("config.toml", KOHYA.replace("keep_tokens = 1", "enable_wildcard = true")))
    assert spec.steps["photos"].model_dump()["several_captions"] == "draw"
    assert train_of(spec).captions.wildcards


def test_a_command_line_of_diffusers_becomes_a_pipeline(settings: Write) -> None:
    spec, output = converted(settings("run.sh"))
    train = train_of(spec)
    assert (train.rank, train.alpha, train.steps, train.batch, train.warmup) == (4, None, 50, 1, 0)
    assert train.targets == ["attention", "text"]
    assert train.class_images is not None
    assert (train.class_images.prompt, train.class_images.weight, train.class_images.count) == (
        "a photo of star",
        0.5,
        8,
    )
    assert train.objective.weighting.model_dump() == {"name": "min_snr", "gamma": 5.0}
    assert train.samples is not None
    assert spec.steps["captions"].model_dump()["template"] == "a photo of sks star"
    assert "push_to_hub" in output


def test_a_folder_that_is_not_here_is_named_and_an_empty_one_is_made(settings: Write, tmp_path: Path) -> None:
    path = settings("run.sh", SCRIPT.replace("INSTANCE_DIR=img", "INSTANCE_DIR=/nowhere/img"))
    spec, output = converted(path)
    assert "/nowhere/img" in output
    assert (tmp_path / "out" / "images").is_dir()
    assert spec.steps["photos"].model_dump()["images"] == "images/"


def test_the_folder_of_images_can_be_given(settings: Write, tmp_path: Path) -> None:
    path = settings("run.sh", SCRIPT.replace("INSTANCE_DIR=img", "INSTANCE_DIR=/nowhere/img"))
    spec, output = converted(path, "--images", tmp_path / "img")
    assert "/nowhere/img" not in output
    assert spec.steps["photos"].model_dump()["images"] == str(tmp_path / "img")


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ('["algo=lokr", "factor=8", "decompose_both=True", "use_cp=1"]', {"factor": 8, "both": True, "tucker": True}),
        ('["algo=lokr", "factor=-1"]', {"name": "lokr"}),
        ('["algo=loha", "use_tucker=True", "factor=4"]', {"name": "loha", "tucker": True}),
        ('["dora_wd=True"]', {"name": "dora", "inner": "lora"}),
    ],
)
def test_arguments_of_the_network_are_options_of_the_kind(
    arguments: str, kind: dict[str, Any], settings: Write
) -> None:
    text = KOHYA.replace('["conv_dim=4"]', arguments).replace('"networks.lora"', '"lycoris.kohya"')
    written = train_of(converted(settings("config.toml", text))[0]).kind.model_dump()
    assert {key: written[key] for key in kind} == kind


VALUES: list[Any] = [
    0, 1, -1, 2.5, 1e300, True, False, "", "x", "1e-4", "none", "\x07", "~x/y", "a/" * 3000, [1, "a"], ["a=b", "c"],
    [[1]], {"name": "x"}, 10**50, "64,64", "{}", "{trigger}", "| # : \n x", None, "Prodigy", "huber", "cosine", "loha",
]  # fmt: skip


def test_any_value_of_any_option_gives_a_pipeline_or_a_refusal(tmp_path: Path) -> None:
    draw = random.Random(1)
    names = [name for option in OPTIONS for name in option.names("sd")]
    accepted, refusals = 0, list[str]()
    for number in range(150):
        data = {name: draw.choice(VALUES) for name in draw.sample(names, draw.choice([1, 2, 5]))}
        path = tmp_path / "settings.json"
        path.write_text(json.dumps(data | {"pretrained_model_name_or_path": "tiny", "resolution": 64}))
        try:
            convert_settings(tmp_path / str(number), path)
            accepted += 1
        except SpecError as error:
            refusals.append(str(error))
    assert 20 < accepted < 130
    assert all(str(tmp_path / "settings.json") in refusal for refusal in refusals)


def test_defaults_of_length_are_those_of_the_trainer(settings: Write) -> None:
    script = SCRIPT.replace("--max_train_steps=50", "")
    assert train_of(converted(settings("run.sh", script))[0]).steps == "1 epoch"


def test_a_folder_whose_name_is_too_long_is_one_that_is_not_here(settings: Write) -> None:
    path = settings("run.sh", SCRIPT.replace("INSTANCE_DIR=img", f"INSTANCE_DIR={'i' * 5000}"))
    spec, output = converted(path)
    assert spec.steps["photos"].model_dump()["images"] == "images/"
    assert "no such folder on this machine" in output


def test_the_same_file_gives_the_same_pipeline_and_another_one_is_not_overwritten(
    settings: Write, tmp_path: Path
) -> None:
    path, out = settings("run.sh"), tmp_path / "out" / "pipeline.yaml"
    converted(path)
    before = out.read_bytes()
    converted(path)
    assert out.read_bytes() == before
    out.write_text("mine")
    done = loraline_here("init", tmp_path / "out", "--from", path, home=tmp_path / "home")
    assert done.returncode == 2, done.stderr
    assert "different content" in done.stderr
    assert out.read_text() == "mine"


BAD: dict[str, tuple[str, str, str]] = {
    "a rank that is no number": ("config.toml", KOHYA.replace("= 16", '= "many"'), "config.toml:13:1: network_dim is"),
    "a rank out of range": ("config.toml", KOHYA.replace("= 16", "= 0.5"), "network_dim is 0.5"),
    "a rank too large": ("config.toml", KOHYA.replace("= 16", "= 100000"), "adapter.rank is 100000"),
    "a base that is not here": ("config.toml", KOHYA.replace('"tiny"', '"/no/model.safetensors"'), "--base"),
    "no base": ("run.sh", SCRIPT.replace("--pretrained_model_name_or_path=$MODEL_NAME", ""), "names no base model"),
    "TOML": ("config.toml", "a = [", "config.toml:1:"),
    "a date": ("config.toml", "seed = 2020-01-01", "config.toml:1:1: a date"),
    "depth": ("config.toml", "a = " + "[" * 3000, "nested more than 50"),
    "a long key": ("config.toml", "a." * 200_000 + "b = 1", "a key of more than 50 parts"),
    "a command": ("run.sh", SCRIPT.replace("${INSTANCE_DIR}", "$(rm -rf x)"), "would run a command"),
    "a variable": ("run.sh", SCRIPT.replace("$MODEL_NAME", "$MODEL"), "the variable 'MODEL' has no value"),
    "a quote": ("run.sh", SCRIPT.replace('sks star" --snr', "sks star --snr"), "not a shell command"),
    "no script": ("run.sh", "echo hello", "starts no training script"),
    "another JSON": ("trainer.json", '{"a": 1}', "of no known trainer"),
    "processes": ("toolkit.yaml", "config: {process: [{a: 1}, {b: 2}]}", "has 2 processes"),
    "a dataset file": ("config.toml", KOHYA + 'dataset_config = "no.toml"\n', "does not exist"),
    "a batch of 0": (
        "config.toml",
        KOHYA.replace("train_batch_size = 2", "train_batch_size = 0"),
        "adapter.batch is 0",
    ),
    "a long base": ("config.toml", KOHYA.replace('"tiny"', '"' + "a/" * 5000 + '"'), "--base"),
    "an unknown user": ("config.toml", KOHYA.replace('"tiny"', '"~nobody-here/x"'), "--base"),
    "a long dataset file": ("config.toml", KOHYA + f'dataset_config = "{"a" * 5000}.toml"\n', "does not exist"),
    "a control character": ("config.toml", KOHYA.replace('"My Lora"', '"My"\ncaption_prefix = "\\u0007x"'), "prefix"),
    "a huge number": ("config.toml", KOHYA.replace("= 16", "= 1e300"), "digits"),
    "a switch": ("config.toml", KOHYA.replace("shuffle_caption = true", "shuffle_caption = 7"), "shuffle_caption is 7"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_and_nothing_is_written(case: str, settings: Write, tmp_path: Path) -> None:
    name, text, message = BAD[case]
    done = loraline_here("init", tmp_path / "out", "--from", settings(name, text), home=tmp_path / "home")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_variables_that_double_do_not_fill_the_memory(tmp_path: Path) -> None:
    lines = ["A=" + "x" * 1000, *("A=$A$A$A$A$A$A$A$A" for _ in range(40)), "python train_dreambooth.py --a=$A"]
    path = tmp_path / "run.sh"
    path.write_text("\n".join(lines))
    with pytest.raises(SpecError, match="too long"):
        read_source(path)


def test_options_of_from_need_it(tmp_path: Path) -> None:
    done = loraline_here("init", tmp_path / "out", "--images", tmp_path, home=tmp_path / "home")
    assert done.returncode == 2, done.stderr
    assert "--from" in done.stderr


@pytest.mark.nightly
def test_a_converted_configuration_of_sd_scripts_runs(settings: Write, tmp_path: Path) -> None:
    text = KOHYA.replace("max_train_epochs = 2", "max_train_steps = 4").replace("64,64", "32,32")
    spec, _ = converted(settings("config.toml", text))
    done = loraline_here("run", spec.folder / "pipeline.yaml", home=tmp_path / "home")
    assert done.returncode == 0, done.stderr


def test_an_adapter_and_an_autoencoder_are_carried_over_if_they_are_here(settings: Write, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    save_tiny_vae(tmp_path / "vae")
    write_random(tmp_path / "old.safetensors", 1)
    text = KOHYA.replace("[model_arguments]", '[model_arguments]\nvae = "vae"\nnetwork_weights = "old.safetensors"')
    spec, output = converted(settings("config.toml", text))
    assert train_of(spec).init == str(tmp_path / "old.safetensors")
    assert train_of(spec).vae == str(tmp_path / "vae")
    assert "old.safetensors" not in output.partition("Not carried over")[2]
    (tmp_path / "out" / "pipeline.yaml").unlink()
    spec, output = converted(settings("config.toml", text.replace('"vae"', '"x.ckpt"').replace("old.", "gone.")))
    assert (train_of(spec).init, train_of(spec).vae) == (None, None)
    assert "no such file on this machine; name one as init" in output
    assert "save the autoencoder as a folder" in output


@pytest.mark.parametrize(
    ("name", "skip", "shape", "layer"),
    [
        ("config.toml", 2, "", 2),
        ("config.toml", 1, "", None),
        ("config.toml", 2, "small-sdxl", None),
        ("trainer.json", 1, "", 2),
        ("trainer.json", 1, "small-sdxl", 3),
        ("trainer.json", 1, "small-flux", None),
    ],
)
def test_skipped_layers_of_text_encoders_are_counted_as_the_trainer_does(
    settings: Write, tmp_path: Path, name: str, skip: int, shape: str, layer: int | None
) -> None:
    base = str(write_untrained_base(tmp_path / "base", shape)) if shape else "tiny"
    text = KOHYA.replace("clip_skip = 2", f"clip_skip = {skip}")
    if name == "trainer.json":
        text = json.dumps(ONE_TRAINER | {"text_encoder_layer_skip": skip})
    spec, _ = converted(settings(name, text), "--base", base)
    assert train_of(spec).clip_skip == layer


def test_a_warmup_or_decay_in_steps_fits_the_epochs(settings: Write) -> None:
    text = KOHYA.replace("lr_warmup_steps = 0.1", "lr_warmup_steps = 30").replace("cosine_with_restarts", "wsd")
    spec, _ = converted(settings("config.toml", text))
    assert train_of(spec).warmup == 0
    assert "warmup: 30 (the run has 30 steps only)" in (Path(spec.folder) / "pipeline.yaml").read_text()
    (Path(spec.folder) / "pipeline.yaml").unlink()
    text = text.replace("lr_warmup_steps = 30", "lr_warmup_steps = 10\nlr_decay_steps = 5")
    text = text.replace('"wsd"', '"warmup_stable_decay"')
    spec, _ = converted(settings("config.toml", text))
    assert (train_of(spec).warmup, train_of(spec).schedule.model_dump()["decay"]) == (10, 0.25)
