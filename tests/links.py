#!/usr/bin/env python3
"""Checks that every relative link in the *.md files has a target file, and every anchor a heading."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^ {0,3}(```|~~~).*?^ {0,3}\1[^\n]*$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\[[^\]]+\]:\s*<?([^\s>]+)", re.MULTILINE)
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)


def main() -> int:
    files = markdown_files()
    broken = [line for file in files for line in broken_links(file)]
    print("\n".join(broken) or f"{len(files)} files: all links are valid")
    return 1 if broken else 0


def markdown_files() -> list[Path]:
    """The files that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )
    files = {ROOT / name for name in listed.stdout.split("\0") if name}
    return sorted(file for file in files if file.is_file())


def broken_links(file: Path) -> list[str]:
    text = blank(INLINE_CODE, blank(FENCE, file.read_text(encoding="utf-8")))
    broken = []
    for match in LINK.finditer(text):
        link = match.group(1) or match.group(2)
        why = link_error(file, link)
        if why:
            line = text.count("\n", 0, match.start()) + 1
            broken.append(f"{file.relative_to(ROOT)}:{line}: {link}: {why}")
    return broken


def link_error(file: Path, link: str) -> str | None:
    if re.match(r"[a-z][a-z0-9+.-]*:", link, re.IGNORECASE):
        return None
    path, _, anchor = unquote(link).partition("#")
    target = (file.parent / path).resolve() if path else file
    if not target.is_relative_to(ROOT):
        return "is outside the repository"
    if not target.exists():
        return "no such file"
    if anchor and target.suffix == ".md" and anchor not in anchors(target):
        return "no such heading"
    return None


def anchors(file: Path) -> set[str]:
    """The anchors GitHub generates for headings; a repeated one gets a number."""
    found: set[str] = set()
    for heading in HEADING.findall(blank(FENCE, file.read_text(encoding="utf-8"))):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        base = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        anchor, number = base, 0
        while anchor in found:
            number += 1
            anchor = f"{base}-{number}"
        found.add(anchor)
    return found


def blank(pattern: re.Pattern[str], text: str) -> str:
    """Removes all matches and keeps the line numbers."""
    return pattern.sub(lambda match: "\n" * match.group(0).count("\n"), text)


if __name__ == "__main__":
    sys.exit(main())
