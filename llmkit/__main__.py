"""``python -m llmkit`` is the ``llmkit`` command."""

import sys

from llmkit.main import main

sys.exit(main())
