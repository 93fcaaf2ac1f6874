"""The engine: adapters, formats, bases, training, merging, evaluation, inference.

Usable alone as a library. It sees paths and specs; it knows no Prefect, no MLflow and no registry. Importing this
package is cheap on purpose: nothing here imports torch, so command lines and specs stay fast.
"""

import os

# Has to stand before the first import of torch. By default, threads of OpenMP that wait for each other keep their core
# busy: with one other program at work on two cores, a forward pass took 28 s instead of 1.1 s. On an idle machine the
# difference is within the noise.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
