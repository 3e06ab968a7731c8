"""Rewrites the golden files, after a change that is meant to change results::

    python -m tests.golden            # all of them
    python -m tests.golden dtop_p     # some

What changed is printed; say in the commit why it had to. Written are the files of this kind of
processor; those of other kinds have to be written on such machines, or removed.
"""

import sys
import tempfile
from pathlib import Path

from tests.golden import runs


def main() -> None:
    names = sys.argv[1:] or list(runs.FLAGS)
    for name in names:
        if name not in runs.FLAGS:
            sys.exit(f"there is no golden run {name!r}; there are {', '.join(runs.FLAGS)}.")
    with tempfile.TemporaryDirectory() as directory:
        found = runs.train(Path(directory), names)
    for name in names:
        change: str | None = "new"
        processor = found[name]["made_with"]["processor"]
        if runs.path_of(name, processor).exists():
            change = runs.first_difference(runs.read(name, processor), found[name], exact=True)
        runs.write(name, found[name])
        print(f"{name}: {change or 'the same as before'}")


if __name__ == "__main__":
    main()
