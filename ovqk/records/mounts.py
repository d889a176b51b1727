"""A warning if a folder's file locks do not reach other machines, judged by its file system's mount (Linux).

Some mounts grant locks that only this machine sees: NFS with `nolock` or `local_lock=flock` or `all` (nfs(5)), Lustre
with `localflock` (mount.lustre(8)), CIFS with `nobrl` (mount.cifs(8)). Two machines would then compute the same cell.
"""

import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
ALONE = {
    "nfs": ("nolock", "local_lock=flock", "local_lock=all"),
    "nfs4": ("nolock", "local_lock=flock", "local_lock=all"),
    "lustre": ("localflock",),
    "cifs": ("nobrl",),
    "smb3": ("nobrl",),
}
"""File system -> mount options that keep locks on this machine."""


def warning(folder: Path, mounts: str | None = None) -> str | None:
    """Return a warning if this folder's locks do not reach other machines; None if they do, or if it is unknown.

    Args:
        folder: the results folder.
        mounts: the text in /proc/self/mountinfo; this machine's if None.
    """
    if mounts is None:
        try:
            mounts = MOUNTS.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
    found = _mount_of(folder.absolute(), mounts)
    if found is None:
        return None
    place, kind, options = found
    alone = [option for option in ALONE.get(kind, ()) if option in options]
    if not alone:
        return None
    return (
        f"results_dir={folder}: {place} is mounted as {kind} with {alone[0]}, so file locks do not reach other "
        "machines. Let one machine at a time work on this folder, or two may compute the same cell"
    )


def _mount_of(folder: Path, mounts: str) -> tuple[str, str, set[str]] | None:
    """Return the mount point that holds a folder, its file system and its options; the deepest and last one wins."""
    best: tuple[str, str, set[str]] | None = None
    for line in mounts.splitlines():
        before, dash, after = line.partition(" - ")
        fields, more = before.split(" "), after.split(" ")
        if not dash or len(fields) < 6 or len(more) < 3:
            continue
        place = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        if folder.is_relative_to(place) and (best is None or len(place) >= len(best[0])):
            best = place, more[0], {*fields[5].split(","), *more[2].split(",")}
    return best
