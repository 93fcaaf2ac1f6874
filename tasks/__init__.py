"""Combines the engine and the registry: `steps` of pipelines, `operations` on adapters and versions, execution.

Importing the package fills `tasks.step.STEPS`.
"""

import tasks.steps  # noqa: F401 (registers the steps)
