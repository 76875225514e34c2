"""Write a network as ONNX or torch.export: python scripts/export.py WEIGHTS FILE.onnx|FILE.pt2 [--size H W] [--batch N]

The file takes (B, 3, H, W) float32 RGB in 0..1, normalises, makes the scales and gives (B, D) descriptors of unit norm;
its metadata says so. Without --size it takes every size, without --batch any number of images. It is compared with the
network on several sizes, and left only where they agree.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from superglobal.cli.arguments import add_network_arguments, network_of
from superglobal.errors import InputError
from superglobal.models.export import export_network


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_arguments(parser)
    parser.add_argument("file", type=Path, help="to write, .onnx or .pt2")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="one size, in pixels")
    parser.add_argument("--batch", type=int, help="one number of images")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="most that a component may differ (1e-4)")
    return parser


def main() -> int:
    """Export, print what was compared; exit status 2 for what a user can mend."""
    args = _parser().parse_args()
    try:
        size = (args.size[0], args.size[1]) if args.size else None
        compared = export_network(network_of(args), args.file, size, args.batch, args.tolerance)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for one in compared:
        batch, height, width = one.shape
        shape = f"{batch} x {height} x {width} px"
        print(f"{shape:>22}: least cosine {one.cosine:.7f}, largest difference {one.difference:.1e}")
    print(
        f"{args.file}: {args.file.stat().st_size / 1e6:.1f} MB; images (B, 3, H, W) float32 RGB in 0..1 -> descriptors"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
