"""Files that are either whole or absent."""

import os
import uuid
from pathlib import Path


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes `content` (text as UTF-8) so that `path` holds, at every moment, the old file or all of the new one.

    Missing parent folders are made. The content goes to a temporary file in the same folder, reaches the disk, and then
    takes the name.

    Raises:
        OSError: the file cannot be written; the old file is then as it was and no temporary file is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
