"""Studies of what a run learned when: one a file, each `python -m studies.NAME`."""

import sys
from importlib.util import find_spec

# Python sets argv[0] to "-m" while it looks for the module of a command. Who imports a study gets an ImportError.
if sys.argv[:1] == ["-m"] and (missing := [n for n in ("pyarrow", "scipy", "matplotlib") if find_spec(n) is None]):
    sys.exit(f"error: studies need {', '.join(missing)}: pip install -e '.[studies]'")
