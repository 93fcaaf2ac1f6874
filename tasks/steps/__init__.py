"""Defines the pipeline steps, one file each; `tasks.step.STEPS` finds them.

A step reads folders and its spec and writes one folder; loops and maths are in the engine. To add a step, add a file
here with a spec and a function under `@step`.
"""
