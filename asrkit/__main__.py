"""``python -m asrkit`` is the same as the ``asrkit`` command."""

from asrkit.cli import main

main()
