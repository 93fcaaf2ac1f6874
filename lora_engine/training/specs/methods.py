"""The training methods as a person chooses them, each with options of its own. Torch-free; `training.methods` works.

In a pipeline file: `method: pivotal`, or with options `method: {name: pivotal, inversion: 0.3}`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Prompt = Annotated[str, Field(min_length=1, max_length=2000)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Weight = Annotated[float, Field(allow_inf_nan=False, ge=0.0, le=1000.0)]
_Share = Annotated[float, Field(allow_inf_nan=False, ge=0.0, le=1.0)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prior(_Settings):
    """Prior preservation (Ruiz et al. 2023, eq. 2): pictures of the class are trained on too.

    They come from `class_dataset` where the step names one (regularisation images, with their captions, or with
    `prompt` where they have none), and are drawn by the base otherwise.

    Attributes:
        prompt: Of the class pictures, or several prompts that take turns: what all shall stay as it is. None is
            "a <class word>".
        count: How many class pictures are drawn.
        weight: Of their loss beside that of the person's pictures.
        steps: Of the sampler that draws them.
        guidance: Classifier-free guidance while drawing.
        batches: `joint` adds as many class pictures to each batch; `alternating` makes every second batch one of class
            pictures alone, which halves the memory and the steps that see the person's pictures.
    """

    prompt: Prompt | Annotated[tuple[Prompt, ...], Field(min_length=1, max_length=1000)] | None = None
    count: int = Field(default=32, ge=1, le=10_000)
    weight: _Weight = 1.0
    steps: int = Field(default=12, ge=1, le=1000)
    guidance: _Finite = Field(default=3.0, ge=0.0, le=50.0)
    batches: Literal["joint", "alternating"] = "joint"


class Preservation(_Settings):
    """Differential output preservation: on class captions the network with the adapter is held to the base without.

    The same noisy pictures are looked at with a caption of the class; the base, at multiplier 0, is the teacher.

    Attributes:
        weight: Of the mean squared error between the two, beside the loss of the person's pictures.
        prompt: The caption of the class; None is the picture's own with the class word in the trigger's place.
    """

    weight: _Weight = 1.0
    prompt: Prompt | None = None


class Mask(_Settings):
    """Masked loss: each element of the error counts by (m + floor)^temperature, m the mask's share of its area.

    Attributes:
        temperature: Above 1, half-covered elements count less; below 1, more.
        floor: What is added to the mask, so that the surroundings count a little; 0 ignores them.
        normalise: Whether the weights are divided by their mean, so that a small subject counts as much as a large one.
    """

    temperature: _Finite = Field(default=1.0, gt=0.0, le=16.0)
    floor: _Share = 0.0
    normalise: bool = False


class Identity(_Settings):
    """Identity preservation: the decoded prediction is to be embedded where the person's pictures are.

    The embedder is the step's `embedder` (a local folder of any image model that transformers can load), or the
    embedded CLIP.

    Attributes:
        weight: Of 1 - cosine similarity, beside the denoising loss.
        until: Share of the schedule, from the side without noise, in which it counts; with more noise the prediction
            shows nothing that could be recognised.
        crop: Share of the picture's sides that is looked at, around its middle.
    """

    weight: _Weight = 0.1
    until: _Share = 0.3
    crop: _Finite = Field(default=1.0, gt=0.0, le=1.0)


class MethodSpec(_Settings):
    """What every method can have beside its own options.

    Attributes:
        name: Of the method.
        mask: Counts errors by the pictures' masks; a picture without one counts whole.
        preservation: Holds the network on captions of the class.
        identity: Holds the look of the person's pictures.
    """

    takes_prior: ClassVar[bool] = True
    has_adapter: ClassVar[bool] = True

    name: str
    mask: Mask | None = None
    preservation: Preservation | None = None
    identity: Identity | None = None


class Finetune(MethodSpec):
    """Captioned fine-tuning: pictures and captions alone."""

    takes_prior: ClassVar[bool] = False
    name: Literal["finetune"] = "finetune"


class Dreambooth(MethodSpec):
    """DreamBooth: a rare word for the subject, and class pictures that hold the class (see `Prior`)."""

    name: Literal["dreambooth"] = "dreambooth"


class TokenSettings(_Settings):
    """What is learned as vectors of the text encoders' input (Gal et al. 2022).

    Attributes:
        token: The word; None is the dataset's trigger.
        vectors: How many vectors it stands for, each a token of the text.
        initialiser: The text whose tokens the vectors begin as, taking turns; None is the dataset's class word. Where
            there is none either, they begin as random rows of the encoder's mean and spread.
        word_rate: Highest learning rate of the vectors.
        norm_decay: How fast the vectors' norms go to `norm`: e <- e/|e| (|e| + r (norm - |e|)) after each step, r the
            step's rate times this, at most 1 (as cloneofsimo's lora_pti); 0 leaves them alone.
        norm: The norm that they go to; None is the mean of the encoder's own, 0.4 suits CLIP ViT-L.
    """

    token: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    vectors: int = Field(default=1, ge=1, le=64)
    initialiser: Prompt | None = None
    word_rate: _Finite = Field(default=5e-3, gt=0.0)
    norm_decay: _Finite = Field(default=100.0, ge=0.0)
    norm: _Finite | None = Field(default=None, gt=0.0)


class TextualInversion(MethodSpec, TokenSettings):
    """Textual inversion: a word is learned and no weight moves; rank, kind, targets and rates mean nothing here."""

    takes_prior: ClassVar[bool] = False
    has_adapter: ClassVar[bool] = False
    name: Literal["textual-inversion"] = "textual-inversion"
    preservation: None = None


class Pivotal(MethodSpec, TokenSettings):
    """Pivotal tuning (Roich et al. 2021; lora_pti): a word is learned first, then the adapter and the word together.

    Attributes:
        inversion: Share of the steps in which the word alone moves.
        tuning_rate: Highest rate of the vectors while the adapter moves; 0 leaves them as the inversion did.
    """

    name: Literal["pivotal"] = "pivotal"
    inversion: _Finite = Field(default=0.5, gt=0.0, lt=1.0)
    tuning_rate: _Finite = Field(default=5e-4, ge=0.0)


class Inpainting(MethodSpec):
    """Inpainting: a part of each picture is hidden, and the error counts there more than around it.

    Bases with a mask in their input see the picture without that part; others learn from the weights alone.

    Attributes:
        masks: `random` draws boxes and strokes; `given` takes the pictures' own; `mixed` takes each in half of the
            batches, and random ones where a picture has none.
        strokes: Share of the random masks that are strokes; the others are boxes.
        whole: Share of the random masks that hide everything, so that the base keeps making pictures from nothing.
        smallest: Least share of a side that a box takes.
        largest: Greatest share of a side that a box takes.
        surroundings: How much the error counts outside the mask.
    """

    name: Literal["inpainting"] = "inpainting"
    masks: Literal["random", "given", "mixed"] = "random"
    strokes: _Share = 0.5
    whole: _Share = 0.1
    smallest: _Finite = Field(default=0.25, gt=0.0, le=1.0)
    largest: _Finite = Field(default=0.9, gt=0.0, le=1.0)
    surroundings: _Share = 0.1
    mask: None = None


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Method = Annotated[
    Finetune | Dreambooth | TextualInversion | Pivotal | Inpainting,
    Field(discriminator="name"),
    BeforeValidator(_named),
]
"""A method by its name alone, or by its name and options."""
