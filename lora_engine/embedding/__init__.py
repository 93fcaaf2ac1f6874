"""Embeds images and texts as vectors: CLIP, SigLIP, DINO and models like them."""
