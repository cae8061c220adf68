"""Before any test imports torch."""

import os

# Runs in this process and in others are compared bit for bit, so all of them compute with as many threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import asrkit  # noqa: F401  it may set what torch reads once
