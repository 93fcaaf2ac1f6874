"""Module names of diffusion transformers in files, whose original layers fuse several modules.

The families hold the names. `fused` splits and fuses rows, `dit` does so for a family, `names` is the interface for
codecs.
"""

from lora_engine.formats.transformers import fused_kinds as fused_kinds  # registers its rules
from lora_engine.formats.transformers import fused_lokr as fused_lokr
