"""Make the corpus of this folder from the Debian packages that README.md names.

    python make_corpus.py PACKAGES OUTPUT

PACKAGES is a folder with the downloaded package files; needs `dpkg-deb`. The same packages give
the same bytes.
"""

import argparse
import bz2
import gzip
import json
import re
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

Document = tuple[str, str]  # text, source

# Shorter ones are title pages, lists of links and empty modules.
MIN_CHARACTERS = 500

# The standard library's modules and packages that are under the PSF license alone.
PYTHON_MODULES = (
    *("asyncio", "concurrent", "importlib", "json", "argparse", "ast", "bisect", "calendar"),
    *("contextlib", "copy", "csv", "dataclasses", "enum", "fractions", "functools", "heapq"),
    *("operator", "pathlib", "queue", "random", "shutil", "statistics", "string", "tempfile"),
    *("textwrap", "threading", "timeit", "types"),
)
# Chapters of the PostgreSQL manual that are prose rather than tables of names.
MANUAL_CHAPTERS = (
    *("tutorial", "sql-syntax", "ddl", "dml", "queries", "typeconv", "indexes", "textsearch"),
    *("mvcc", "performance", "planner", "parallel", "backup", "wal", "monitoring", "routine"),
    *("rules", "plpgsql", "trigger", "extend", "xfunc", "storage", "high", "warm", "logical"),
    *("manage", "role", "datatype"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for package in sorted(args.packages.iterdir()):
            if package.suffix == ".deb":
                subprocess.run(["dpkg-deb", "-x", package, root], check=True)
            elif ".orig.tar" in package.name:
                with tarfile.open(package) as tar:
                    tar.extractall(root, filter="data")
        for name, documents in (
            ("book", book(root / "janeaustenr/data")),
            ("code", code(root / "usr/lib/python3.11")),
            ("reference", reference(root / "usr/share/doc/postgresql-doc-15/html")),
            ("dictionary", dictionary(root / "usr/share/dictd/jargon.dict.dz")),
        ):
            write(args.output / f"{name}.jsonl.gz", documents)


def write(path: Path, documents: Iterator[Document]) -> None:
    count = size = 0
    # No name and no time in the gzip header, so that the bytes depend on the text alone.
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as out:
        for text, source in documents:
            if len(text) < MIN_CHARACTERS:
                continue
            line = json.dumps({"text": text, "source": source}, ensure_ascii=False)
            out.write(line.encode() + b"\n")
            count += 1
            size += len(text.encode())
    print(f"{path.name}: {count} documents, {size / 1e6:.2f} MB of text")


def book(folder: Path) -> Iterator[Document]:
    """Chapters of two novels."""
    for name, title in (("prideprejudice", "Pride and Prejudice"), ("persuasion", "Persuasion")):
        text = "\n".join(r_strings(folder / f"{name}.rda"))
        for chapter in re.split(r"\n(?=Chapter \d+\n)", text):
            yield chapter.strip() + "\n", f"Jane Austen, {title}"


def code(library: Path) -> Iterator[Document]:
    """Modules of Python's standard library."""
    for module in PYTHON_MODULES:
        path = library / module
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
            yield file.read_text("utf-8"), f"Python 3.11, {file.relative_to(library)}"


def reference(folder: Path) -> Iterator[Document]:
    """Sections of the PostgreSQL manual."""
    for chapter in MANUAL_CHAPTERS:
        for file in sorted(folder.glob(f"{chapter}*.html")):
            page = ManualPage()
            page.feed(file.read_text("utf-8"))
            yield page.text(), f"PostgreSQL 15 documentation, {file.name}"


def dictionary(path: Path) -> Iterator[Document]:
    """Runs of entries, each of about 8,000 characters."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    # An entry begins at the left margin after an empty line; the file's own header comes first.
    entries = re.split(r"\n+(?=\S)", text[text.index("\n(TM)\n") + 1 :])
    group: list[str] = []
    for entry in entries:
        group.append(entry.strip())
        if sum(map(len, group)) > 8000:
            yield "\n\n".join(group) + "\n", "The Jargon File 4.4.7"
            group = []
    if group:
        yield "\n\n".join(group) + "\n", "The Jargon File 4.4.7"


def r_strings(path: Path) -> Iterator[str]:
    """The strings of an R data file (binary XDR, bzip2) that holds one vector of strings."""
    data = bz2.decompress(path.read_bytes())
    offset = len(b"RDX2\nX\n") + 3 * 4 + 2 * 4  # versions; flags of the list and of its name
    _, size = struct.unpack_from(">ii", data, offset)
    offset += 8 + size  # the name
    flags, count = struct.unpack_from(">ii", data, offset)
    if flags & 0xFF != 16:
        raise ValueError(f"{path}: a vector of strings is wanted, not R type {flags & 0xFF}")
    offset += 8
    for _ in range(count):
        _, size = struct.unpack_from(">ii", data, offset)
        yield data[offset + 8 : offset + 8 + size].decode("utf-8")
        offset += 8 + size


class ManualPage(HTMLParser):
    """The text of one page: paragraphs, code as it stands, a table row a line; no navigation."""

    BLOCKS = frozenset(
        [
            *("p", "div", "h1", "h2", "h3", "h4", "h5", "li", "dt", "dd", "tr", "table"),
            *("pre", "ul", "ol", "dl", "hr", "br"),
        ]
    )
    LEFT_OUT = frozenset({"navheader", "navfooter", "toc"})

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[str] = []
        self._pre = self._skip = 0

    def text(self) -> str:
        # A form feed stands for a paragraph's end until the spaces around it are gone.
        text = re.sub(r"[ \n]*\f[ \n\f]*", "\n\n", "".join(self._parts))
        return text.strip() + "\n"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skip or tag in ("head", "script"):
            self._skip += tag in ("div", "head", "script")
        elif tag == "div" and dict(attrs).get("class") in self.LEFT_OUT:
            self._skip = 1
        elif tag in ("td", "th"):
            self._parts.append("  ")
        elif tag in self.BLOCKS:
            self._parts.append("\n" if tag in ("tr", "br") else "\f")
            self._pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._skip:
            self._skip -= tag in ("div", "head", "script")
        elif tag in self.BLOCKS - {"hr", "br"}:
            self._parts.append("" if tag == "tr" else "\f")
            self._pre -= tag == "pre"

    def handle_data(self, data: str) -> None:
        if not self._skip:
            data = data.replace("\xa0", " ")
            self._parts.append(data if self._pre else re.sub(r"\s+", " ", data))


if __name__ == "__main__":
    main()
