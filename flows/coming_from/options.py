"""The options of other trainers and their settings here: one table, for errors, `init --from` and docs/coming-from.md.

Names of ai-toolkit and OneTrainer are paths into their files. Several names in a cell are alternatives.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

TRAINERS = {"sd": "sd-scripts", "diffusers": "diffusers", "aitk": "ai-toolkit", "ot": "OneTrainer"}
"""Column -> name of the trainer."""


@dataclass(frozen=True)
class Option:
    """One setting and its names in other trainers.

    Attributes:
        ours: `step.setting` in a pipeline file; empty if there is no such setting.
        sd: Names in kohya's sd-scripts (and its GUI), separated by spaces.
        diffusers: Names in diffusers' training scripts.
        aitk: Paths in a process of an ai-toolkit file.
        ot: Paths in a OneTrainer file.
        note: What differs in meaning, or why there is no such setting.
    """

    ours: str
    sd: str = ""
    diffusers: str = ""
    aitk: str = ""
    ot: str = ""
    note: str = ""

    def names(self, trainer: str) -> tuple[str, ...]:
        """Returns the names in a trainer, a key of `TRAINERS`."""
        return tuple(getattr(self, trainer).split())

    def hint(self, uses: str) -> str:
        """Returns the fix for a user who wrote another trainer's name in a step of that kind."""
        step, _, setting = self.ours.partition(".")
        if not step:
            return self.note
        place = "" if step == uses else " at the top of the file" if step == "file" else f" of the step `{step}`"
        return f"use `{setting}`{place}" + (f" ({self.note})" if self.note else "")


_CACHED = "automatic: latents and texts are cached on disk"
_MISSING = "not available"

