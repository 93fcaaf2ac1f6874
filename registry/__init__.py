"""The registry: the truth about versions of adapters.

Bytes by their digest (`store`), who was made from what (`lineage`), names, numbers and aliases (`versions`), who
gets them and why (`promotion`), and whether all of it still agrees (`audit`). It knows no tensors and no workflow
engine; MLflow is brought level with it and its types never leave `registry.mirror`. Importing this package is cheap.
"""
