"""Check the workspace's architecture rules from the command line: one line per violation, exit status 1 if any."""

import sys
from pathlib import Path

from architecture import check


def main() -> int:
    """Check the workspace that holds this file, or the folder given as argument."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    violations = check(root)
    for violation in violations:
        print(violation)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
