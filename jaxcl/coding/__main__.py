"""Looks into files of compressed weights and decodes them; `python -m jaxcl.coding --help`."""

import argparse
import io
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl import files, trees
from jaxcl.coding.storage import LIMIT, Message, decode, load
from jaxcl.typing import bad_argument


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser("python -m jaxcl.coding", description="Files of compressed weights (.jcl).")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="what a file holds, and what each leaf of it takes")
    decoder = commands.add_parser("decode", help="write the weights as arrays by path, as in params/Dense_0/kernel")
    decoder.add_argument("--out", type=Path, required=True, help="a .npz file, or a .safetensors file")
    for command in (inspect, decoder):
        command.add_argument("file", type=Path)
        command.add_argument("--limit", type=int, default=LIMIT, help="the most weights that are decoded (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        message = load(arguments.file, limit=arguments.limit)
        if arguments.command == "inspect":
            print(describe(message, arguments.file.stat().st_size))
        else:
            files.write_atomic(arguments.out, _as_file(trees.leaves_by_path(decode(message)), arguments.out.suffix))
    except (OSError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def describe(message: Message, size: int) -> str:
    """A text for people: header, bytes a leaf, and the KL against the bits spent."""
    layout, spent = message.layout, 8 * size / message.layout.blocks
    values = sum(leaf.values for leaf in layout.leaves)
    lines = [
        f"{size:,} bytes: {layout.weights:,} weights in {values:,} values, {layout.blocks:,} blocks of {layout.width}",
        f"bits a block: KL {message.kl:.2f}, spent {spent:.2f} with header and scales; 2^{message.bits} candidates",
        f"seed {layout.seed}",
        f"{'leaf':40}{'shape':>18}{'values':>10}{'scale':>12}{'bytes':>10}",
    ]
    for leaf, scale in zip(layout.leaves, message.scales, strict=True):
        shape = " x ".join(map(str, leaf.shape))
        lines.append(f"{leaf.path:40}{shape:>18}{leaf.values:>10,}{scale:>12.4g}{size * leaf.values / values:>10,.1f}")
    return "\n".join(lines)


def _as_file(leaves: dict[str, Any], kind: str) -> bytes:
    if kind == ".npz":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:  # np.savez takes names as keywords, of which some are its own
            for name, leaf in leaves.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, leaf, allow_pickle=False)
        return buffer.getvalue()
    if kind != ".safetensors":
        raise bad_argument("--out", kind or "no suffix", "end it in .npz or .safetensors")
    if "__metadata__" in leaves:
        raise bad_argument("file", "a leaf __metadata__", "safetensors has other use for that name: write .npz")
    try:
        from safetensors.numpy import save  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('safetensors is missing: pip install "jaxcl[text]", or write .npz') from error
    return bytes(save(leaves))


if __name__ == "__main__":
    sys.exit(main())
