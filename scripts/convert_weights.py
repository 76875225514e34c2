"""Convert a CVNet checkpoint: python scripts/convert_weights.py CVPR2022_CVNet_R50.pyth r50.safetensors"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from superglobal.errors import InputError
from superglobal.models.factory import load_model
from superglobal.models.weights import read_weights, save_weights
from superglobal.utils.provenance import versions


def main() -> int:
    """Read strictly, write with provenance, and list the ignored tensors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="CVNet file (model_state with encoder_q.* or globalmodel.*)")
    parser.add_argument("target", type=Path, help="safetensors file to write")
    args = parser.parse_args()
    try:
        source = read_weights(args.source)
        if source.kind != "cvnet":
            raise InputError(f"{args.source}: no CVNet checkpoint (no keys encoder_q.* or globalmodel.*)")
        network = load_model(args.source, pooling="gem", scales=1)
        converter = f"superglobal {versions().get('superglobal', 'unknown')}"
        save_weights(network, args.target, {**source.provenance, "converter": converter}, False)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.target}: {source.backbone}, whitening {source.dim}, {len(source.state)} tensors")
    if source.ignored:
        some = ", ".join(source.ignored[:3])
        print(f"ignored {len(source.ignored)} tensors of CVNet-Rerank ({some}, ...)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
