"""asrkit: training recipes that turn real speech into small, fast, streaming speech recognizers."""

__version__ = "0.1.0"
