"""Before any test imports torch."""

import asrkit  # noqa: F401  it may set what torch reads once
