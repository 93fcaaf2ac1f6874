"""Literal table of tensors in original checkpoints that no component of a diffusers folder needs."""

from __future__ import annotations

import fnmatch
import functools
import re

# Name pattern to description. A tensor that is neither a weight nor listed here is unknown.
UNUSED = {
    "*.position_ids": "a table that the code computes",
    "*.attn_mask": "a table that the code computes",
    "betas": "noise schedule",
    "alphas_cumprod": "noise schedule",
    "alphas_cumprod_prev": "noise schedule",
    "sqrt_alphas_cumprod": "noise schedule",
    "sqrt_one_minus_alphas_cumprod": "noise schedule",
    "log_one_minus_alphas_cumprod": "noise schedule",
    "sqrt_recip_alphas_cumprod": "noise schedule",
    "sqrt_recipm1_alphas_cumprod": "noise schedule",
    "posterior_variance": "noise schedule",
    "posterior_log_variance_clipped": "noise schedule",
    "posterior_mean_coef1": "noise schedule",
    "posterior_mean_coef2": "noise schedule",
    "lvlb_weights": "noise schedule",
    "logvar": "noise schedule",
    "denoiser.sigmas": "noise schedule",
    "scale_factor": "factor of the latents, as a tensor",
    "v_pred": "marker of a model that predicts the velocity",
    "ztsnr": "marker of a schedule that ends in pure noise",
    "model_ema.*": "running averages of the U-Net",
    "first_stage_model.loss.*": "training loss of the autoencoder",
    "cond_stage_model.logit_scale": "temperature of CLIP",
    "cond_stage_model.text_projection": "projection of CLIP, unused by the U-Net",
    "cond_stage_model.transformer.logit_scale": "temperature of CLIP",
    "cond_stage_model.transformer.text_projection.weight": "projection of CLIP, unused by the U-Net",
    "cond_stage_model.transformer.visual_projection.weight": "image encoder of CLIP",
    "cond_stage_model.transformer.vision_model.*": "image encoder of CLIP",
    "cond_stage_model.model.logit_scale": "temperature of OpenCLIP",
    "cond_stage_model.model.text_projection": "projection of OpenCLIP, unused by the U-Net",
    "cond_stage_model.model.transformer.resblocks.23.*": "last layer of OpenCLIP, unused by the U-Net",
    "conditioner.embedders.0.logit_scale": "temperature of CLIP",
    "conditioner.embedders.0.text_projection": "projection of CLIP, unused by the U-Net",
    "conditioner.embedders.0.transformer.logit_scale": "temperature of CLIP",
    "conditioner.embedders.0.transformer.text_projection.weight": "projection of CLIP, unused by the U-Net",
    "conditioner.embedders.1.model.logit_scale": "temperature of OpenCLIP",
    "text_encoders.*.logit_scale": "temperature of CLIP",
    "text_encoders.*.transformer.text_projection.weight": "projection of CLIP, unused by the transformer",
}


def reason_unused(name: str) -> str | None:
    """Returns the description of an unneeded tensor; None if it is unknown."""
    for pattern, reason in _patterns():
        if pattern.fullmatch(name):
            return reason
    return None


@functools.cache
def _patterns() -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(fnmatch.translate(pattern)), reason) for pattern, reason in UNUSED.items())
