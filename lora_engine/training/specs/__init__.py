"""Training settings by topic. Must not import torch. `training.spec` combines them."""
