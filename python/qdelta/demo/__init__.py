"""The demo model: a trained toy of 4 million parameters that travels with the package.

`NOTICE.md` beside this file says what it is, what it was trained on, and under which licences.
"""

from pathlib import Path


def path() -> Path:
    """The folder of the demo checkpoint."""
    return Path(__file__).parent
