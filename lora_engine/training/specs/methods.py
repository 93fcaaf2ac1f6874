"""Settings that training methods share. Torch-free; each method declares its own options in `training.methods`.

In a pipeline file: `method: pivotal`, or with options `method: {name: pivotal, inversion: 0.3}`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

Prompt = Annotated[str, Field(min_length=1, max_length=2000)]
_Weight = Annotated[float, Field(allow_inf_nan=False, ge=0.0, le=1000.0)]
Share = Annotated[float, Field(allow_inf_nan=False, ge=0.0, le=1.0)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prior(_Settings):
    """Prior preservation (Ruiz et al. 2023, eq. 2): also trains on images of the class.

    Class images come from the step's `class_dataset` (regularization images with captions; `prompt` fills missing
    ones). Without one, the base draws them.

    Attributes:
        prompt: Prompt of the class images, or several prompts used in turn; None is "a <class word>".
        count: Number of class images drawn.
        weight: Weight of their loss; the loss of the user's images has weight 1.
        steps: Sampler steps per class image.
        guidance: Classifier-free guidance of the sampler.
        batches: `joint` adds as many class images to each batch. `alternating` makes every second batch one of class
            images only, which halves the memory and the steps that see the user's images.
    """

    prompt: Prompt | Annotated[tuple[Prompt, ...], Field(min_length=1, max_length=1000)] | None = None
    count: int = Field(default=32, ge=1, le=10_000)
    weight: _Weight = 1.0
    steps: int = Field(default=12, ge=1, le=1000)
    guidance: FiniteFloat = Field(default=3.0, ge=0.0, le=50.0)
    batches: Literal["joint", "alternating"] = "joint"


class Preservation(_Settings):
    """Differential output preservation: on class captions the adapted network is trained to match the base.

    Each noisy image is evaluated again with a class caption. The base, at multiplier 0, is the teacher.

    Attributes:
        weight: Weight of the mean squared error to the teacher; the loss of the user's images has weight 1.
        prompt: The class caption; None is the image's own with the trigger replaced by the class word.
    """

    weight: _Weight = 1.0
    prompt: Prompt | None = None


class Mask(_Settings):
    """Masked loss: each element of the error is weighted by (m + floor)^temperature, m its mean mask value.

    Attributes:
        temperature: Above 1, half-covered elements count less; below 1, more.
        floor: Added to the mask, so that the surroundings count a little; 0 ignores them.
        normalise: Divides the weights by their mean, so that a small subject counts as much as a large one.
    """

    temperature: FiniteFloat = Field(default=1.0, gt=0.0, le=16.0)
    floor: Share = 0.0
    normalise: bool = False


class Identity(_Settings):
    """Identity preservation: pulls the embedding of the decoded prediction towards that of the user's images.

    The embedder is the step's `embedder` (a local folder of any image model that transformers can load), or the
    embedded CLIP.

    Attributes:
        weight: Weight of 1 - cosine similarity, beside the denoising loss.
        until: Share of the schedule, from the noise-free end, in which the term applies. With more noise the prediction
            shows nothing recognizable.
        crop: Share of the image's sides that is compared, around its center.
    """

    weight: _Weight = 0.1
    until: Share = 0.3
    crop: FiniteFloat = Field(default=1.0, gt=0.0, le=1.0)


class MethodSpec(_Settings):
    """Options that every method has beside its own.

    Attributes:
        name: Name of the method.
        mask: Weights the loss by the images' masks; an image without a mask counts fully. None ignores masks.
        preservation: Preserves the base's output on class captions; None does not.
        identity: Preserves the identity shown in the user's images; None does not.

    Properties of the method:
        takes_prior: True if it can train on class images (`prior`).
        uses_class_images: True if it does so unless `prior` says otherwise.
        has_adapter: True if it trains an adapter; False if it only learns a token.
        hides_parts: True if it hides parts of the images; only such methods train an inpainting base.
    """

    takes_prior: ClassVar[bool] = True
    uses_class_images: ClassVar[bool] = False
    has_adapter: ClassVar[bool] = True
    hides_parts: ClassVar[bool] = False

    name: str
    mask: Mask | None = None
    preservation: Preservation | None = None
    identity: Identity | None = None

    def phase_steps(self, steps: int) -> dict[str, int]:
        """Returns the steps of each phase by name, in order, for so many steps in total."""
        return {self.name: steps}


class TokenSettings(_Settings):
    """A learned token: vectors of the text encoders' input embedding (Gal et al. 2022).

    Attributes:
        token: The token; None is the dataset's trigger.
        vectors: Number of vectors of the token; each takes one position of the text.
        initialiser: Text whose token embeddings initialize the vectors, in turn; None is the dataset's class word.
            Without either, the vectors are random with the encoder's mean and deviation.
        word_rate: Highest learning rate of the vectors.
        norm_decay: Strength of the pull of the vectors' norms to `norm`: e <- e/|e| (|e| + r (norm - |e|)) after each
            step, r the step's rate times this, at most 1 (as cloneofsimo's lora_pti); 0 disables it.
        norm: Target norm; None is the mean norm of the encoder's embeddings, 0.4 suits CLIP ViT-L.
    """

    token: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    vectors: int = Field(default=1, ge=1, le=64)
    initialiser: Prompt | None = None
    word_rate: FiniteFloat = Field(default=5e-3, gt=0.0)
    norm_decay: FiniteFloat = Field(default=100.0, ge=0.0)
    norm: FiniteFloat | None = Field(default=None, gt=0.0)
