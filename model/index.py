"""Index: which files hold a checkpoint's tensors, from a *.index.json."""

from __future__ import annotations

import json
from pathlib import Path


def indexed_files(index: Path) -> list[str]:
    """The names of the files that an index names, sorted: of files beside it, no other.

    Raises ValueError that says what is wrong with it.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{index} is not JSON: {error}") from error
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{index}: weight_map must be an object of file names by tensor")
    names = sorted(set(files.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".."):
            raise ValueError(f"{index} names {name!r}, which is not in its directory")
    return names