OPTIONS: tuple[Option, ...] = (
    # The base and the output.
    Option("file.base", "pretrained_model_name_or_path", "pretrained_model_name_or_path", "model.name_or_path",
           "base_model_name"),
    Option("", "v2 sdxl flux1_checkbox sd3_checkbox LoRA_type model_prediction_type", "", "model.arch "
           "model.is_flux model.is_xl model.is_v2 model.is_v3 model.is_pixart train.noise_scheduler",
           "model_type", "automatic: the base's own files say what it is"),
    Option("file.vae", "vae", "pretrained_vae_model_name_or_path vae_path", "model.vae_path", "vae.model_name",
           "a folder in diffusers' layout, or a hub id; not a single file"),
    Option("", "clip_l clip_g t5xxl ae", "", "", "", "not available: a base is one folder or one file"),
    Option("", "", "revision variant", "", "", "write the revision into base: owner/name@revision"),
    Option("file.name", "output_name", "", "name", "save_filename_prefix",
           "letters become lower case; the registry counts versions"),
    Option("", "output_dir", "output_dir", "training_folder", "output_model_destination workspace_dir",
           "automatic: the registry keeps versions; `loraline export` writes files"),
    Option("file.seed", "seed", "seed", "train.seed", "", "always fixed here; without one, sd-scripts and diffusers "
           "draw another seed each time"),
    # The images.
    Option("ingest.images", "train_data_dir image_dir", "instance_data_dir train_data_dir", "datasets.folder_path",
           "concepts.path", "several become datasets of `combine`"),
    Option("", "", "", "", "concept_file_name", "not available: give the folder of images with --images"),
    Option("ingest.repeats", "num_repeats dataset_repeats", "repeats", "datasets.num_repeats", "concepts.balancing",
           "folder names such as 10_name count with repeats: folders only"),
    Option("", "in_json metadata_file", "dataset_name dataset_config_name image_column caption_column", "", "",
           "put the file into the folder of images: metadata.jsonl, meta_*.json and tables there are read"),
    Option("", "caption_extension caption_extention", "", "datasets.caption_ext", "",
           "captions are read from .txt and .caption files beside the images"),
    Option("train.class_dataset", "reg_data_dir", "class_data_dir", "", "", "another ingest step, as class_dataset"),
    Option("train.prior", "", "with_prior_preservation", "", ""),
    Option("train.prior.prompt", "", "class_prompt", "", ""),
    Option("train.prior.count", "", "num_class_images", "", ""),
    Option("train.prior.weight", "prior_loss_weight", "prior_loss_weight", "train.reg_weight", "",
           "class images of the same number are in every batch"),
    Option("caption.template", "class_tokens", "instance_prompt", "datasets.default_caption", "",
           "used for images without a caption"),
    Option("caption.trigger", "", "", "trigger_word datasets.trigger_word", "",
           "added to captions that lack it; [trigger] in captions is text here"),
    Option("ingest.heldout", "validation_split", "", "", "", "a share that is never trained on"),
    Option("", "validation_seed max_validation_steps", "", "", "", "automatic: validation noise is fixed by the seed"),
    Option("train.validate_every", "validate_every_n_steps validate_every_n_epochs", "", "",
           "validate_after validate_after_unit validation", "in steps, or epochs such as '2 epochs'"),
    # Sizes.
    Option("preprocess.resolution", "resolution max_resolution", "resolution", "datasets.resolution", "resolution",
           "one size for a run; multiples of 8"),
    Option("preprocess.crop", "enable_bucket", "center_crop", "datasets.buckets", "aspect_ratio_bucketing",
           "bucket, center, salient, random, subject or face"),
    Option("", "random_crop face_crop_aug_range crop_to_face", "random_crop", "datasets.random_crop", "",
           "set preprocess.crop to random or face; images are cropped once, not in every epoch"),
    Option("preprocess.buckets.min_side", "min_bucket_reso", "", "", ""),
    Option("preprocess.buckets.max_side", "max_bucket_reso", "", "", ""),
    Option("preprocess.buckets.step", "bucket_reso_steps", "", "datasets.bucket_tolerance", ""),
    Option("preprocess.buckets.enlarge", "bucket_no_upscale", "", "", "", "1.0 never enlarges"),
    Option("", "resize_interpolation skip_image_resolution", "image_interpolation_mode", "", "",
           "not available: Lanczos is used"),
    Option("train.captions.flip", "flip_aug", "random_flip", "datasets.flip_x", "concepts.image.enable_random_flip"),
    Option("", "", "", "datasets.flip_y", "", _MISSING),
    Option("train.captions.colours", "color_aug", "", "", "", "a fixed number of variants, each encoded once"),
    # Captions.
    Option("train.captions.shuffle", "shuffle_caption", "", "datasets.shuffle_tokens",
           "concepts.text.enable_tag_shuffling"),
    Option("train.captions.keep_tokens", "keep_tokens", "", "datasets.keep_tokens", "concepts.text.keep_tags_count",
           "counts tags, not tokens"),
    Option("train.captions.keep_separator", "keep_tokens_separator", "", "", ""),
    Option("train.captions.secondary_separator", "secondary_separator", "", "", ""),
    Option("train.captions.separator", "caption_separator", "", "", ""),
    Option("train.captions.prefix", "caption_prefix", "", "", "", "added after shuffling, so it always comes first"),
    Option("train.captions.suffix", "caption_suffix", "", "", "", "added after shuffling, so it always comes last"),
    Option("train.captions.wildcards", "enable_wildcard", "", "", "", "{a|b}; sets ingest.several_captions to "
           "draw, too"),
    Option("ingest.several_captions", "", "", "", "concepts.text.prompt_source", "draw: one line of a caption file is "
           "drawn each time; sd-scripts without enable_wildcard reads the first line, which is first"),
    Option("train.caption_dropout", "caption_dropout_rate", "proportion_empty_prompts",
           "datasets.caption_dropout_rate", ""),
    Option("train.captions.dropout_every", "caption_dropout_every_n_epochs", "", "", ""),
    Option("combine.parts.weight", "", "", "datasets.loss_multiplier", "concepts.loss_weight",
           "of one dataset among several"),
    Option("train.captions.tag_dropout", "caption_tag_dropout_rate", "", "datasets.token_dropout_rate", ""),
    Option("train.captions.tag_warmup", "token_warmup_step", "", "", "", "in steps; shares of the run do not apply"),
    Option("train.captions.first_tags", "token_warmup_min", "", "", ""),
    Option("train.captions.weights", "weighted_captions", "", "", ""),
    Option("train.captions.chunks", "max_token_length", "max_sequence_length tokenizer_max_length", "", "",
           "225 tokens are 3 chunks; for CLIP only"),
    Option("train.clip_skip", "clip_skip", "", "", "text_encoder_layer_skip text_encoder_2_layer_skip",
           "counts from 1, the last layer; OneTrainer counts skipped layers, sd-scripts ignores it for SDXL"),
    # The adapter.
    Option("train.kind", "network_module algo", "", "network.type", "peft_type", "lora, loha, lokr, dora, ..."),
    Option("train.kind.factor", "factor", "", "network.lokr_factor", "lokr_decompose_factor", "of lokr"),
    Option("train.kind.tucker", "use_tucker use_cp", "", "", "lokr_use_tucker", "of lora, loha and lokr"),
    Option("train.kind.both", "decompose_both", "", "", "lokr_decompose_both", "of lokr"),
    Option("train.kind.inner", "dora_wd", "use_dora", "", "lora_decompose lokr_weight_decompose", "kind: {name: dora, "
           "inner: lora}"),
    Option("train.rank", "network_dim dim", "rank", "network.linear network.rank", "lora_rank"),
    Option("train.alpha", "network_alpha alpha", "lora_alpha", "network.linear_alpha network.alpha", "lora_alpha",
           "the default is the rank; 1 in sd-scripts, OneTrainer and ai-toolkit"),
    Option("train.overrides", "conv_dim conv_alpha block_dims block_alphas conv_block_dims conv_block_alphas", "",
           "network.conv network.conv_alpha", "", "by pattern, such as \"re:.*conv.*\": {rank: 8}; such layers must be "
           "among the targets, as they are in `all`"),
    Option("train.targets", "network_train_unet_only network_train_text_encoder_only train_t5xxl preset",
           "train_text_encoder lora_layers", "train.train_text_encoder train.train_unet network.network_kwargs",
           "layer_filter layer_filter_preset layer_filter_regex text_encoder.train text_encoder_2.train unet.train "
           "transformer.train",
           "`attention`, `attention+ff`, `linear`, `all`, `text` or patterns"),
    Option("train.dropout", "network_dropout", "lora_dropout", "network.dropout", "dropout_probability",
           "hides parts of the input, as in PEFT"),
    Option("train.rank_dropout", "rank_dropout", "", "network.rank_dropout", ""),
    Option("train.module_dropout", "module_dropout", "", "network.module_dropout", ""),
    Option("train.norm_limit", "scale_weight_norms", "", "", "", "of one module's change, after every step"),
    Option("train.init", "network_weights", "", "network.pretrained_lora_path", "lora_model_name",
           "a file, or name@version; its rank at most"),
    Option("", "dim_from_weights", "", "", "", "not available: set rank to that of init"),
    Option("", "base_weights base_weights_multiplier", "", "", "",
           "run `loraline fuse BASE ADAPTER:WEIGHT -o FOLDER`, and set base to the folder"),
    # Rates.
    Option("train.learning_rate", "learning_rate unet_lr", "learning_rate", "train.lr train.unet_lr",
           "learning_rate unet.learning_rate transformer.learning_rate", "at alpha = rank; see alpha"),
    Option("train.rates.text", "text_encoder_lr text_encoder_lr1 text_encoder_lr2", "text_encoder_lr",
           "train.text_encoder_lr", "text_encoder.learning_rate text_encoder_2.learning_rate",
           "one rate; rates.layers has one per encoder"),
    Option("train.rates.layers", "block_lr down_lr_weight mid_lr_weight up_lr_weight", "", "", "",
           "by pattern, such as unet.mid_block.*: 5e-4"),
    Option("train.rates.up_ratio", "loraplus_lr_ratio loraplus_unet_lr_ratio", "", "", "",
           "LoRA+, for all parts alike"),
    Option("train.rates.optimiser", "optimizer_type optimizer use_8bit_adam use_lion_optimizer",
           "optimizer use_8bit_adam", "train.optimizer", "optimizer.optimizer",
           "`adamw`, `adamw-8bit`, `prodigy`, ..."),
    Option("train.rates.optimiser.betas", "", "adam_beta1 adam_beta2 prodigy_beta3", "", "optimizer.beta1 "
           "optimizer.beta2"),
    Option("train.rates.optimiser.eps", "", "adam_epsilon", "", "optimizer.eps"),
    Option("train.weight_decay", "optimizer_args", "adam_weight_decay prodigy_decouple weight_decay",
           "train.optimizer_params", "optimizer.weight_decay", "decoupled; the default is 0, that of torch's AdamW "
           "0.01. Other arguments are options of rates.optimiser"),
    Option("train.clip", "max_grad_norm", "max_grad_norm", "train.max_grad_norm", "clip_grad_norm"),
    Option("train.schedule", "lr_scheduler lr_scheduler_type", "lr_scheduler", "train.lr_scheduler",
           "learning_rate_scheduler", "the default is `cosine`; in the other trainers it is constant"),
    Option("train.schedule.cycles", "lr_scheduler_num_cycles", "lr_num_cycles", "", "learning_rate_cycles"),
    Option("train.schedule.power", "lr_scheduler_power", "lr_power", "", ""),
    Option("train.schedule.floor", "lr_scheduler_min_lr_ratio", "", "train.lr_scheduler_params",
           "learning_rate_min_factor", "share of the highest rate"),
    Option("train.schedule.timescale", "lr_scheduler_timescale", "", "", ""),
    Option("train.schedule.decay", "lr_decay_steps", "", "", "", "a share of the steps after the warmup, of `wsd`"),
    Option("train.warmup", "lr_warmup_steps lr_warmup", "lr_warmup_steps", "", "learning_rate_warmup_steps",
           "in steps, or a share such as '10%'"),
    Option("train.running.device", "", "", "device", "train_device", "auto, cpu, cuda or mps; auto is the default"),
    Option("", "", "", "type performance_log_every sqlite_db_path", "__version temp_device debug_mode debug_dir",
           "not needed: files of a trainer's own"),
    Option("", "", "scale_lr", "", "learning_rate_scaler", "not available: set the rate for the batch that is used"),
    Option("train.rates.ema", "", "use_ema", "train.ema_config.use_ema", "ema"),
    Option("train.rates.ema.decay", "", "", "train.ema_config.ema_decay", "ema_decay"),
    # Length and devices.
    Option("train.steps", "max_train_steps max_train_epochs epoch", "max_train_steps num_train_epochs epochs",
           "train.steps", "epochs", "a number of steps, or epochs such as '10 epochs'"),
    Option("train.batch", "train_batch_size batch_size", "train_batch_size", "train.batch_size", "batch_size"),
    Option("train.accumulate", "gradient_accumulation_steps", "gradient_accumulation_steps",
           "train.gradient_accumulation_steps train.gradient_accumulation", "gradient_accumulation_steps"),
    Option("train.precision", "mixed_precision full_fp16 full_bf16", "mixed_precision prior_generation_precision",
           "train.dtype model.dtype", "train_dtype weight_dtype", "precision of the frozen base; the adapter is always "
           "trained in fp32"),
    Option("convert.dtype", "save_precision", "", "save.dtype", "output_dtype"),
    Option("train.running.gradient_checkpointing", "gradient_checkpointing", "gradient_checkpointing",
           "train.gradient_checkpointing", "gradient_checkpointing unet.gradient_checkpointing "
           "transformer.gradient_checkpointing"),
    Option("train.running.attention", "xformers sdpa mem_eff_attn", "enable_xformers_memory_efficient_attention",
           "train.xformers train.sdp", "attention_mechanism"),
    Option("train.running.compile", "torch_compile", "", "model.compile", "compile"),
    Option("train.running.quantise", "fp8_base fp8_base_unet", "bnb_quantization_config_path do_fp8_training",
           "model.quantize model.qtype", "unet.weight_dtype transformer.weight_dtype", "fp8, 8bit or 4bit"),
    Option("", "", "", "model.quantize_te model.qtype_te", "text_encoder.weight_dtype text_encoder_2.weight_dtype "
           "vae.weight_dtype text_encoder.offload_fraction text_encoder_2.offload_fraction",
           "automatic: results of text encoders and autoencoder are cached, in the precision of the base"),
    Option("train.running.offload", "blocks_to_swap double_blocks_to_swap single_blocks_to_swap", "", "",
           "layer_offload_fraction unet.offload_fraction transformer.offload_fraction",
           "a share of the layers, from 0 to 1, not a number of blocks"),
    Option("", "lowram highvram cpu_offload_checkpointing", "offload", "model.low_vram", "", _MISSING),
    Option("train.running.processes", "num_processes multi_gpu", "", "", "multi_gpu", "batch is that of all processes"),
    Option("", "max_data_loader_n_workers persistent_data_loader_workers ddp_timeout", "dataloader_num_workers "
           "allow_tf32 local_rank set_grads_to_none", "", "caching_threads dataloader_threads",
           "not needed: batches come from the cache"),
    Option("", "cache_latents cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk "
           "vae_batch_size no_half_vae cache_info skip_cache_check", "cache_latents cache_dir",
           "datasets.cache_latents datasets.cache_latents_to_disk train.cache_text_embeddings",
           "image_caching text_caching latent_caching cache_dir clear_cache_before_training", _CACHED),
    Option("train.method", "", "method", "", "training_method", "finetune, dreambooth, pivotal, textual-inversion"),
    # The objective.
    Option("train.objective.weighting", "debiased_estimation_loss", "", "", "loss_weight_fn"),
    Option("train.objective.weighting.gamma", "min_snr_gamma", "snr_gamma", "train.min_snr_gamma train.snr_gamma",
           "loss_weight_strength", "of weighting min_snr"),
    Option("train.objective.loss", "loss_type", "loss_type", "train.loss_type", "mse_strength mae_strength "
           "huber_strength", "l2, l1, huber or smooth_l1"),
    Option("train.objective.loss.delta", "huber_c huber_scale", "huber_c", "", "huber_delta",
           "of Huber's function; sd-scripts and diffusers use the smooth pseudo-Huber"),
    Option("train.objective.loss.schedule", "huber_schedule", "huber_schedule", "", "", "the default is constant; in "
           "sd-scripts and diffusers it is snr"),
    Option("train.objective.noise_offset", "noise_offset", "noise_offset", "train.noise_offset",
           "offset_noise_weight"),
    Option("train.objective.random_offset", "noise_offset_random_strength", "", "", "",
           "drawn for each image, not for each batch"),
    Option("", "adaptive_noise_scale noise_offset_type", "", "", "generalized_offset_noise", _MISSING),
    Option("train.objective.pyramid.levels", "multires_noise_iterations", "", "train.pyramid_noise", ""),
    Option("train.objective.pyramid.discount", "multires_noise_discount", "", "", ""),
    Option("train.objective.input_perturbation", "ip_noise_gamma", "input_perturbation", "",
           "perturbation_noise_weight"),
    Option("train.objective.random_perturbation", "ip_noise_gamma_random_strength", "", "", "",
           "drawn for each image, not for each batch"),
    Option("train.objective.timesteps.low", "min_timestep", "", "train.min_denoising_steps", "min_noising_strength",
           "share of noise from 0 to 1: sd-scripts' number / 1000"),
    Option("train.objective.timesteps.high", "max_timestep", "", "train.max_denoising_steps", "max_noising_strength",
           "share of noise from 0 to 1: sd-scripts' number / 1000"),
    Option("train.objective.timesteps.distribution", "timestep_sampling sigmoid_scale weighting_scheme logit_mean "
           "logit_std mode_scale", "weighting_scheme logit_mean logit_std mode_scale timestep_bias_strategy",
           "train.timestep_type train.content_or_style", "timestep_distribution noising_weight noising_bias",
           "uniform, logit_normal or mode"),
    Option("train.objective.timesteps.shift", "discrete_flow_shift training_shift", "", "",
           "timestep_shift dynamic_timestep_shifting", "the default is the base's own; in sd-scripts it is 3 for "
           "FLUX.1 and 1 for SD 3"),
    Option("train.prediction", "v_parameterization v_pred", "prediction_type", "model.is_v_pred",
           "force_v_prediction force_epsilon_prediction", "the default is what the base's scheduler says"),
    Option("train.zero_terminal_snr", "zero_terminal_snr", "rescale_betas_zero_snr", "",
           "rescale_noise_scheduler_to_zero_terminal_snr", "for bases that predict v"),
    Option("", "scale_v_pred_loss_like_noise_pred v_pred_like_loss", "", "", "", _MISSING),
    Option("train.method.mask", "masked_loss conditioning_data_dir", "", "datasets.mask_path", "masked_training",
           "masks are name.mask.png, or in a folder that ingest.masks names; white counts"),
    Option("train.method.mask.floor", "", "", "datasets.mask_min_value", "unmasked_weight"),
    Option("ingest.alpha", "alpha_mask", "", "datasets.alpha_mask", "", "mask"),
    Option("train.method.mask.normalise", "", "", "", "normalize_masked_area_loss"),
    Option("train.method.preservation", "", "", "train.diff_output_preservation", "",
           "on images of the user, with class captions"),
    # Saving, samples, logs.
    Option("train.checkpoint_every", "save_state", "checkpointing_steps", "", "backup_after",
           "checkpoints are for resuming only"),
    Option("train.save_every", "save_every_n_steps save_every_n_epochs", "", "save.save_every",
           "save_every save_every_unit", "in steps, or epochs such as '2 epochs'"),
    Option("", "save_last_n_steps save_last_n_epochs save_n_epoch_ratio", "",
           "save.max_step_saves_to_keep", "", "not available: all saved adapters are kept"),
    Option("", "resume save_state_on_train_end", "resume_from_checkpoint checkpoints_total_limit", "",
           "continue_last_backup", "automatic: run the same command again"),
    Option("train.samples.every", "sample_every_n_steps sample_every_n_epochs", "validation_steps validation_epochs",
           "sample.sample_every", "sample_after sample_after_unit", "in steps, or epochs such as '2 epochs'"),
    Option("train.samples.prompts", "sample_prompts sample_sampler", "validation_prompt validation_prompts",
           "sample.prompts sample.samples sample.width sample.height sample.neg sample.sampler",
           "samples sample_definition_file_name",
           "options such as --w 512 --n blurry --ss euler_a can follow a prompt"),
    Option("train.samples.seeds", "", "num_validation_images", "sample.seed sample.walk_seed", "",
           "one image for each seed"),
    Option("train.samples.steps", "", "", "sample.sample_steps", ""),
    Option("train.samples.guidance", "", "guidance_scale", "sample.guidance_scale", ""),
    Option("", "sample_at_first", "", "sample.sample_start_step", "sample_skip_first",
           "automatic: samples begin before the first step"),
    Option("", "logging_dir log_with log_prefix wandb_run_name log_config", "logging_dir report_to",
           "logging.log_every", "tensorboard", "automatic: MLflow has the curves"),
    Option("", "save_model_as no_metadata", "", "", "output_model_format", "files are safetensors, with metadata; "
           "`convert` writes other formats"),
    Option("", "huggingface_repo_id huggingface_token", "push_to_hub hub_model_id hub_token", "save.push_to_hub "
           "save.hf_repo_id", "", "not available: publish an exported file yourself"),
)  # fmt: skip


@functools.cache
def _by_name() -> dict[str, Option]:
    """Returns the option of each name, and of the last part of each path; the first one that has it."""
    options: dict[str, Option] = {}
    for take_last in (False, True):
        for option in OPTIONS:
            for trainer in TRAINERS:
                for name in option.names(trainer):
                    options.setdefault(name.rpartition(".")[2] if take_last else name, option)
    return options


def find_option(name: str) -> Option | None:
    """Returns the option with a name such as `network_dim`, `--network-dim` or `train.lr`; None if there is none."""
    return _by_name().get(name.lstrip("-").replace("-", "_"))


@functools.cache
def options_of(trainer: str) -> dict[str, Option]:
    """Returns the options of a trainer, a key of `TRAINERS`, by name."""
    return {name: option for option in reversed(OPTIONS) for name in option.names(trainer)}
