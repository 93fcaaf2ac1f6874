"""The engine: adapters, formats, bases, training, merging, evaluation, inference.

Usable alone as a library. It sees paths and specs; it knows no Prefect, no MLflow and no registry. Importing this
package is cheap on purpose: nothing here imports torch, so command lines and specs stay fast.
"""
