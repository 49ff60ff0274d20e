"""What this process has mapped of a folder."""

from pathlib import Path


def mapped(folder: Path) -> set[tuple[str, bool]]:
    """Return (name, whether the kernel was told that it is read here and there) of each mapping of its files."""
    found, name = set(), None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split(maxsplit=5)
        if not head.endswith(":"):  # the first line of a mapping
            name = Path(rest[4]).name if len(rest) == 5 and Path(rest[4]).parent == folder else None
        elif head == "VmFlags:" and name is not None:
            found.add((name, "rr" in line.split()))
    return found
