#!/usr/bin/env python3
"""Checks the prose of the repository: Markdown outside code, and comments in Rust, C, Go, SQL and WIT.

Prints for each area the words, the counts per 1,000 words and the lines over 100 columns, then the
long lines and the retired words. CONTRIBUTING.md has the limits. The exit code is 1 if the
repository exceeds one.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 100
# The most occurrences per 1,000 words, and the patterns that count.
LIMITS = {"what": 2.0, "nobody": 0.1}
COUNTED = {
    "what": r"\bwhat\b",
    "nobody": r"\b(no|some|every|any)body\b|\bwho(so)?ever\b|\bwhatever\b",
}
# Words that docs/glossary.md replaced by the field's. `dead letter`, `foreign key` and so on stay.
RETIRED = [
    r"(?<!dead\s)(?<!dead-)(?<!case\s)(?<!ASCII\s)(?<!capital\s)letters?(?!,?\s+(and\s+)?digits)",
    r"bur(y|ied|ies|ials?)", r"stor(y|ies)", r"houses?", r"heart", r"parcels?", r"twins?",
    r"rooms?(?!\s+(for|to|in|left)\b)", r"(?<!ack\s)(?<!version\s)floors?", r"desks?", r"lent",
    r"batch\s+members?", r"members?\s+(of|in)\s+(a|the|its)\s+batch", r"paces?", r"tapes?",
    r"careful\s+(mode|run|round)s?", r"g(ive|ives|ave|iven|iving)(\s+(it|them))?\s+back",
    r"put(s|ting)?(\s+(it|them))?\s+back", r"set(s|ting)?(\s+(it|them))?[\s-]aside",
    r"t(ake|akes|ook|aken|aking)(\s+(it|them))?\s+(back|up)", r"wait(s|ed|ing)?\s+behind",
    r"relay'?s?\s+ledger", r"sweep\w*", r"swept", r"unfinished", r"asked\s+and\s+saw",
    r"rehears\w+", r"insist\w*", r"wall(s|ed)?(?![\s-](clock|time)\b)", r"gates?",
    r"doors?", r"starv\w+", r"t(ell|ells|old|elling)", r"hear(s|d|ing)?", r"proved[\s-]poison",
    r"look(s|ed|ing)?(?!(\s+(it|them))?\s+(up|like)\b)", r"depart(s|ed|ures?)?", r"noted",
    r"foreign(?![\s-]+(keys?|data|exceptions?)\b)", r"(cache|tag|database|broker)\s+marks?",
    r"(database|server)'s\s+log", r"became\s+of", r"for\s+good", r"to\s+be\s+had",
]
RETIRED_WORD = re.compile("|".join(rf"\b{word}\b" for word in RETIRED), re.IGNORECASE)
COMMENT = {
    ".rs": re.compile(r"^\s*//[/!]?|(?<=[;,{}()\]])\s+//(?=\s)"),
    ".sql": re.compile(r"^\s*--+|(?<=\S)\s+--(?=\s)"),
    ".wit": re.compile(r"^\s*///?"),
    ".c": re.compile(r"^\s*//|(?<=[;,{}()\]])\s+//(?=\s)"),
    ".go": re.compile(r"^\s*//|(?<=[;,{}()\]])\s+//(?=\s)"),
    ".h": re.compile(r"^\s*//|(?<=[;,{}()\]])\s+//(?=\s)"),
}
# Not prose: inline code, which may wrap, targets of links, and HTML comments.
CODE = re.compile(r"`(?:[^`\n]|\n(?!\s*\n))+`|\]\([^)]*\)|<!--.*?-->")


def main() -> int:
    texts, long_lines, retired = defaultdict(list), defaultdict(list), []
    for file in sources():
        name = str(file.relative_to(ROOT))
        kind = "docs" if file.suffix == ".md" else "code"
        area = f"{name.split('/')[0] if '/' in name else '.'} ({kind})"
        lines = prose_lines(file)
        text = "\n".join(text for text, _ in lines.values())
        text = CODE.sub(lambda match: " code " + "\n" * match.group().count("\n"), text)
        texts[area].append(text)
        long_lines[area] += [f"{name}:{number}" for number, (_, long) in lines.items() if long]
        numbers = list(lines)
        for match in RETIRED_WORD.finditer(text if file.name != "CHANGELOG.md" else ""):
            number = numbers[text.count("\n", 0, match.start())]
            retired.append(f"{name}:{number}: {' '.join(match.group().split())}")

    print(f"{'AREA':20}{'WORDS':>8}{'WHAT':>8}{'NOBODY':>8}{'LONG':>8}")
    for area in sorted(texts):
        report(area, texts[area], len(long_lines[area]))
    all_long = sum(long_lines.values(), [])
    rates = report("all", sum(texts.values(), []), len(all_long))
    for place in all_long:
        print(f"{place}: over {COLUMNS} columns")
    print("\n".join(retired) or "no retired words")
    is_over = any(rates[name] > limit for name, limit in LIMITS.items())
    return 1 if is_over or all_long or retired else 0


def report(area: str, texts: list[str], long_count: int) -> dict[str, float]:
    """Prints the row of an area and returns its counts per 1,000 words."""
    text = "\n".join(texts)
    words = max(len(re.findall(r"[\w'’-]+", text)), 1)
    rates = {
        name: 1000 * len(re.findall(pattern, text, re.IGNORECASE)) / words
        for name, pattern in COUNTED.items()
    }
    print(f"{area:20}{words:8}{rates['what']:8.2f}{rates['nobody']:8.2f}{long_count:8}")
    return rates


def sources() -> list[Path]:
    """The files that git tracks or would track, without generated ones."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = {ROOT / name for name in listed.split("\0") if name.endswith((".md", *COMMENT))}
    return sorted(file for file in files if file.is_file() and "generated" not in file.parts)


def prose_lines(file: Path) -> dict[int, tuple[str, bool]]:
    """The prose by line number, and whether the line is too long. Tables may be of any width."""
    found, in_fence = {}, False
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        start = COMMENT[file.suffix].search(line) if file.suffix in COMMENT else None
        if file.suffix in COMMENT and not start:
            found[number], in_fence = ("", False), False
            continue
        text = line[start.end():] if start else line
        if text.strip().startswith(("```", "~~~")):
            in_fence = not in_fence
        elif not in_fence:
            is_table = text.strip().startswith("|")
            found[number] = (text.strip(), len(line) > COLUMNS and not is_table)
    return found


if __name__ == "__main__":
    sys.exit(main())
