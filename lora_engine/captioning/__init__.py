"""Captions images with models: vision-language models of transformers, and taggers.

`source` finds a model on this machine or the hub, `vlm_families` is the table of supported models, `vlm` and `tagger`
run them, and `describe` captions datasets; the options are in `lora_engine.data.captioner_options`.
"""
