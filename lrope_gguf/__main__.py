"""``python -m lrope_gguf``: the same as the ``lrope-gguf`` command."""

import sys

from lrope_gguf.cli import main

sys.exit(main())
