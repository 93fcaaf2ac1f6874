import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "laws"), str(Path(__file__).parent)]
from forked_readers import forked_readers  # noqa: E402, F401 (the path is set above)
